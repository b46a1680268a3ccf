# make up: a three-host network on this machine. make test: all tests. make down: no trace.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# Two at a time, whole files: what is on the kernel waits more than it works.
PARALLEL := -n 2 --dist loadfile
.PHONY: up down test lint unit sim netns docker bench generate setup setup-dev fuzz clean

up: setup
	@scripts/demo.sh

down:
	@if [ -x $(BIN)/vxmesh ]; then $(BIN)/vxmesh testbed down; fi

setup:
	@scripts/setup.sh

setup-dev:
	@scripts/setup.sh dev

test: setup-dev lint
	$(BIN)/python -m pytest $(PARALLEL) tests/unit tests/sim tests/fuzz tests/netns tests/docker

lint: setup-dev
	$(BIN)/ruff format --check agent tests
	$(BIN)/ruff check agent tests
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	scripts/generate.sh --check

unit sim netns docker: setup-dev
	$(BIN)/python -m pytest tests/$@

bench: setup-dev
	@scripts/setup.sh bench
	$(BIN)/python -m tests.bench

# A million hostile inputs over all decoders; the short form is in make test. FUZZ="--only NAME"
fuzz: setup-dev
	@scripts/setup.sh fuzz
	$(BIN)/python -m tests.fuzz $(FUZZ)

generate: setup-dev
	scripts/generate.sh

clean: down
	rm -rf $(VENV) .venv-plugins
