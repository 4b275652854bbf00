# SPDX-License-Identifier: Apache-2.0
# make run: serve, segment the sample photo, print the output paths.   make page: serve the page for browsers.
# make test: run the tests.   make serve: run the server.

PYTHON ?= python3
OUTPUT ?= output
PORT ?= 8080
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
BIN := .venv/bin

ifneq ($(origin PYTHON),file)
ifeq ($(shell command -v $(PYTHON)),)
$(error PYTHON=$(PYTHON) is not found: install it, or name another Python 3.11 or 3.12)
endif
ifneq ($(wildcard $(BIN)/python),)
VERSION := -c 'import sys; print(*sys.version_info[:2], sep=".")'
ifneq ($(shell $(PYTHON) $(VERSION)),$(shell $(BIN)/python $(VERSION)))
$(error .venv exists and has Python $(shell $(BIN)/python $(VERSION)): to use $(PYTHON) instead, rm -r .venv)
endif
endif
endif

.PHONY: run serve page test test-long test-all docker-test benchmark lint lock

run: .venv/run
	@echo "Starting the server, which takes 15 to 30 seconds. The first start may download 233 MB of weights."
	@$(BIN)/python -m tools.launch server.py -- client.py --init-timeout-s 600 --dump-images --output-dir $(OUTPUT)
	@echo
	@echo "The server segmented images/orig.jpg. The pictures:"
	@echo "    $(OUTPUT)/orig0.jpg  the photo as the server decoded it"
	@echo "    $(OUTPUT)/segm0.jpg  the person, on black"

serve: .venv/run
	$(BIN)/python server.py

# The server, with the page for browsers. Needs nginx.
page: .venv/run
	@$(BIN)/python -m tools.page --port $(PORT)

# The slowest files come first, so that both processes end at about the same time. One thread of OpenMP in each:
# several would wait for each other in busy loops while the other process needs the core.
TESTS := tests/lifecycle tests/served tests/unit

test: .venv/dev
	@echo "Running the tests, which takes about 4 minutes on two cores. make test-long runs the others."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(TESTS)

test-long: .venv/dev
	@echo "Running the long tests: fuzzing, a soak, memory growth, the proxy, attacks, the page. This takes about 15 minutes on two cores."
	$(BIN)/python -m pytest tests/long

# All tests. For a machine with a GPU.
test-all: .venv/dev
	$(BIN)/python -m pytest tests

# Needs Docker.
docker-test: .venv/run
	deploy/docker_test.sh

benchmark: .venv/dev
	$(BIN)/python -m benchmark --plot benchmark.png

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Pin all packages that the requirements*.in files need, with hashes.
lock: .venv/uv
	for list in requirements-uv requirements requirements-dev; do $(BIN)/uv pip compile --quiet --universal \
	    --python-version 3.11 --upgrade --generate-hashes --custom-compile-command "make lock" $$list.in -o $$list.txt; done

# SUMMARY hides downloads below 100 MB, and the final list of packages, in uv's output.
INSTALL := $(BIN)/uv pip install --python $(BIN)/python --require-hashes --compile-bytecode
SUMMARY := grep --line-buffered -vE '^ ([-+~]|Downloaded) |^Uninstalled |^Downloading .*\([0-9.]{1,4}MiB|KiB'

# make creates these once, and updates them when the requirements change.
.venv/uv: requirements-uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
	    f"$(PYTHON) is Python {sys.version.split()[0]}, but 3.11 or 3.12 is required: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.txt
	@touch $@

.venv/run: requirements.txt .venv/uv
	@echo "Installing the packages into .venv: about 7 GB, which takes 1 to 5 minutes."
	@$(INSTALL) -r requirements.txt 2>&1 | $(SUMMARY)
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	@echo "Installing the packages for the tests."
	@$(INSTALL) --quiet -r requirements-dev.txt
	@touch $@
