# make speedrun | test | test-slow | serve | lint | bench: each creates .venv and installs what it needs, once.
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment, ARGS="..." adds options. For CUDA 13, once, for
# a new environment: REQUIREMENTS=requirements-cuda13.txt.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
GPU := $(shell if nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ]; then echo yes; fi)
CUDA13 := $(if $(wildcard $(VENV)/installed-requirements-cuda13.txt),requirements-cuda13.txt)
REQUIREMENTS := $(or $(CUDA13),$(if $(GPU),requirements.txt,requirements-cpu.txt))
RUNTIME := $(VENV)/installed-$(REQUIREMENTS)
DEV := $(VENV)/installed-requirements-dev.txt

.PHONY: speedrun test test-slow serve lint bench

speedrun: $(RUNTIME)
	$(PY) run_speedrun.py $(ARGS)

serve: $(RUNTIME)
	$(PY) -m nanochat_jax serve $(ARGS)

test: $(RUNTIME) $(DEV)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(RUNTIME) $(DEV)
	$(PY) -m pytest -m slow -rs $(ARGS)

lint: $(DEV)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

bench: $(RUNTIME)
	$(PY) -m nanochat_jax bench train $(ARGS)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	if command -v uv >/dev/null; then uv venv --python "$(PYTHON)" $(VENV); else "$(PYTHON)" -m venv $(VENV); fi

$(VENV)/installed-%: % requirements-cpu.txt | $(PY)
	if command -v uv >/dev/null; then uv pip install --python $(PY) -r $<; else $(PY) -m pip install -q -r $<; fi
	touch $@
