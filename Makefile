# `make demo` and `make test` work from a bare clone with Python >= 3.11, pip and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := hatch_build.py simclr_ray/augment/native_build.py simclr_ray/augment/native.c

.PHONY: demo lint check test test-long test-nodes test-faults faults-long audit fuzz soak collapse docs clean

demo: $(STAMP)
	$(BIN)/simclr-ray demo

lint: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/lint

check: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

test: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test

test-long: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test-long

test-faults: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test-faults

faults-long: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/faults-long

audit: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/audit

fuzz: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/fuzz

soak: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/soak

collapse: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/collapse

test-nodes: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test-nodes

# uv only installs: it resolves nothing, since every version and hash stands in the lock file.
# Compiled once: a run starts a dozen processes, and where PYTHONDONTWRITEBYTECODE is set each would
# compile torch and ray for itself. (A few files of theirs are templates, so the exit code is 1.)
# The package is built anew each time, with native.c: uv would take an earlier build of it.
$(STAMP): requirements.lock pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5,<1"
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --reinstall-package simclr-ray --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib simclr_ray >/dev/null 2>&1 || true
	touch $@

docs: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/docs

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
