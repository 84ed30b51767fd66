# make demo | test | slow | bench | lint | types | clean. Needs Python 3.10 or newer, pip and git; all else goes into .venv.
# Another interpreter: make test PYTHON=python3.12. Arguments for the script or the test runner: make test ARGS='-k sinks'.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test slow bench lint types clean

demo: $(READY)
	$(BIN)/python examples/digits.py $(ARGS)

test: $(READY)
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest $(ARGS)

slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(READY)
	set -e; for script in benchmarks/bench_*.py; do echo "$$script"; $(BIN)/python "$$script" $(ARGS); done

lint: $(READY)
	$(BIN)/python -m ruff check

types: $(READY)
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Torch first: the largest download by far, and a broken one should fail before anything else is done.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
