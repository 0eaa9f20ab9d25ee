# `make film` and `make test` need Python 3.11 or newer and nothing else: they set up what they use.
PYTHON ?= python3
VENV ?= .venv
quick ?=
STORY ?= examples/ada_and_the_tent.yaml
ARGS ?=
RUN = $(VENV)/bin/python

.PHONY: film test test-slow lint bench toy-report stbench-toy clean

film: $(VENV)/.ready  ## the example story as a film, on the embedded model
	$(RUN) scripts/generate.py $(STORY) $(ARGS)

test: $(VENV)/.ready  ## the tests, under three minutes on two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: $(VENV)/.ready  ## the tests that take longer
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m slow $(ARGS)

lint: $(VENV)/.ready  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.ready  ## every figure of speed, as ratios in one run
	$(RUN) -m benchmarks.keyframes $(ARGS)
	$(RUN) -m benchmarks.film $(ARGS)
	$(RUN) -m benchmarks.scorers $(ARGS)
	$(RUN) -m benchmarks.loader $(ARGS)
	$(RUN) -m benchmarks.grouping $(ARGS)
	$(RUN) -m benchmarks.training $(ARGS)
	$(RUN) -m benchmarks.scoring $(ARGS)
	$(RUN) -m benchmarks.acceleration $(ARGS)
	$(RUN) scripts/benchmark.py

toy-report: $(VENV)/.ready  ## what the embedded models reach on held-out stories
	$(RUN) -m benchmarks.toy $(ARGS)

stbench-toy: $(VENV)/.ready  ## the toy stories by seven methods, scored (quick=true: six of them, by three)
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node=2 scripts/eval_stbench.py \
	    experiment=stbench_toy$(if $(filter true,$(quick)),_quick) $(ARGS)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) films build *.egg-info .pytest_cache .mypy_cache .ruff_cache
