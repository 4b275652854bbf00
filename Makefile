# SPDX-License-Identifier: Apache-2.0
# make run: serve, segment the sample photo, print where the pictures are.   make test: run the tests.

PYTHON ?= python3
OUTPUT ?= output
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
BIN := .venv/bin

.PHONY: run serve test test-long test-all docker-test benchmark lint lock

run: .venv/run
	@echo "Starting the server, which takes about 15 seconds. The first start may download 233 MB of weights."
	@$(BIN)/python -m serving.launch server.py -- client.py --init-timeout-s 600 --dump-images --output-dir $(OUTPUT)
	@echo
	@echo "The server cut the person out of images/orig.jpg. The pictures:"
	@echo "    $(OUTPUT)/orig0.jpg  the photo as the server decoded it"
	@echo "    $(OUTPUT)/segm0.jpg  the person"

serve: .venv/run
	$(BIN)/python server.py

test: .venv/dev
	@echo "Running the tests, which takes about 5 minutes on two cores. make test-long runs the others."
	$(BIN)/python -m pytest

test-long: .venv/dev
	@echo "Running the long tests: fuzzing, a soak, memory growth, the proxy, attacks. This takes about 15 minutes on two cores."
	$(BIN)/python -m pytest tests/long

# Everything: what to run on a machine with a GPU.
test-all: .venv/dev
	$(BIN)/python -m pytest tests

# On a machine with Docker.
docker-test: .venv/run
	deploy/docker_test.sh

benchmark: .venv/dev
	$(BIN)/python -m benchmark --plot benchmark.png

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Pin everything that the two short lists need, with hashes.
lock: .venv/dev
	for list in requirements requirements-dev; do $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	    --upgrade --generate-hashes --custom-compile-command "make lock" $$list.in -o $$list.txt; done

# Show only the lines of pip about packages of 100 MB or more.
LARGE_PACKAGES := 's/^ *(Downloading|Using cached) ([^ ]+) (\([0-9]{3,}.*)/    \1 \2 \3/p; s/^Installing .*/    Unpacking/p'

# Created once, and updated when the requirements change.
.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
	    f"$(PYTHON) is Python {sys.version.split()[0]}, but 3.11 or 3.12 is required: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo "Installing the packages into .venv: about 8 GB, which takes 2 to 5 minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements.txt | sed -unE $(LARGE_PACKAGES)
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	@echo "Installing the packages for the tests."
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@
