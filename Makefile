# Both `make demo` and `make test` set up everything in .venv by themselves; they need Python 3.11 or newer and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# Processes that run the tests.
JOBS ?= 2

.PHONY: demo test lint lock clean

demo: $(VENV)/installed
	$(BIN)/python experiments/prepare.py --config=configs/synthetic.py
	$(BIN)/python experiments/train.py --config=configs/synthetic.py --workdir=$(RUN)
	$(BIN)/python experiments/evaluate.py --workdir=$(RUN) --split=test

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed, found %d.%d: make PYTHON=..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# The lock names versions only, so that any index can serve them.
lock: $(VENV)/installed
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url --upgrade \
	  --output-file requirements.lock pyproject.toml
	! grep -n '://' requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
