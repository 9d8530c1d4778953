#!/usr/bin/env bash
# make gpu: build in place against this machine's python and torch, test, benchmark. Downloads nothing.
# usage: gpu.sh OUT [build|tests|bench]; without a part, all three. Each part ends within 9 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 part=${2:-all}
python=${PYTHON:-python3}

need() { echo "make gpu needs $1" >&2; exit 2; }
command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || need "an NVIDIA GPU with its driver (nvidia-smi lists none)"
command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || need "nvcc, on PATH or in /usr/local/cuda/bin"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || need "a $python whose torch sees the GPU"
"$python" -c 'import pybind11' || need "pybind11 in $python"
mkdir -p "$out"

# Installed in place: kernels/ and benchmarks/ are packages of fastnas only then.
build() { FASTNAS_BUILD=cuda "$python" -m pip install --no-build-isolation --no-deps -e . 2>&1 | tee "$out/build.log" | tail -3; }
tests() { timeout 520 "$python" -m pytest -m gpu -q -rs 2>&1 | tee "$out/tests.log"; }
bench() { timeout 520 "$python" -m fastnas bench ops --device cuda --out "$out/ops.csv" 2>&1 | tee "$out/bench.log"; }

case $part in
  build) build ;;
  tests) tests ;;
  bench) bench ;;
  all) build && tests && bench ;;
  *) echo "gpu.sh: unknown part '$part'; build, tests and bench are allowed" >&2; exit 2 ;;
esac
