# Two commands on a fresh machine: `make search` and `make test`. Both install what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# libgomp spins for as long as it takes by default: with one other process on the cores, each parallel
# region then costs a scheduler quantum (3.4 ms in place of 0.04 ms, measured).
export GOMP_SPINCOUNT ?= 10000

NATIVE := $(shell find csrc kernels -type f -not -name '*.pyc') CMakeLists.txt MANIFEST.in setup.py pyproject.toml constraints.txt

.PHONY: install search test fuzz sanitize simt stress bench gpu budget lint docs clean

install: $(STAMP)

# torch first and by itself: a range would fetch gigabytes of CUDA packages.
$(STAMP): $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs,search,triton,blackbox,tables]'
	touch $@

# The main job: a NoisyDARTS search on real images; its report is runs/quickstart/report.md.
search: $(STAMP)
	$(BIN)/fastnas search --config quickstart.yaml --resume
	@cat runs/quickstart/report.md

# A worker for each core: what is compiled, interpreted or started anew, most of the time, has one thread.
test: $(STAMP)
	$(BIN)/python -m pytest -n logical --dist worksteal

# Calls of the ops from a seed on, against the fp64 reference, for SECONDS; ARGS="--op mixed_edges" picks.
SECONDS ?= 300
SEED    ?= 0
FUZZ     = $(BIN)/python tests/fuzz/ops.py --seconds $(SECONDS) --seed $(SEED) $(ARGS)
fuzz: $(STAMP)
	$(FUZZ)

# The same on kernels with AddressSanitizer and UBSan. Leaks are those of Python and torch.
sanitize: $(STAMP)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DFASTNAS_SANITIZE=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 $(FUZZ) --module build/sanitize/_C*.so

# The CUDA kernels on the host shim with checks of what a GPU would ask: aligned and defined accesses, then
# races within and between blocks. -s: a misaligned access ends its worker, after a line on stderr.
SIMT ?= tests/ops -k "cuda-host or any_order"
simt: $(STAMP)
	for checks in alignment races; do \
		FASTNAS_HOST_CHECKS=$$checks $(BIN)/python -m pytest -s -n logical --dist worksteal $(SIMT) || exit 1; done

# Damages, interrupts and starts twice what a user runs; fills the disk under it. About 40 minutes.
stress: $(STAMP)
	for script in damage interruptions pairs processes disk_full; do \
		echo "$$script:"; $(BIN)/python tests/stress/$$script.py --seed $(SEED) || exit 1; done

bench: $(STAMP)
	$(BIN)/fastnas bench all

# On a machine with a GPU, nvcc and a python that has torch: builds in place, installs nothing.
# PART picks one part, OUT is the folder of the results; benchmarks/NOTES.md lists parts and settings.
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(or $(OUT),runs/gpu) $(PART)

# What the CUDA kernels cost, counted in their machine code: needs nvcc, but no GPU. The times are a model's.
budget: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fastnas.benchmarks.model budget

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/: without the net; a link or an anchor that leads nowhere fails the build.
docs: $(STAMP)
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf build dist site $(VENV) *.egg-info fastnas/_C*.so fastnas/_cuda*.so
