# make demo: a real model over every GPU (or two software devices). make test: the whole test suite.
# make wheel: a wheel for other machines, in dist/.
# Each sets up what it needs: system packages (as root on Debian or Ubuntu), a venv, the libraries, the model.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Marks of finished installations: the dependencies of the package, and those of its development.
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# make smoke: the tests that take under a minute, on the CPU alone.
.PHONY: demo test test-all smoke check docs fuzz bench wheel setup clean

demo: setup
	$(BIN)/python examples/demo.py

# Two tests at a time: compiling shaders and most of the tests take one processor each.
test: $(DEV) setup check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not nightly"

# With the tests marked nightly.
test-all: $(DEV) setup check
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Under a minute: the CPU alone, no models, no processes.
smoke: $(DEV) setup
	GGML_VK_VISIBLE_DEVICES=99 $(BIN)/python -m pytest -x -p no:cacheprovider \
		-m "not gpu and not model and not slow and not subprocess" tests/test_smoke.py tests/core tests/files tests/scheduler \
		tests/session tests/train tests/viz

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHON=$(CURDIR)/$(BIN)/python ./build_lib.sh --source-only
	$(BIN)/python -m codegen --check
	$(BIN)/mypy

# The site, in docs/_build/index.html. It needs the CPU only.
docs: $(DEV)
	GGML_VK_VISIBLE_DEVICES=99 $(BIN)/python -m sphinx -W --keep-going -n -q docs docs/_build

fuzz: $(DEV) setup
	$(BIN)/python -m benchmarks.fuzz --calls 100000

bench: setup
	$(BIN)/python -m benchmarks.llm

# ARCH=aarch64 compiles for another processor. RELEASING.md tells how a wheel is checked.
ARCH := $(shell uname -m)
wheel: $(DEV)
	PYTHON=$(CURDIR)/$(BIN)/python ./build_lib.sh --portable --arch $(ARCH) --out build/$(ARCH)
	GGML_CFFI_WHEEL_LIBRARIES=$(CURDIR)/build/$(ARCH) $(BIN)/python -m build --wheel --no-isolation
	$(BIN)/auditwheel show dist/*_$(ARCH).whl

setup: $(BASE)
	PYTHON=$(CURDIR)/$(BIN)/python ./build_lib.sh

# pip compiles bytecode with one processor; compileall takes all of them, and leaves out the tests of the packages. Like
# pip, this goes on after a file that does not compile, such as a template.
define install
	PYTHON=$(PYTHON) tools/system.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -e $(1)
	$(BIN)/python -m compileall -q -j 0 -x /tests/ $(VENV)/lib ggml_cffi || true
	touch $(2)
endef

$(BASE): pyproject.toml tools/system.sh
	$(call install,.,$@)

# It has the dependencies of the package too: a goal that needs both asks for this one first.
$(DEV): pyproject.toml tools/system.sh
	PYTHON=$(PYTHON) tools/system.sh --tests
	$(call install,'.[dev]',$(BASE) $@)

clean:
	rm -rf $(VENV) build dist ggml_cffi/lib ggml_cffi/lib.tmp vendor/ggml
