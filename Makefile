# Every target makes the virtual environment on demand. TORCH_INDEX chooses another build of torch, e.g. one with CUDA.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SERVING := $(VENV)/.serving
DEVELOPING := $(VENV)/.developing
NIXL := $(VENV)/.nixl
TORCH_INDEX ?=
ifeq ($(TORCH_INDEX),)
CONSTRAINTS := -c constraints.txt
TORCH := $(PIP) "$(shell grep '^torch==' constraints.txt)"
else
# Another build has its own version: the package's range decides, not the pin.
CONSTRAINTS :=
TORCH := $(PIP) --index-url "$(TORCH_INDEX)" "torch>=2.11"
endif

.PHONY: serve test test-all check goldens bench playground clean

serve: $(SERVING)
	$(BIN)/sfumato serve $(ARGS)

test: check
	$(BIN)/python -m pytest -m "not slow and not gpu"
	$(BIN)/python -m tests.goldens --supported tests/data/goldens

test-all: check $(NIXL)
	$(BIN)/python -m pytest
	$(BIN)/python -m tests.goldens --supported tests/data/goldens

# Its own dependencies name a CUDA build of torch; over UCX it needs neither.
$(NIXL): $(DEVELOPING)
	$(PIP) $(CONSTRAINTS) --no-deps nixl nixl-cu12
	touch $@

check: $(DEVELOPING)
	BIN=$(BIN) scripts/check

goldens: $(DEVELOPING)
	$(BIN)/python -m tests.goldens --supported $(or $(FOLDER),tests/data/goldens)

bench: $(DEVELOPING)
	$(BIN)/python -m benchmarks.text $(ARGS)

$(SERVING): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(TORCH)
	$(PIP) $(CONSTRAINTS) -e ".[image]"
	touch $@

$(DEVELOPING): $(SERVING)
	$(PIP) $(CONSTRAINTS) -e ".[dev]"
	scripts/browser
	touch $@

# The page's bundle from its sources; a slow test compares it with what is committed.
playground:
	cd playground && npm ci --no-audit --no-fund && npm run check && npm run build

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
