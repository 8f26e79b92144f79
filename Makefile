# Everything starts here; each target does what it needs first, and does nothing twice.
PYTHON ?= python3
VENV   ?= .venv
# Another set of extras: make install EXTRAS=train,sweep,eval,quant,dev (a stamp per set, so a change reinstalls).
EXTRAS ?= train,sweep,eval,dev
# lmms-eval without its own pins (see pyproject.toml). Empty it, with EXTRAS=...,eval-full, to take lmms-eval's dependencies too.
LMMS_EVAL ?= lmms-eval==0.7.3
FLOOR  ?= transformers==5.17.0

PIP    = $(VENV)/bin/python -m pip --disable-pip-version-check
comma := ,
STAMP  = $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
VENV_FLOOR = .venv-floor

.DEFAULT_GOAL := help
.PHONY: help install demo test check test-floor tiny clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create .venv with everything (about two minutes; nothing to do the second time)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vzip needs Python >= 3.11 and '$(PYTHON)' is older: make install PYTHON=python3.11"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e '.[$(EXTRAS)]'
	$(if $(LMMS_EVAL),$(PIP) install -q --no-deps -c constraints.txt '$(LMMS_EVAL)')
	@touch $@

demo: install  ## evaluate the built-in model on its benchmark and print the table (no network, no GPU)
	$(VENV)/bin/python -m vzip demo

test: install  ## the fast tests
	$(VENV)/bin/python -m pytest

check: install  ## ruff, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# huggingface-hub<2 and everything else that transformers' floor wants is left to pip: no constraints file here but torch's line.
test-floor: $(VENV_FLOOR)/.installed  ## the fast tests with the oldest transformers supported, in a second environment
	$(VENV_FLOOR)/bin/python -m pytest

$(VENV_FLOOR)/.installed: pyproject.toml constraints.txt
	test -x $(VENV_FLOOR)/bin/python || $(PYTHON) -m venv $(VENV_FLOOR)
	grep -vE '^transformers==' constraints.txt > $(VENV_FLOOR)/constraints.txt
	echo '$(FLOOR)' >> $(VENV_FLOOR)/constraints.txt
	$(VENV_FLOOR)/bin/python -m pip --disable-pip-version-check install -q -c $(VENV_FLOOR)/constraints.txt -e '.[$(EXTRAS)]'
	$(if $(LMMS_EVAL),$(VENV_FLOOR)/bin/python -m pip --disable-pip-version-check install -q --no-deps '$(LMMS_EVAL)')
	@touch $@

tiny: install  ## train the built-in model again, data and weights, from its seed (106 minutes on two shared cores)
	$(VENV)/bin/python -m vzip.demo.train_tiny

clean:  ## remove the environments and caches; runs/ stays
	rm -rf .venv .venv-floor build dist .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
