# The few commands of the project; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# TransformerEngine's Python files for tests/te, in $(VENV)/te and on no path: nothing else may find them.
TE_FILES := tests/te/requirements.txt
PYTEST_ARGS ?=

# Several processes on one machine: without this each would start one thread per core.
export OMP_NUM_THREADS ?= 1

# Did the user name an interpreter, or is PYTHON the default above?
PYTHON_IS_CHOSEN := $(filter-out file,$(origin PYTHON))

.DEFAULT_GOAL := help
.PHONY: help install lint test test-fast test-core test-te parity-full convert-3b test-compiled prepare-200mb faults gpu launch-full quickstart quickstart-loss clean

help:
	@echo "make install      $(VENV) with the package and everything the tests need (PYTHON=... picks the interpreter)"
	@echo "make quickstart   install, prepare a small corpus, train on two CPU processes, export to Hugging Face, generate"
	@echo "make quickstart-loss  the quickstart, the same without Depth-Attention, and both losses in docs/quickstart-loss.svg"
	@echo "make test         install, lint, the whole test suite (PYTEST_ARGS=... goes to pytest)"
	@echo "make test-fast    install, lint, the unit tests (under 3 minutes)"
	@echo "make test-core    install, lint, the unit tests and one case of each kind of the rest (for a second Python: VENV=... PYTHON=...)"
	@echo "make test-te      every check of tests/gpu/test_te.py on a CPU, TransformerEngine over kernels in plain torch, and every world of it (about 20 minutes)"
	@echo "make parity-full  every parity case of both engines for ten steps (about an hour on two cores)"
	@echo "make convert-3b   export, import and copy of a 3B checkpoint: peak memory and time (about 5 minutes, 17 GB of disk)"
	@echo "make faults       strike a training run over 40 times, compare with an undisturbed one (about half an hour)"
	@echo "make gpu          GPU tests and benchmarks on one NVIDIA GPU, in calls of 9 minutes that continue (GPU_ARGS=..., see docs/gpu; PYTHON=...)"
	@echo "make launch-full  every launch test: Slurm's real time limit, lost nodes, DeepSpeed in whole runs (root, Slurm installed; about 15 minutes)"
	@echo "make test-compiled  kernels that torch.compile builds against plain operations (a minute; needs g++ or a GPU)"
	@echo "make prepare-200mb  prepare corpora with a single document of 200 MB (a few minutes)"
	@echo "make lint         install, ruff and mypy"
	@echo "make clean        remove caches and build leftovers; data/ and runs/ stay"

# An existing environment is kept unless the user names an interpreter of another version: `make test` after
# `make install PYTHON=python3.12` must not rebuild it with the default python3.
install:
	@version() { "$$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }; \
	have=; [ ! -f $(VENV)/pyvenv.cfg ] || have=$$(version $(BIN)/python); \
	wanted=$$(version $(PYTHON)); \
	if [ -z "$$have" ] || { [ -n "$(PYTHON_IS_CHOSEN)" ] && [ "$$have" != "$$wanted" ]; }; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	        echo "PYTHON=$(PYTHON) is $${wanted:-no working Python}; 3.11 or later is needed: make install PYTHON=python3.11" >&2; \
	        exit 1; }; \
	    [ -f $(VENV)/pyvenv.cfg ] || [ -z "$$(ls -A $(VENV) 2>/dev/null)" ] || { \
	        echo "$(VENV) exists and is not a whole virtual environment; remove it or set VENV=..." >&2; exit 1; }; \
	    echo "creating $(VENV) with Python $$wanted"; \
	    rm -f $(STAMP) && $(PYTHON) -m venv --clear $(VENV) || exit 1; \
	fi
	@if [ ! -f $(STAMP) ] || [ pyproject.toml -nt $(STAMP) ] || [ $(TE_FILES) -nt $(STAMP) ]; then \
	    $(BIN)/python -m pip install --disable-pip-version-check -e '.[test]' && \
	    $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $(VENV)/te \
	        -r $(TE_FILES) && touch $(STAMP); \
	fi

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three at a time, on two cores as well: launchers, Slurm and whole commands wait for each other for a third of the time.
test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS) tests/unit

# What a second series of Megatron-Core is tried with at every landing, see tests/conftest.py.
test-core: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m core $(PYTEST_ARGS)

# As on a Hopper GPU, then what is another on a Blackwell GPU; then every method and precision in every layout.
test-te: install
	$(BIN)/python -W ignore -m tests.te.inside $(addprefix tests/te/,statements.py faults.py captured.py) tests/gpu/test_te.py
	$(BIN)/python -W ignore -m tests.te.inside --capability 10.0 -k "mxfp8 or tensorwise" tests/gpu/test_te.py
	DEPTHATTN_TE_TESTS=full $(BIN)/python -m pytest -s tests/te/test_te_worlds.py

parity-full: install
	DEPTHATTN_PARITY=full $(BIN)/python -m pytest -s tests/parallel

convert-3b: install
	$(BIN)/python -m pytest -s tests/large/test_convert_3b.py

# Under a real Slurm and on two network namespaces; needs root, slurm-wlm, munge, iproute2 (.ci/run installs them).
launch-full: install
	DEPTHATTN_LAUNCH=full $(BIN)/python -m pytest -s tests/launch tests/e2e/test_deepspeed.py tests/e2e/test_preflight_worlds.py

faults: install
	$(BIN)/python -W ignore -m tests.faults.campaign --work runs/faults --output runs/faults.md

# No install: on a machine without a network it runs with what the interpreter has, and skips what needs more.
gpu:
	$(if $(PYTHON_IS_CHOSEN),$(PYTHON),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))) tools/gpu.py $(GPU_ARGS)

test-compiled: install
	$(BIN)/python -m pytest -s tests/large/test_compiled_switches.py

prepare-200mb: install
	$(BIN)/python -m pytest -s tests/large/test_prepare_200mb.py

quickstart: install data/quickstart/val/index.json
	$(BIN)/torchrun --standalone --nproc_per_node 2 -m megatron_depthattn.train configs/quickstart.yaml
	$(BIN)/python tools/convert_checkpoint.py to-hf --checkpoint runs/quickstart/checkpoints --output runs/quickstart/hf --overwrite
	$(BIN)/python tools/convert_checkpoint.py verify --checkpoint runs/quickstart/checkpoints --model runs/quickstart/hf
	$(BIN)/python tools/generate.py --model runs/quickstart/hf --prompt 'def __init__(self' --max-new-tokens 60 --temperature 0.8

# docs/quickstart-loss.svg: the quickstart beside the same run without the mix.
quickstart-loss: quickstart
	$(BIN)/depthattn train quickstart --nproc-per-node 2 run.dir=runs/quickstart-vanilla model.method=vanilla
	$(BIN)/depthattn compare runs/quickstart-vanilla runs/quickstart --figure docs/quickstart-loss.svg

data/quickstart/val/index.json: | install
	$(BIN)/python tools/prepare_data.py --input builtin:python-stdlib --tokenizer train-bpe:2048 \
	    --sequence-length 256 --validation-fraction 0.03 --output data/quickstart

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find megatron_depthattn launch tools tests -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
