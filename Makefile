# `make quickstart` and `make test` set everything up by themselves, into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Torch is pinned by constraints.txt and installed first: an unpinned torch can pull gigabytes of CUDA packages.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Tests of one file share what they make, so a file stays in one process.
PROCESSES ?= logical
SIDE_BY_SIDE := -n $(PROCESSES) --dist loadfile

.PHONY: help quickstart quickstart-vision experiments docs docs-reference screenshots test test-wheel test-slow test-example test-weights test-vllm test-browser mutants lint benchmarks benchmarks-gpu clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; a minute or two)"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed  ## tiny teacher and student, Vanilla OPD beside DOPD, table and plots: minutes on two cores
	@$(BIN)/dopd quickstart

quickstart-vision: $(VENV)/.installed  ## the same for questions about images, with boxes as privileged text
	@$(BIN)/dopd quickstart --config tiny-vision --methods vanilla,dopd,dopd_frozen --output-dir runs/quickstart-vision

experiments: $(VENV)/.installed  ## the paper's tables and figures at tiny scale: hours; goes on where it stopped
	@$(ONE_THREAD) $(BIN)/dopd experiment all

test: $(VENV)/.installed-dev  ## all quick tests, linter and type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(ONE_THREAD) $(BIN)/pytest $(SIDE_BY_SIDE) -m "not slow and not weights and not gpu and not vllm and not browser and not wheel and not example"

test-wheel: $(VENV)/.installed-dev  ## the wheel, built and used in an environment of its own
	@$(ONE_THREAD) $(BIN)/pytest -m wheel

test-slow: $(VENV)/.installed-dev  ## tests that train: some minutes
	@$(ONE_THREAD) $(BIN)/pytest $(SIDE_BY_SIDE) -m slow

test-example: $(VENV)/.installed-dev  ## `dopd example`, from raw problems to a judged model: some minutes
	@$(ONE_THREAD) $(BIN)/pytest -m example

test-weights: $(VENV)/.installed-dev  ## tests with real pretrained weights, fetched as data: some minutes
	@$(ONE_THREAD) $(BIN)/pytest -m weights

$(VENV)-vllm/.installed: pyproject.toml constraints.txt tests/with_vllm/environment.py
	@echo "setting up $(VENV)-vllm (once; some minutes, 4 GB)"
	@$(PYTHON) tests/with_vllm/environment.py $(VENV)-vllm
	@touch $@

test-vllm: $(VENV)-vllm/.installed  ## vLLM on this CPU draws the answers, and serves a teacher: some minutes
	@$(ONE_THREAD) $(VENV)-vllm/bin/pytest -m vllm tests/with_vllm

test-browser: $(VENV)/.installed-dev  ## the report in a headless browser: needs the packages chromium and chromium-driver
	@$(ONE_THREAD) $(BIN)/pytest -m browser

mutants: $(VENV)/.installed-dev  ## small faults that the quick tests should notice: an hour or more; see tests/MUTANTS.md
	@$(ONE_THREAD) nice -n 19 $(BIN)/python -m lab.mutation

lint: $(VENV)/.installed-dev  ## linter, formatter and type checker
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/mypy

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(PIP) --editable '.[docs]'
	@touch $@

docs: $(VENV)/.installed-docs  ## the documentation as a site in build/site; links and headings are checked
	@$(BIN)/python docs/tools/site.py build/pages
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

screenshots: $(VENV)/.installed-dev  ## pictures of the report for the documentation, from two short runs: needs chromium, chromium-driver
	@$(ONE_THREAD) $(BIN)/python docs/tools/screenshots.py

docs-reference: $(VENV)/.installed-dev  ## the pages of docs/reference that are made from the code
	@$(ONE_THREAD) TRL_EXPERIMENTAL_SILENCE=1 $(BIN)/python docs/tools/reference.py

benchmarks: $(VENV)/.installed-dev  ## times the losses and whole steps against peers
	@$(PIP) --editable '.[bench]'
	@$(ONE_THREAD) $(BIN)/python benchmarks/fused_loss.py
	@$(ONE_THREAD) $(BIN)/python benchmarks/step.py
	@$(ONE_THREAD) $(BIN)/python benchmarks/images.py

benchmarks-gpu: $(VENV)/.installed-dev  ## all that only a CUDA device can tell, in parts of under nine minutes; figures in benchmarks/results
	@$(PIP) --editable '.[bench]'
	@$(BIN)/python benchmarks/gpu.py

clean:  ## remove the environment and run outputs
	rm -rf $(VENV) runs
