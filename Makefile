SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)-oldest
NEWEST := $(VENV)-newest
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

DEMO_RECIPE ?= recipes/minilm-gender/recipe.yaml
DEMO_OUT ?= out/minilm-gender
# Three workers on two cores, since some tests wait for processes that they start or for files.
PYTEST_WORKERS ?= 3
PYTEST_ARGS ?=

# Real models and data for the tests that need them; if the folder is missing, these tests are skipped.
HF_ERASURE_TEST_ASSETS ?= ../shared/assets
override HF_ERASURE_TEST_ASSETS := $(abspath $(HF_ERASURE_TEST_ASSETS))
export HF_ERASURE_TEST_ASSETS

.PHONY: help demo demo-check test test-oldest test-newest test-processors matrix docs docs-tables notebooks release-check figures lint format bench bench-device clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1 \t\2/p' Makefile

# torch goes in first and alone: its wheel is by far the largest, and the later steps must not choose another build.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[demo,test]'
	touch $@

$(OLDEST)/.torch: constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints-oldest.txt)
	touch $@

$(OLDEST)/.test: $(OLDEST)/.torch pyproject.toml
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[oldest]'
	touch $@

# Installed again each time, since there may be newer releases. Only torch is pinned, so that pip takes the present build.
$(NEWEST)/.test: constraints.txt pyproject.toml FORCE
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,oldest]' trl onnx onnxruntime onnxscript
	touch $@

FORCE:

# Only the build tool: the check makes its own environment.
$(VENV)/.release: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt build
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[bench]'
	touch $@

demo: $(VENV)/.demo  ## search across two styles, gender out of an encoder, gender up and down in a language model
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/two_sources/search.py
	HF_HUB_OFFLINE=1 $(BIN)/hf-erasure fit $(DEMO_RECIPE) output=$(DEMO_OUT) --no-progress
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/gradiend_demo/train.py out/gradiend-demo
	HF_HUB_OFFLINE=1 $(BIN)/hf-erasure gradiend fit recipes/gradiend_demo/recipe.yaml --no-progress

demo-check: demo  ## load what the demo wrote in other processes, measure again, and find the same
	HF_HUB_OFFLINE=1 $(BIN)/hf-erasure check $(DEMO_OUT)
	HF_HUB_OFFLINE=1 $(BIN)/hf-erasure gradiend evaluate out/gradiend-demo/adapter

# One core for each worker: otherwise processes that tests start would use all cores. Each file runs on one worker, so that
# its fixtures are made once. Workers get files in the order of tests/conftest.py.
BY_FILE := --dist loadfile --no-loadscope-reorder
# Bytecode is kept even if the machine turns it off: otherwise every worker would compile all tests again.
test: $(VENV)/.test  ## run the tests (PYTEST_ARGS="-m slow" for the slow ones)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(BY_FILE) $(PYTEST_ARGS)

# Left out are tests of things that older releases do differently: layers_pattern where the list of blocks is at the top of
# the model, the names that a PeftModel knows after a failed call, and what a process writes that is not the main one.
test-oldest: $(OLDEST)/.test  ## run the tests of adapters with the oldest releases that are supported
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n $(PYTEST_WORKERS) -p no:cacheprovider -m 'not slow and not lifecycle' \
		$(PYTEST_ARGS) tests/adapters tests/lifecycle \
		--deselect tests/adapters/test_targets.py::test_layers_to_transform_and_exclude_modules \
		--deselect tests/adapters/test_oracle.py::test_verbs_do_what_they_do_for_lora \
		--deselect tests/adapters/test_saving.py::test_a_process_that_is_not_the_main_one_writes_nothing

test-newest: $(NEWEST)/.test  ## run the tests of adapters, model types and README with the newest releases that pyproject.toml allows
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check | grep -iE '^(torch|transformers|peft|accelerate|datasets|huggingface_hub) '
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(PYTEST_WORKERS) $(BY_FILE) -p no:cacheprovider \
		$(PYTEST_ARGS) tests/adapters tests/lifecycle tests/breadth tests/docs/test_pages.py

# The order in which a processor adds numbers shows in the last bits. PROCESSOR_TESTS chooses the tests.
PROCESSOR_TESTS ?= tests/erasers tests/gradiend tests/adapters
test-processors: $(VENV)/.test  ## run the tests of the mathematics and of adapters as on other processors
	for capability in default avx2; do for threads in 1 2; do \
		echo "ATEN_CPU_CAPABILITY=$$capability, threads: $$threads"; \
		HF_HUB_OFFLINE=1 ATEN_CPU_CAPABILITY=$$capability OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -q \
			-n $(PYTEST_WORKERS) $(BY_FILE) -p no:cacheprovider $(PYTEST_ARGS) $(PROCESSOR_TESTS); \
	done; done

# In tests/breadth it runs only the tests of every type: the others take some of the same steps.
matrix: $(VENV)/.test  ## run the tests of other tools and of every model type, and write the tables of docs that they make
	rm -f out/matrix.jsonl out/types.jsonl
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m '' --matrix out/matrix.jsonl tests/ecosystem tests/lifecycle tests/distributed
	$(BIN)/python -m tests.matrix out/matrix.jsonl docs/compatibility.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m slow --matrix out/types.jsonl tests/breadth
	$(BIN)/python -m tests.breadth.table out/types.jsonl

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs  ## build the documentation site in site/; needs no network
	$(BIN)/python -m mkdocs build --quiet --strict

docs-tables: $(VENV)/.test  ## write the tables of the documentation that repeat what the code says
	$(BIN)/python -m tests.docs.tables

notebooks: $(VENV)/.test  ## run the notebooks of the documentation and keep what they print
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.docs.notebooks

# RELEASE_ARGS="--borrow SITE_PACKAGES" saves the installation of the dependencies.
release-check: $(VENV)/.release  ## build wheel and sdist, and try them in a clean environment (TAG=v0.1.0 for a release)
	$(BIN)/python -m tests.release $(if $(TAG),--tag $(TAG)) $(RELEASE_ARGS)

figures: $(VENV)/.test  ## print how much code there is, and how many files and functions each call goes through
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.house
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.walk

lint: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench  ## time the erasers against concept-erasure and the floor
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/erasers.py $(BENCH_ARGS)

bench-device: $(VENV)/.test  ## run the benchmark for accelerators at small sizes: that it runs, and agrees with the CPU
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/device.py --small

clean:  ## remove the environment, the caches and what the recipes wrote
	rm -rf $(VENV) $(OLDEST) $(NEWEST) out build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
