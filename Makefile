# make demo    a full-size SmolVLA drives the virtual arm for ten seconds, from nothing
# make test    lint, types, import rules and every test, from nothing
# Both make .venv on first use. A CPU build of torch is enough:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := bundle-demo
TASK := Pick up the red cube and place it on the plate.

.PHONY: demo test test-full check clean

demo: $(DEMO)/manifest.json
	$(BIN)/smolvla-run --bundle $(DEMO) --port sim --device cpu --task "$(TASK)" --seconds 10

$(DEMO)/manifest.json: | $(VENV)/installed
	$(BIN)/smolvla-export --demo --output $(DEMO)

test: check
	$(BIN)/python -m pytest -m "not full"

test-full: $(VENV)/installed
	$(BIN)/python -m pytest -m full

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p smolvla_edge
	$(BIN)/lint-imports

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.7,<2.14"
	$(BIN)/pip install --quiet --editable ".[export,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
