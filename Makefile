# `make demo` and `make test` set up everything in .venv themselves; they need Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# Processes that run the tests.
JOBS ?= 2
# What `make check` tests: parts that train nothing.
PURE := tests/test_layers.py tests/audio tests/config/test_sections.py tests/datasets tests/evaluation

.PHONY: demo test test-real check lint docs wheel-test lock clean

demo: $(VENV)/installed
	$(BIN)/musicgenre prepare --config=synthetic
	$(BIN)/musicgenre train --config=synthetic --workdir=$(RUN)
	$(BIN)/musicgenre evaluate --workdir=$(RUN) --split=test

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Needs MUSICGENRE_REAL_DATA, a folder of real clips and arrays; `make test` skips these tests without it.
test-real: $(VENV)/installed
	@test -d "$(MUSICGENRE_REAL_DATA)" || { echo "MUSICGENRE_REAL_DATA names no folder of real data" >&2; exit 2; }
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m real

check: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PURE)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict --quiet

# Builds the wheel, installs it with its dependencies in a fresh environment, and runs the demo from an empty folder.
wheel-test: $(VENV)/installed
	rm -rf build/wheel-test && mkdir -p build/wheel-test/empty
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel-test .
	$(PYTHON) -m venv build/wheel-test/venv
	build/wheel-test/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	build/wheel-test/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps build/wheel-test/*.whl
	cd build/wheel-test/empty && ../venv/bin/musicgenre prepare --config=synthetic \
	  && ../venv/bin/musicgenre train --config=synthetic --workdir=runs/demo \
	  && ../venv/bin/musicgenre evaluate --workdir=runs/demo --split=test

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
	rm -rf $(VENV) build site .pytest_cache .mypy_cache .ruff_cache
