# Every target makes the virtual environment on demand. TORCH_INDEX chooses another build of torch, e.g. one with CUDA.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: serve test test-all check goldens bench clean

serve: $(STAMP)
	$(BIN)/sfumato serve $(ARGS)

test: check
	$(BIN)/python -m pytest -m "not slow and not gpu"
	$(BIN)/python -m tests.goldens --supported tests/data/goldens

test-all: check
	$(BIN)/python -m pytest
	$(BIN)/python -m tests.goldens --supported tests/data/goldens

check: $(STAMP)
	BIN=$(BIN) scripts/check

goldens: $(STAMP)
	$(BIN)/python -m tests.goldens --supported $(or $(FOLDER),tests/data/goldens)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.text $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		$(if $(TORCH_INDEX),torch,"$(TORCH)")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),,-c constraints.txt) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
