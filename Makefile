# Every target needs Python 3.11 or newer and nothing else: they set up what they use.
PYTHON ?= python3
VENV ?= .venv
quick ?=
STORY ?= examples/ada_and_the_tent.yaml
ARGS ?=
RUN = $(VENV)/bin/python
TWO_STORIES = 'stbench.only=[02_dax_in_the_desert,11_ada_and_hana_in_the_desert]'

.PHONY: help install film test test-slow lint docs bench toy-report stbench-toy clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  %-12s%s\n", $$1, $$2}'
	@echo 'Settings: PYTHON=python3.12 VENV=folder STORY=story.yaml ARGS="further arguments"'

install: $(VENV)/.ready  ## set up the environment in .venv

film: $(VENV)/.ready  ## generate the example film with the embedded model
	$(VENV)/bin/storymem generate $(STORY) $(ARGS)

test: $(VENV)/.ready  ## run the fast tests, under three minutes on two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.ready  ## run the tests that take longer
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m slow $(ARGS)

lint: $(VENV)/.ready  ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.ready  ## measure every figure of speed in the docs
	$(RUN) -m benchmarks.keyframes $(ARGS)
	$(RUN) -m benchmarks.film $(ARGS)
	$(RUN) -m benchmarks.grouping $(ARGS)
	$(RUN) -m benchmarks.training $(ARGS)
	$(RUN) -m benchmarks.scoring $(ARGS)
	$(RUN) -m benchmarks.acceleration $(ARGS)
	$(VENV)/bin/storymem benchmark

toy-report: $(VENV)/.ready  ## measure the embedded models on held-out stories
	$(RUN) -m benchmarks.toy $(ARGS)

stbench-toy: $(VENV)/.ready  ## generate and score the toy benchmark (quick=true: two stories, every system)
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node=2 -m storymem evaluate \
	    experiment=stbench_toy $(if $(filter true,$(quick)),$(TWO_STORIES)) $(ARGS)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e '.[dev]'
	touch $@

docs: $(VENV)/.ready  ## build the documentation to build/docs
	$(VENV)/bin/mkdocs build --strict --quiet --site-dir build/docs

clean:  ## remove the environment and everything built; films stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
