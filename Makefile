# make demo | test | lint | bench: each makes its own .venv and builds the compiled library as needed.
# make bench is a short run of minutes; make bench ARGS='--full --backward' takes hours.
# PYTHON names the interpreter of a new .venv, TORCH what pip installs as torch, EXTRAS the package's extras (with
# cuda-test nvcc comes from PyPI), ARGS what is passed on to the tool.
# The NEOX_KERNELS_* variables (see setup.py) take effect when the library is built: `make build` after `make clean`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= dev
ARGS ?=
BIN := .venv/bin
CSRC := $(shell find csrc -type f -not -name '*.pyc')

.PHONY: demo test lint bench build clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/neox-kernels demo $(ARGS)

test: build
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# laid out as installed, which is the only layout that a type checker understands
	rm -rf build/typecheck
	$(BIN)/python setup.py -q build_py --build-lib build/typecheck
	$(BIN)/mypy
	@if [ -f neox_kernels/_C.so ]; then $(BIN)/torch-abi-audit --check torch neox_kernels/_C.so; \
	else echo "torch-abi-audit: nothing to look at, no compiled library was built here"; fi

bench: build
	$(BIN)/neox-kernels bench $(ARGS)

build: .venv/.built

# The library is compiled in the next step alone, so the install itself leaves it out.
# torch comes first and by itself: the build finds its headers in the environment.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/python -m pip install -q 'setuptools>=77' 'pybind11>=2.13' ninja
	NEOX_KERNELS_EXT=0 NEOX_KERNELS_CUDA=0 $(BIN)/python -m pip install -q --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

.venv/.built: .venv/.installed setup.py $(CSRC)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf build dist *.egg-info neox_kernels/*.so neox_kernels/_build_config.json .venv/.built
