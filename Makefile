# make train | test | test-all | lint | docs | gpu-check   (ARGS="..." passes flags on to train)

VENV := .venv
ARGS ?=

# With PYTHON=... on the command line nothing is installed: that Python must have the packages.
ifneq ($(origin PYTHON),command line)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
DOCS_READY := $(VENV)/docs-ready
endif

export OMP_NUM_THREADS ?= 1

INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e

.PHONY: train test test-all lint format docs gpu-check goldens overhead

$(VENV)/ready: setup.py constraints.txt
	@python3.12 --version >/dev/null 2>&1 || { echo "megatron_echo needs Python 3.12: put python3.12 on the PATH, then run make again." >&2; exit 1; }
	@echo "Installing into $(VENV), once (about 5.5 GB with PyTorch's CUDA libraries) ..."
	python3.12 -m venv $(VENV)
	$(INSTALL) ".[test,report,dev]"
	@touch $@

$(VENV)/docs-ready: $(VENV)/ready
	$(INSTALL) ".[docs]"
	@touch $@

train: $(READY)
	@$(PYTHON) tools/main_job.py $(ARGS)

test: $(READY) lint
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

test-all: $(READY) lint
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not gpu"

lint: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format: $(READY)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

# The documentation as a site, in site/; it opens from the disk.
docs: $(READY) $(DOCS_READY)
	$(PYTHON) -m mkdocs build --strict

# All three stages, or STAGE=N.
gpu-check: $(READY)
	$(PYTHON) tools/gpu_check.py $(if $(STAGE),--stage $(STAGE)) $(ARGS)

# Records the golden loss curves again and prints what changed.
goldens: $(READY)
	$(PYTHON) tests/functional_tests/record_goldens.py $(ARGS)

# Measures the CPU backend's cost a step and writes it into docs/running.md.
overhead: $(READY)
	$(PYTHON) benchmarks/cpu_backend_overhead.py --write-docs
