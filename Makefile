# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first if it is not there.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint

install: $(INSTALLED)

# uv installs PyTorch's gigabytes in a fraction of pip's time; where there is no uv for the platform, pip does it.
$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard src/qvit/kernels/*)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	if $(BIN)/python -m uv --version >/dev/null 2>&1; \
	then $(BIN)/python -m uv pip install --python $(BIN)/python --editable '.[train,dev]'; \
	else $(BIN)/python -m pip install --editable '.[train,dev]'; fi
	touch $@

demo: install
	$(BIN)/qvit demo --out demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest
