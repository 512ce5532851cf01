# `make help` lists the targets. They install the package into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DALI and faiss for a CPU, or for the CUDA version that the driver reports.
# Drivers of series 610 call it "CUDA UMD Version", earlier ones "CUDA Version".
EXTRA ?= $(shell nvidia-smi 2>/dev/null | awk -F 'CUDA (UMD )?Version: *' \
	'NF > 1 {cuda = int($$2)} END {print (cuda >= 13 ? "cu13" : cuda == 12 ? "cu12" : "cpu")}')
DEMO ?=
TESTS ?= tests
JOBS ?= logical
CLUSTERS ?= 2
KILLS ?= 200
# Tests start hundreds of processes: else each compiles the package anew where this is set, as in many images.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install demo test test-gpu test-slurm soak check bench docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(VENV)/.installed  ## create .venv and install (EXTRA=cpu|cu13|cu12)

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): some minutes and gigabytes, mostly downloads."
	@$(if $(filter cu12,$(EXTRA)),echo "CUDA 12 also needs torch and torchvision for it (README.md, Install).")
	@# editable_mode=compat: `import moce_ds` also finds the package from beside a clone called moce_ds.
	$(BIN)/python -m pip install --config-settings editable_mode=compat --editable ".[$(EXTRA),demo,dev]"
	touch $@

demo: install  ## the whole pipeline on real images, in minutes (DEMO=--short: fewer epochs)
	$(BIN)/python -m moce_ds.cli.workflow.demo $(DEMO)

test: install  ## all tests (TESTS=tests/unit for some), one worker per core (JOBS=1: in one process)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slurm" -n $(patsubst 1,0,$(JOBS)) --maxprocesses 8 --dist loadgroup \
		--no-loadscope-reorder $(TESTS)

test-slurm: install  ## tests on real SLURM clusters of four nodes on this machine (Debian, as root)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm -n $(patsubst 1,0,$(CLUSTERS)) --dist worksteal tests/slurm

test-gpu: install  ## tests that need a GPU, or two; elsewhere they are skipped with the reason
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu

soak: install  ## kill saves, and a run, KILLS=200 times at random; the result must equal that of an uninterrupted run
	KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/checkpoint/test_kill_while_saving.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/distributed/soak.py --kills $(KILLS)

check: install  ## format, lint, types, house rules, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tools.house_rules
	$(BIN)/python -m pytest tests/test_architecture.py

bench: install  ## speed of this machine: loading, expert layers, a training step
	$(BIN)/moce bench load
	$(BIN)/moce bench layer
	$(BIN)/moce bench step

docs: install  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open it: $(BIN)/python -m http.server --bind localhost --directory build/site"

clean:  ## remove .venv and caches (not runs/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
