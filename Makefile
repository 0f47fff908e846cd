# Every command makes the environment first if it is missing; nothing else has to be typed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An environment with ttnn: one that is there, or the one that the script at TTNN_SETUP makes.
TTNN_SETUP ?= ../shared/ttnn/setup
TTNN_VENV ?= .venv-ttnn
READY := $(VENV)/.ready

.PHONY: help demo test test-ttnn lint typecheck format wheel docs check clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): setup.cfg pyproject.toml constraints.txt reference.txt
	@echo "Making the environment in $(VENV) (a few minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement reference.txt
	touch $(READY)

demo: $(READY)  ## train MoLE on real series, backtest it against baselines, plot its forecasts
	$(BIN)/python -m moecast.evaluation.demo

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

# Without a device or a simulator named, on a mock Blackhole, which compiles and does not compute.
test-ttnn: $(TTNN_VENV)/.moecast  ## the tests that need ttnn: docs/backends.md
	@test -n "$$TT_METAL_SIMULATOR" || test -e /dev/tenstorrent || echo "A mock Blackhole: operations are validated and compiled, no numbers are compared"
	@if [ -z "$$TT_METAL_SIMULATOR$$TT_METAL_MOCK_CLUSTER_DESC_PATH" ] && [ ! -e /dev/tenstorrent ]; then \
		export TT_METAL_MOCK_CLUSTER_DESC_PATH=$(abspath $(dir $(TTNN_SETUP)))/blackhole_p150.yaml; fi; \
	$(TTNN_VENV)/bin/python -m pytest -q -m ttnn -s tests/backends/ttnn

# A virtual environment for Python 3.10 or 3.12; moecast's own constraints hold where ttnn allows.
$(TTNN_VENV)/.moecast: setup.cfg
	test -x $(TTNN_VENV)/bin/python || $(TTNN_SETUP) $(TTNN_VENV)
	$(TTNN_VENV)/bin/python -m pip install --quiet --editable . 'gluonts[torch]==0.17.0' 'numpy<2' pytest hypothesis
	touch $@

lint: $(READY)  ## style and format, nothing changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# setup.cfg maps forecasters/ to moecast.forecasters and so on; mypy follows paths, so it is given the same shape.
typecheck: $(READY)  ## static types
	rm -rf .typecheck && mkdir -p .typecheck/moecast
	for package in backends distributions evaluation forecasters; do ln -s ../../$$package .typecheck/moecast/$$package; done
	cd .typecheck && ../$(BIN)/mypy --config-file ../setup.cfg -p moecast

format: $(READY)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)  ## build the wheel and import every module of it, not of the checkout
	rm -rf build dist && $(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed dist/*.whl
	cd build && PYTHONPATH=installed ../$(BIN)/python ../tests/import_wheel.py installed

docs: $(READY)  ## the site of documentation, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

check: lint typecheck test wheel docs demo  ## all that CI runs

clean:  ## remove the environment and everything made
	rm -rf $(VENV) .venv-ttnn .typecheck build dist *.egg-info demo_output .pytest_cache .ruff_cache .mypy_cache .hypothesis
