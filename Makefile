# Thin: every target calls one tool. `make install` runs by itself before the others.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is pinned here and nowhere else; the package itself allows torch>=2.13.
TORCH := torch==2.13.0
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
# The CUDA build has an environment and a copy of the sources of its own: it needs another torch.
CUDA_VENV := .venv-cuda
CUDA_TORCH := torch==2.14.1
CUDA_SOURCES := build/cuda-src
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
FORMATTED := $(shell git ls-files '*.h' '*.cpp' '*.c' '*.cu' '*.cuh')

.PHONY: install train test verify-matrix check bench sanitize cuda-build gpu kernels-full clean

install: $(BUILT)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel ninja pybind11 numpy
	$(BIN)/python -m pip install -q $(TORCH)
	touch $@

$(BUILT): $(INSTALLED) setup.py $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[train,bench,dev]"
	touch $@

train: install  ## the main job: four ranks learn the standard library's sources
	$(BIN)/pypar train --dp 2 --tp 2 --zero 1

test: check  ## every test, the long ones included
	$(BIN)/python -m pytest tests --junitxml=build/tests.xml

verify-matrix: install  ## every plan against one process, 20 minutes; writes docs/matrix.md
	$(BIN)/python tests/hybrid/matrix.py --docs docs/matrix.md

check: install  ## format, lint, types, layering: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

bench: install  ## tables on the terminal, rows and charts in bench/results
	$(BIN)/python -m bench
	$(BIN)/python -m bench.bench_train --model small large --steps 5
	$(BIN)/python -m bench.bench_train_tp --model small large --steps 5
	$(BIN)/python -m bench.bench_train_zero --model small large --steps 5
	$(BIN)/python -m bench.bench_zero_step --sizes 16M,164M
	$(BIN)/python -m bench.bench_hosts_overlap --widths 1024 2048 --rounds 3
	$(BIN)/python -m bench.bench_zero_memory
	$(BIN)/python -m bench.bench_estimate
	$(BIN)/python -m bench.bench_train_pp --model small large --steps 5
	$(BIN)/python -m bench.bench_ring_send
	$(BIN)/python -m bench.bench_train_hybrid --steps 5

sanitize: install  ## the core under ThreadSanitizer and AddressSanitizer
	$(BIN)/python -m pytest tests/native -k sanitizer

$(CUDA_VENV)/.installed:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -q --upgrade pip "setuptools>=77" wheel ninja pybind11 numpy
	$(CUDA_VENV)/bin/python -m pip install -q $(CUDA_TORCH)
	touch $@

cuda-build: $(CUDA_VENV)/.installed  ## compiles, links and imports the CUDA part; needs nvcc, no GPU
	mkdir -p $(CUDA_SOURCES)
	git ls-files -z | xargs -0 cp -du --preserve=timestamps --parents -t $(CUDA_SOURCES)
	PYPAR_CUDA=1 $(CUDA_VENV)/bin/python -m pip install -q --no-build-isolation --no-deps ./$(CUDA_SOURCES)
	cd build && ../$(CUDA_VENV)/bin/python ../tests/kernels/import_cuda.py

kernels-full: install  ## the GPU kernels on CPU ranks: more ranks and rounds than `make test` has
	PYPAR_KERNELS_FULL=1 $(BIN)/python -m pytest tests/kernels --junitxml=build/kernels.xml
	$(BIN)/python tests/kernels/page.py build/kernels.xml --docs docs/kernels.md

gpu: install  ## on a machine with GPUs: suite, compute-sanitizer, times, one report in bench/results/gpu
	$(BIN)/python -m bench.gpu

clean:
	rm -rf build pypar/*.so *.egg-info $(BUILT)
