#!/usr/bin/env bash
# make gpu: everything that wants a GPU, in parts that each end within 9 minutes. Downloads nothing.
# usage: gpu.sh OUT [PART]; without a part, all of them. Settings are environment variables:
#   BATCH (64) and DTYPE (float32, or bfloat16)  of quick, its parts, step and the three compile parts
#   TESTS (tests)                                files and folders of the part tests
#   OP (mixed_sum)                               of kernels-compile
#   DATA (FILE.npz of CIFAR-10)                  of search, with
#   METHOD (noisy-darts)                         its method
#   LIMIT (520)                                  seconds that a command of a part may take
# OUT/results.tar.gz has all results after each part. OUT/kept has what parts need again: the modules
# that were built and the caches of torch.compile and Triton.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: gpu.sh OUT [PART]} part=${2:-all} limit=${LIMIT:-520}
python=${PYTHON:-python3}
batch=${BATCH:-64} dtype=${DTYPE:-float32} op=${OP:-mixed_sum}
data=${DATA:-} method=${METHOD:-noisy-darts}
parts=(quick build smoke step-quick profile predictions step tests sanitizer roofline kernels
  kernels-compile compile compile-max compile-cell paths search)

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

# Names a result that is about to be written; what an earlier run left there gets another name.
fresh() {
  [ ! -e "$out/$1" ] || mv --backup=numbered "$out/$1" "$out/$1.before"
  echo "$out/$1"
}

# Packs everything but what is kept. By way of a file elsewhere: tar minds a folder that changes.
archive() {
  local packed
  packed=$(mktemp)
  tar -C "$out" --exclude=./kept --exclude=./results.tar.gz -czf "$packed" . &&
    mv "$packed" "$out/results.tar.gz"
}

bench() { # NAME ARGUMENTS...: a suite into NAME.csv, and its plot
  local name=$1 status=0
  shift
  modules numpy typer rich yaml matplotlib
  timeout "$limit" "$python" -m fastnas bench "$@" --device cuda --out "$(fresh "$name.csv")" 2>&1 |
    tee "$out/$name.log" || status=$?
  [ "$1" = roofline ] || [ ! -e "$out/$name.csv" ] ||
    "$python" -m fastnas.benchmarks.harness.plot "$out/$name.csv" "$out/$name.png" || true
  return "$status"
}

# For the card that is there alone, a third of the time; installed in place, as kernels/ and
# benchmarks/ are packages of fastnas only then. What was built of the same sources is not built again.
build() {
  command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
    need "nvcc, on PATH or in /usr/local/cuda/bin"
  modules pybind11 setuptools
  local card sources kept wish=cuda
  card=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)
  sources=$({ find csrc CMakeLists.txt setup.py -type f | sort | xargs cat; "$python" -VV; } |
    sha256sum | head -c 12)
  kept=$out/kept/sm_${card/./}-$sources
  # A module that a running process has mapped is replaced, not written over.
  if [ -d "$kept" ]; then cp --remove-destination "$kept"/*.so fastnas/ && wish=python; fi
  FASTNAS_BUILD=$wish FASTNAS_CUDA_ARCHITECTURES=${card/./}-real timeout "$limit" \
    "$python" -m pip install --no-build-isolation --no-deps -e . 2>&1 | tee "$out/build.log" | tail -3
  mkdir -p "$kept" && cp fastnas/_*.so "$kept"
}

gpu_tests() { # NAME FILES...: into NAME.log, side by side where pytest-xdist is there
  local name=$1 workers=()
  shift
  modules pytest hypothesis numpy typer rich yaml matplotlib networkx sklearn
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  # A fault is told by the kernel that it happened in, not by whichever test comes next.
  FASTNAS_CUDA_SYNC=1 timeout "$limit" "$python" -m pytest "$@" -m gpu -q -rs --durations=10 \
    "${workers[@]}" 2>&1 | tee "$out/$name.log"
}
smoke() {
  gpu_tests smoke tests/ops/test_mixed_edges.py tests/benchmarks/test_search_step.py \
    tests/search/test_cuda_graph_on_gpu.py
}
# shellcheck disable=SC2086 # several files, as words
tests() { gpu_tests tests ${TESTS:-tests}; }

# Without torch's caching allocator, which hides from the tool what lies outside a tensor. Our own
# kernels only: torch's reductions race on purpose.
sanitizer() {
  local tool sanitize
  sanitize=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) ||
    need "compute-sanitizer (it comes with the CUDA toolkit), on PATH or in /usr/local/cuda/bin"
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $((limit / 2)) "$sanitize" --tool "$tool" --error-exitcode 1 \
      --kernel-regex kns=fastnas --kernel-regex kns=mixed_ \
      "$python" -m fastnas.benchmarks.sanitize 2>&1 | tee "$out/$tool.log"
  done
}

roofline() {
  bench roofline roofline
  "$python" -m fastnas.benchmarks.harness.stock "$(fresh stock.json)"
}

kernels() { bench kernels ops --skip compile; }
kernels-compile() { bench "kernels-$op" ops --op "$op"; }

steps() { bench "$1-$batch-$dtype" search --batch "$batch" --dtype "$dtype" "${@:2}"; }
step() { steps step --skip compile,compile-graph; }
step-quick() { steps quick --only fastnas-graph,fastnas,eager-graph; }
profile() {
  timeout "$limit" "$python" -m fastnas.benchmarks.profile "$(fresh "profile-$batch-$dtype.csv")" \
    --batch "$batch" --dtype "$dtype" 2>&1 | tee "$out/profile-$batch-$dtype.log"
}
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
  timeout "$((limit + 10))" "$python" -m fastnas.benchmarks.search.whole "$data" "$out" --method "$method" \
    --seconds "$((limit - 10))"
}

predictions() {
  local files=()
  for file in "$out"/*.csv "$out/stock.json"; do [ ! -e "$file" ] || files+=("$file"); done
  "$python" -m fastnas.benchmarks.predictions "${files[@]}" | tee "$out/predictions.md"
}

# Runs a part in a process of its own: one that fails does not end the others.
failed=()
one() { bash benchmarks/gpu.sh "$out" "$1" || failed+=("$1${2:+ $2}"); }
report() {
  [ ${#failed[@]} = 0 ] || { printf 'make gpu: this part failed: %s\n' "${failed[@]}" >&2; exit 1; }
}

# What is worth most, first: under 8 minutes, 425 s of limits and what the parts take to start.
quick() {
  LIMIT=170 one build
  LIMIT=75 one smoke
  LIMIT=120 one step-quick
  LIMIT=60 one profile
  one predictions
  report
}

# Runs a part for both dtypes and both batches.
each_setting() {
  for dtype in float32 bfloat16; do
    for batch in 64 256; do BATCH=$batch DTYPE=$dtype one "$1" "$batch $dtype"; done
  done
}

all() {
  local name
  one quick
  each_setting step
  for name in tests sanitizer roofline kernels kernels-compile; do one "$name"; done
  for name in compile compile-max compile-cell; do each_setting "$name"; done
  one paths
  if [ -n "$data" ]; then
    for method in noisy-darts rome; do METHOD=$method one search "$method"; done
  else
    echo "no search: DATA=FILE.npz names its images"
  fi
  one predictions
  report
}

[[ " ${parts[*]} all " == *" $part "* ]] || fail "unknown part '$part'; allowed: ${parts[*]}, all"
[ "$part" = predictions ] || have_gpu
mkdir -p "$out"
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(realpath "$out")/kept/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(realpath "$out")/kept/triton}
trap archive EXIT
"$part"
