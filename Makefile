# Every target sets up what it needs: `make train` and `make test` work on a fresh clone.
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 4
BIN     := $(VENV)/bin

.PHONY: setup train test test-slow test-gpu test-weights notebooks check format clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

train: setup
	$(BIN)/python train.py olmo2-tiny $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python benchmarks/gpu.py

test-weights: setup
	$(BIN)/python -m pytest -m weights $(ARGS)

notebooks: setup
	$(BIN)/python notebooks/execute.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info
