# Everything is installed into .venv beside this file; nothing else on the machine is changed.
#
#   make demo    the quick example          make demo DEMO_ARGS='--help'
#   make test    every check                make test PYTEST_ARGS='-k posterior'
#   make docs    the documentation, into site/
#   make bench   speed and memory against the paper's formulas and plain training
#   make clean   removes .venv and everything that was built
#
# Another interpreter than python3: make demo PYTHON=python3.12

SHELL := /bin/sh
PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 8

VENV := .venv
# Tools are run as modules: a console script carries an absolute path, which a moved folder breaks.
PY := $(VENV)/bin/python

# Advertisements in the output of every run hide what it has to say.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1
# Older versions of mypy do not know it, and take one.
export MYPY_NUM_WORKERS := 2

.PHONY: demo test docs bench clean
.DELETE_ON_ERROR:
# Two installations at once would spoil the one environment.
.NOTPARALLEL:

demo: $(VENV)/installed-demo
	$(PY) -m examples.demo $(DEMO_ARGS)

bench: $(VENV)/installed-examples
	$(PY) -m examples.benchmark $(BENCH_ARGS)

docs: $(VENV)/installed-docs
	$(PY) -m mkdocs build --strict

test: $(VENV)/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
# These build the documentation too, strictly (tests/test_site.py).
	$(PY) -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the virtual environment ---------------------------------------------------------------------

# The environment serves if its interpreter starts, is recent enough and has pip, and if no
# installation into it was cut short (pip takes a half-copied package for an installed one).
SERVES = [ ! -e $(VENV)/installing ] && $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1

# An environment that no longer serves, or was made elsewhere (the editable install names the folder),
# is seen to again whatever its stamps say.
ifneq ($(shell $(SERVES) && [ "$$(cat $(VENV)/ready 2>/dev/null)" = "$$(pwd)" ] && echo yes),yes)
.PHONY: $(VENV)/ready
endif

$(VENV)/ready:
	@$(SERVES) || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || { \
	    echo "bayesagg needs Python 3.10 or newer; '$(PYTHON)' is $$({ $(PYTHON) --version; } 2>/dev/null || echo missing)." >&2; \
	    echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	    exit 1; }; \
	  echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	  rm -rf $(VENV); \
	  $(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs: apt install python3-venv" >&2; \
	    exit 1; }; \
	}
	@pwd > $@

$(VENV)/installed-demo: EXTRAS := demo
$(VENV)/installed-examples: EXTRAS := examples
$(VENV)/installed-docs: EXTRAS := examples,docs
$(VENV)/installed-test: EXTRAS := examples,loops,test,docs
# Only a data file of it is read, and its requirements (an old ray, colorama 0.4.4) fit no other's.
$(VENV)/installed-examples $(VENV)/installed-docs $(VENV)/installed-test: ALONE := recbole==1.2.1

$(VENV)/installed-%: pyproject.toml $(VENV)/ready
	@echo "Installing bayesagg[$(EXTRAS)] into $(VENV); the first time, PyTorch makes this a download of several minutes"
	@touch $(VENV)/installing
	@$(PY) -m pip install --no-compile --editable '.[$(EXTRAS)]' && \
	  { [ -z '$(ALONE)' ] || $(PY) -m pip install --no-compile --no-deps $(ALONE); }; status=$$?; rm -f $(VENV)/installing; exit $$status
# As pip would, but on all cores and without what nothing here imports. Files that are no Python of
# this version (templates) are as pip leaves them.
	@$(PY) -m compileall -qq -j 0 -x '/tests?/|/transformers/models/' $(VENV) >/dev/null 2>&1 || true
	@touch $@
