# make demo    a full-size SmolVLA drives the virtual arm for ten seconds, from nothing
# make test    lint, types, import rules and every test but those of full-size weights, from nothing
# make test-fast   the tests that need no torch
# make bench   the full-size comparison with LeRobot on this machine, and its accuracy: bench/report.html
# All make .venv on first use. A CPU build of torch is enough:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAST := .venv-fast
DEMO := bundle-demo
LEROBOT := lerobot-env
TASK := Pick up the red cube and place it on the plate.

.PHONY: demo test test-fast test-full check bench lerobot-env clean

demo: $(DEMO)/manifest.json
	$(BIN)/smolvla-run --bundle $(DEMO) --port sim --device cpu --task "$(TASK)" --seconds 10

$(DEMO)/manifest.json: | $(VENV)/installed
	$(BIN)/smolvla-export --demo --output $(DEMO)

test: check
	$(BIN)/python -m pytest -m "not arm and not full" -n 2
	$(BIN)/python -m pytest -m "arm and not full"

test-fast: $(FAST)/installed
	$(FAST)/bin/python -m pytest -m "not arm and not full" -n 2

test-full: $(VENV)/installed
	$(BIN)/python -m pytest -m full

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p smolvla_edge
	$(BIN)/lint-imports

bench: bench/fp32/manifest.json $(LEROBOT)/bin/lerobot-ready
	$(BIN)/smolvla-bench latency --bundle bench/fp32 --reference bench/checkpoint --lerobot $(LEROBOT)/bin/python \
		--device cpu --output bench/latency.json
	$(BIN)/smolvla-bench accuracy --bundle bench/fp32 --reference bench/checkpoint --frames 4 --device cpu \
		--output bench/accuracy.json
	$(BIN)/smolvla-bench report bench/latency.json bench/accuracy.json --output bench/report.html

bench/fp32/manifest.json: bench/checkpoint/model.safetensors
	$(BIN)/smolvla-export bench/checkpoint --target cpu --output bench/fp32 --force

bench/checkpoint/model.safetensors: | $(VENV)/installed
	rm -rf bench/checkpoint
	$(BIN)/python -c "import pathlib, smolvla_edge.export.checkpoint.demo as d; d.write_demo_checkpoint(pathlib.Path('bench/checkpoint'))"

lerobot-env: $(LEROBOT)/bin/lerobot-ready

$(LEROBOT)/bin/lerobot-ready: benchmarks/lerobot.sh
	rm -rf $(LEROBOT)
	benchmarks/lerobot.sh $(PYTHON) $(LEROBOT)
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.7,<2.14"
	$(BIN)/pip install --quiet --editable ".[bench,export,dev]"
	touch $@

$(FAST)/installed: pyproject.toml
	$(PYTHON) -m venv $(FAST)
	$(FAST)/bin/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(FAST) $(LEROBOT) $(DEMO) bench build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
