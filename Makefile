# Each target sets up what it needs by itself in .venv; nothing has to be installed before but git, make and Python.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# One thread for each test process: tests are many and small.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg
# The packages of other training stacks, whose pins fight ours: an environment of their own that borrows the rest of $(VENV).
STACKS := $(VENV)-stacks
STACK_TESTS := tests/export/test_torchtitan.py tests/export/test_megatron.py tests/export/test_olmo.py tests/export/test_optax.py

.PHONY: demo test slow stacks check docs wheel clean postgresql

demo: $(VENV)/.kernel
	$(BIN)/mue demo

test: $(VENV)/.dev | postgresql
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --durations=25
	$(MAKE) --no-print-directory stacks

stacks: $(STACKS)/.done
	$(TEST_ENV) MUE_STACKS=1 $(STACKS)/bin/python -m pytest -m stacks --disable-warnings $(STACK_TESTS)

slow: $(VENV)/.dev | postgresql
	$(TEST_ENV) $(BIN)/python -m pytest -n auto -m slow --timeout 1800

# A server that the tests start and stop themselves, on loopback. Where it cannot be installed those tests fail and say so.
postgresql:
	@if command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  echo "installing Debian's postgresql for the tests of sweeps on many machines"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql >/dev/null \
	    || echo "PostgreSQL could not be installed: the tests that need it will fail"; \
	else \
	  echo "PostgreSQL is missing, and the tests that need it will fail: sudo apt-get install postgresql"; \
	fi

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# site/index.html; a warning fails. (The variable silences what the theme says of its own successor.)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@ls site/index.html

# dist/mue-VERSION-py3-none-any.whl; `pip install 'dist/….whl[lab]'` puts it into an environment of yours.
wheel: | $(BIN)/python
	rm -rf build  # what an earlier build left there would be packed, too
	$(BIN)/python -m pip --disable-pip-version-check wheel -q --no-deps -w dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) $(STACKS) runs build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "mue needs Python 3.11 or newer; none was found (set PYTHON=/path/to/python)"; exit 1; }
	@echo "setting up $(VENV) (PyTorch is a large download; only the first time)"
	$(PYTHON) -m venv $(VENV)

# torch first and alone: pip then takes the pinned build and not whatever another package would pull in.
$(VENV)/.lab: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[lab]'
	@touch $@

# The native kernel, where there is a C++ compiler; everything works without it.
$(VENV)/.kernel: $(wildcard src/mue/kernels/csrc/*.cpp src/mue/kernels/csrc/*.h) | $(VENV)/.lab
	$(BIN)/python -c "from mue.moe.backends.native import main; main()"
	@touch $@

$(VENV)/.dev: $(VENV)/.lab
	$(PIP) -e '.[lab,cluster,hf,images,diffusers,dev]'
	$(PIP) --no-deps mup  # an oracle of the tests; its own requirements would bring torchvision and another torch
	@touch $@

$(VENV)/.docs: $(VENV)/.lab
	$(PIP) -e '.[lab,docs]'
	@touch $@

$(STACKS)/.done: constraints-stacks.txt $(VENV)/.dev
	rm -rf $(STACKS)
	$(BIN)/python -m venv --without-pip $(STACKS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$($(STACKS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of-venv.pth
	$(STACKS)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r constraints-stacks.txt
	@touch $@
