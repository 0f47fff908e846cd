# Every command makes the environment first if it is missing; nothing else has to be typed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint typecheck format wheel docs check clean

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
	rm -rf $(VENV) .typecheck build dist *.egg-info demo_output .pytest_cache .ruff_cache .mypy_cache .hypothesis
