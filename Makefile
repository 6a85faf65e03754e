# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-nni demo-plain test lint format bench-zoo bench-scoring bench-cifar bench-subtask bench-exponent bench-psap \
	bench-psap-cifar bench-psap-overhead bench-resconv bench-automl host-tests clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv and install everything (again when pyproject.toml changed)

# torch and torchvision come together from the index as they are: builds mixed by hand do not load.
$(STAMP): pyproject.toml
	@test -x $(VENV)/bin/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, '$(PYTHON)' is not: try 'make PYTHON=python3.11 $(MAKECMDGOALS)'" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (several GB and minutes the first time)"
	@$(PY) -m pip install --disable-pip-version-check -q -e ".[dev]"
	@touch $@

demo: $(STAMP) ## run the quick start
	$(PY) examples/quickstart.py $(ARGS)

.PHONY: demo-sweep
demo-sweep: $(STAMP) ## show ITPruner's widths for many budgets
	$(PY) examples/sweep.py $(ARGS)

JOBS ?= 2
test: $(STAMP) ## run all tests and doctests, in two processes (ARGS="-k name", JOBS=1)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(STAMP) ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## fix what ruff can fix, and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-zoo: $(STAMP) ## prune the torchvision zoo (ARGS=...)
	$(PY) benchmarks/zoo.py $(ARGS)

bench-scoring: $(STAMP) ## measure what scoring costs (ARGS=...)
	$(PY) benchmarks/scoring_cost.py $(ARGS)

bench-psap: $(STAMP) ## prune while training, on digits (ARGS=...)
	$(PY) benchmarks/psap_digits.py $(ARGS)

bench-psap-cifar: $(STAMP) ## prune while training, on CIFAR (ARGS=...)
	$(PY) benchmarks/psap_cifar.py $(ARGS)

bench-psap-overhead: $(STAMP) ## what a training step costs under PSAP (ARGS=...)
	$(PY) benchmarks/psap_overhead.py $(ARGS)

bench-cifar: $(STAMP) ## one-shot pruning on CIFAR (ARGS=...)
	$(PY) benchmarks/cifar_oneshot.py $(ARGS)

.PHONY: bench-itpruner bench-itpruner-cost
bench-itpruner: $(STAMP) ## ITPruner's widths on CIFAR (ARGS=...; cifar_train.py trains what has no weights)
	$(PY) benchmarks/itpruner_cifar.py $(ARGS)

bench-itpruner-cost: $(STAMP) ## measure what ITPruner costs (ARGS=...)
	$(PY) benchmarks/itpruner_cost.py $(ARGS)

bench-subtask: $(STAMP) ## prune to three of ten CIFAR classes (ARGS=...)
	$(PY) benchmarks/cifar_subtask.py $(ARGS)

bench-exponent: $(STAMP) ## compare how losses are normalised on CIFAR (ARGS=...)
	$(PY) benchmarks/cifar_exponent.py $(ARGS)

.PHONY: bench-compensation bench-imagenette bench-one-shot
bench-one-shot: $(STAMP) ## measure what a whole one-shot pruning costs (ARGS=...)
	$(PY) benchmarks/one_shot_cost.py $(ARGS)

bench-compensation: $(STAMP) ## what a least-squares refit is worth to every criterion on CIFAR (ARGS=...)
	$(PY) benchmarks/cifar_compensation.py $(ARGS)

.PHONY: bench-batchnorm
bench-batchnorm: $(STAMP) ## compare what to do with batch norms after pruning (ARGS=...)
	$(PY) benchmarks/batchnorm_rules.py $(ARGS)

bench-imagenette: $(STAMP) ## prune a depthwise ImageNet network to ten classes (ARGS=...; pip install ".[imagenet]")
	$(PY) benchmarks/imagenette_subtask.py $(ARGS)

.PHONY: bench-latency
bench-latency: $(STAMP) ## prune to a predicted latency and measure it (ARGS=...)
	$(PY) benchmarks/latency_budget.py $(ARGS)

bench-resconv: $(STAMP) ## fewer layers against fewer channels on CIFAR (ARGS=...)
	$(PY) benchmarks/resconv_cifar.py $(ARGS)

.PHONY: bench-second-game demo-finetune
bench-second-game: $(STAMP) ## how few images a pruned network needs to recover, on CIFAR (ARGS=...)
	$(PY) benchmarks/second_game.py $(ARGS)

demo-finetune: $(STAMP) ## prune a CIFAR ResNet and fine-tune it with its dense self as teacher (ARGS=...)
	$(PY) examples/finetune.py $(ARGS)

demo-plain: $(STAMP) ## train a deep plain network with and without ResConv (ARGS=...)
	$(PY) examples/resconv_plain.py $(ARGS)

demo-nni: $(STAMP) ## run a real NNI experiment that prunes, 12 trials, two at a time (ARGS=...)
	$(PY) examples/nni_experiment.py $(ARGS)

bench-automl: $(STAMP) ## compare searches for widths on digits (ARGS=...)
	$(PY) benchmarks/automl_digits.py $(ARGS)

host-tests: $(STAMP) ## run the hosts' own tests (TP_SRC=checkout NNI_SRC=checkout)
	$(PY) benchmarks/host_tests.py $(if $(TP_SRC),--tp-src $(TP_SRC)) $(if $(NNI_SRC),--nni-src $(NNI_SRC)) $(ARGS)

clean: ## remove caches and build products (keeps .venv, data and outputs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name $(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
