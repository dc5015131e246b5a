# Everything a newcomer or CI runs. Needs Python 3.11+ and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
MINUTES ?= 5
HOURS ?= 1

.PHONY: demo test test-slow lint types bench bench-peers chaos soak fmt clean

demo: $(VENV)/.installed ## a real long task on a real Kafka, with kills and a proof at the end
	$(BIN)/perdure demo

test: $(VENV)/.installed-test lint types ## every test but the slow ones, on a real broker
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.installed-test ## what takes half a minute and more: three brokers, containers where a Docker daemon runs, long outages
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

bench: $(VENV)/.installed-test ## the first table of docs/benchmarks.md; `.venv/bin/python -m benchmarks stack` and others: the rest
	$(BIN)/python -m benchmarks

chaos: $(VENV)/.installed-test ## faults of every kind under load, and the proof after them: see docs/chaos.md
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

soak: $(VENV)/.installed-test ## hours under load with a fault now and then: nothing lost, nothing grown
	$(BIN)/python -m tests.chaos.soak --hours $(HOURS) $(if $(SEED),--seed $(SEED))

bench-peers: $(VENV)/.installed-test ## Perdure beside what people use today; about two hours, and large downloads
	$(BIN)/python -m benchmarks.peers

fmt: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,test]'
	touch $@ $(VENV)/.installed
