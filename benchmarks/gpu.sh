#!/usr/bin/env bash
# make gpu: everything that wants a GPU, in parts that each end within 9 minutes. Downloads nothing.
# usage: gpu.sh OUT [PART]; without a part, all of them. Settings are environment variables:
#   BATCH (64) and DTYPE (float32, or bfloat16)  of step and the three compile parts
#   OP (mixed_sum)                               of kernels-compile
#   DATA (FILE.npz of CIFAR-10)                  of search, with
#   METHOD (noisy-darts)                         its method
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: gpu.sh OUT [PART]} part=${2:-all}
python=${PYTHON:-python3}
batch=${BATCH:-64} dtype=${DTYPE:-float32} op=${OP:-mixed_sum}
data=${DATA:-} method=${METHOD:-noisy-darts}
parts=(build tests sanitizer roofline kernels kernels-compile step compile compile-max compile-cell
  paths search predictions)

fail() { echo "make gpu: $1" >&2; exit 2; }
need() { fail "needs $1"; }

have_gpu() {
  { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1 ||
    need "an NVIDIA GPU with its driver (nvidia-smi lists none)"
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    need "a $python whose torch sees the GPU"
}

# modules NAME...: what is imported; nothing is installed.
modules() {
  local missing
  missing=$("$python" -c 'import sys, importlib.util as u
print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))' "$@")
  [ -z "$missing" ] || need "these modules in $python, and downloads nothing: $missing"
}

bench() { # NAME ARGUMENTS...: a suite into NAME.csv, and its plot
  local name=$1 status=0
  shift
  modules numpy typer rich yaml matplotlib
  timeout 520 "$python" -m fastnas bench "$@" --device cuda --out "$out/$name.csv" 2>&1 |
    tee "$out/$name.log" || status=$?
  [ "$1" = roofline ] || [ ! -e "$out/$name.csv" ] ||
    "$python" -m fastnas.benchmarks.harness.plot "$out/$name.csv" "$out/$name.png" || true
  return "$status"
}

# Installed in place: kernels/ and benchmarks/ are packages of fastnas only then.
build() {
  command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
    need "nvcc, on PATH or in /usr/local/cuda/bin"
  modules pybind11 setuptools
  FASTNAS_BUILD=cuda timeout 520 "$python" -m pip install --no-build-isolation --no-deps -e . 2>&1 |
    tee "$out/build.log" | tail -3
}

tests() {
  modules pytest hypothesis numpy typer rich yaml matplotlib networkx sklearn
  # A fault is told by the kernel that it happened in, not by whichever test comes next.
  FASTNAS_CUDA_SYNC=1 timeout 520 "$python" -m pytest -m gpu -q -rs --durations=10 2>&1 | tee "$out/tests.log"
}

# Without torch's caching allocator, which hides from the tool what lies outside a tensor. Our own
# kernels only: torch's reductions race on purpose.
sanitizer() {
  local tool sanitize
  sanitize=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) ||
    need "compute-sanitizer (it comes with the CUDA toolkit), on PATH or in /usr/local/cuda/bin"
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 260 "$sanitize" --tool "$tool" --error-exitcode 1 \
      --kernel-regex kns=fastnas --kernel-regex kns=mixed_ \
      "$python" -m fastnas.benchmarks.sanitize 2>&1 | tee "$out/$tool.log"
  done
}

roofline() {
  bench roofline roofline
  "$python" -m fastnas.benchmarks.harness.stock "$out/stock.json"
}

kernels() { bench kernels ops --skip compile; }
kernels-compile() { bench "kernels-$op" ops --op "$op"; }

steps() { bench "$1-$batch-$dtype" search --batch "$batch" --dtype "$dtype" "${@:2}"; }
step() { steps step --skip compile,compile-graph; }
compile() {
  steps compile --compile-seconds 240 --only \
    compile,compile-graph,compile-nchw,compile-nchw-graph,eager-graph,fastnas-graph,fastnas-fast-graph
}
compile-max() {
  steps compile-max --compile-seconds 240 --only \
    compile-max,compile-max-graph,compile-max-nchw,compile-max-nchw-graph,fastnas-graph
}
compile-cell() {
  steps compile-cell --compile-seconds 240 --only \
    compile-cell,compile-cell-graph,compile-graph,fastnas-graph
}

paths() { bench paths paths; }

search() {
  [ -n "$data" ] || need "DATA=FILE.npz, the images of CIFAR-10, for the search"
  modules numpy typer rich yaml matplotlib networkx
  timeout 530 "$python" -m fastnas.benchmarks.search.whole "$data" "$out" --method "$method" \
    --seconds 510
}

predictions() {
  local files=()
  for file in "$out"/*.csv "$out/stock.json"; do [ ! -e "$file" ] || files+=("$file"); done
  "$python" -m fastnas.benchmarks.predictions "${files[@]}" | tee "$out/predictions.md"
}

all() { # each part in a process of its own: one that fails does not end the others
  local failed=() name
  one() { bash benchmarks/gpu.sh "$out" "$1" || failed+=("$1${2:+ $2}"); }
  for name in build tests sanitizer roofline kernels kernels-compile; do one "$name"; done
  for name in step compile compile-max compile-cell; do
    for dtype in float32 bfloat16; do
      for batch in 64 256; do BATCH=$batch DTYPE=$dtype one "$name" "$batch $dtype"; done
    done
  done
  one paths
  if [ -n "$data" ]; then
    for method in noisy-darts rome; do METHOD=$method one search "$method"; done
  else
    echo "no search: DATA=FILE.npz names its images"
  fi
  one predictions
  [ ${#failed[@]} = 0 ] || { printf 'make gpu: this part failed: %s\n' "${failed[@]}" >&2; exit 1; }
}

[[ " ${parts[*]} all " == *" $part "* ]] || fail "unknown part '$part'; allowed: ${parts[*]}, all"
[ "$part" = predictions ] || have_gpu
mkdir -p "$out"
"$part"
