# One environment a column: .venv has the pinned CPU profile on Python 3.11, .venv-latest the same on Python 3.12.
PYTHON ?= python3.11
PYTHON_LATEST ?= python3.12
VENV ?= .venv
VENV_LATEST ?= .venv-latest
VENV_TRL ?= .venv-trl
# Most tests keep one core busy, and their ranks and servers start slowly. ARGS="-n 0" runs them one by one.
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder
REQUIREMENTS := requirements/cpu.txt requirements/dev.txt

.PHONY: install demo compare dry-run test test-latest lint bench bench-trl figure1 clean
.DEFAULT_GOAL := help

help:
	@echo "make install      create $(VENV) with the pinned CPU profile"
	@echo "make demo         install if needed, train a model from nothing with FlowRL: a quarter of an hour, runs/demo"
	@echo "make compare      FlowRL and what it is compared with, three seeds each: about an hour and a half, runs/compare"
	@echo "make dry-run RECIPE=examples/math/qwen2.5_32b.yaml [GPUS=32]  a layout error is found here, and not in the queue"
	@echo "make test         install if needed, run all tests (Python 3.11, Megatron-Core 0.16.1)"
	@echo "make test-latest  the distributed core tests on Python 3.12 and Megatron-Core 0.19.2"
	@echo "make lint         ruff and mypy"
	@echo "make bench        run the benchmarks; each prints JSON and a table"
	@echo "make bench-trl    whole steps beside TRL's GRPOTrainer, in an environment of its own (5.5 GB where torch comes with CUDA); an hour"
	@echo "make figure1      distribution matching on tasks that can be counted: table and figures, ten minutes"

install: $(VENV)/.installed
test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest tests $(TWO_AT_ONCE) $(ARGS)

test-latest: $(VENV_LATEST)/.installed
	$(VENV_LATEST)/bin/python -m pytest tests/distributed tests/checkpoint tests/model tests/platform tests/planning $(TWO_AT_ONCE) $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed
	for script in benchmarks/*.py; do $(VENV)/bin/python $$script || exit 1; done

bench-trl: $(VENV)/.installed $(VENV_TRL)/.installed
	$(VENV)/bin/python benchmarks/trl/step.py --trl-python $(VENV_TRL)/bin/python

demo: $(VENV)/.installed
	$(VENV)/bin/python -m examples.countdown.demo $(ARGS)

compare: $(VENV)/.installed
	$(VENV)/bin/python -m examples.countdown.compare $(ARGS)

dry-run: $(VENV)/.installed
	$(if $(RECIPE),,$(error make dry-run RECIPE=recipe.yaml [GPUS=32] [ARGS="section.key=value ..."]))
	OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore -m megatron_flowrl.dry_run $(RECIPE) $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

figure1: $(VENV)/.installed
	$(VENV)/bin/python -m examples.distribution_matching $(ARGS)

$(VENV)/.installed: $(REQUIREMENTS) requirements/vllm.txt requirements/reasoning-gym.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(call fill,$(VENV))
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements/vllm.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements/reasoning-gym.txt \
		|| echo "reasoning-gym was not installed (it needs a C compiler); everything but its grader works without it"
	touch $@

$(VENV_LATEST)/.installed: $(REQUIREMENTS) setup.py
	$(PYTHON_LATEST) -m venv $(VENV_LATEST)
	$(call fill,$(VENV_LATEST))
	touch $@

$(VENV_TRL)/.installed: benchmarks/trl/requirements.txt
	$(PYTHON) -m venv $(VENV_TRL)
	$(VENV_TRL)/bin/python -m pip install --quiet -r $<
	touch $@

define fill
	$(1)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(1)/bin/python -m pip install --quiet $(foreach file,$(REQUIREMENTS),-r $(file))
	$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
endef

clean:
	rm -rf $(VENV) $(VENV_LATEST) $(VENV_TRL) build *.egg-info
