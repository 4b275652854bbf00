# SPDX-License-Identifier: Apache-2.0
# make run: serve, segment the sample photos, say where the pictures are.   make test: prove that it works.

PYTHON ?= python3
OUTPUT ?= output
SHELL := bash
BIN := .venv/bin

.PHONY: run serve test docker-test benchmark lint

# On free ports, to work beside whatever runs already. Whichever ends first decides: the client, as it should, or the
# server, which then has said why.
run: .venv/run
	@set -eu; \
	read -r http grpc metrics < <($(BIN)/python -c 'import benchmark; print(*benchmark.free_ports())'); \
	trap 'kill $$(jobs -p) 2>/dev/null || true; wait' EXIT; \
	$(BIN)/python server.py --http-port $$http --grpc-port $$grpc --metrics-port $$metrics & server=$$!; \
	$(BIN)/python client.py --url http://127.0.0.1:$$http --init-timeout-s 600 --dump-images --output-dir $(OUTPUT) & \
	wait -n $$server $$!; \
	kill $$server; wait $$server; \
	echo; \
	echo "images/orig.jpg went through Triton, DALI and DeepLabV3-ResNet101, and its person was cut out. The pictures:"; \
	echo "    $(OUTPUT)/orig0.jpg  the photo as the server decoded it"; \
	echo "    $(OUTPUT)/segm0.jpg  the person"

serve: .venv/run
	$(BIN)/python server.py

test: .venv/dev
	$(BIN)/python -m pytest

# On a machine with Docker.
docker-test: .venv/run
	deploy/docker_test.sh

benchmark: .venv/dev
	$(BIN)/python benchmark.py --plot benchmark.png

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Made once, and brought up to date when the requirements change.
.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
	    f"Python 3.11 or 3.12 is needed, $(PYTHON) is {sys.version.split()[0]}: make $(MAKECMDGOALS) PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
