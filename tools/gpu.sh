#!/usr/bin/env bash
# What only a machine with a GPU can show: builds torchops with CUDA against the torch of the Python in use, runs
# the tests marked cuda, the same kernels under compute-sanitizer, and the benchmarks. Fetches nothing.
#
#   tools/gpu.sh                        every stage
#   tools/gpu.sh build tests            some of them: build, tests, memcheck, racecheck, synccheck, benchmarks
#   OUT=folder tools/gpu.sh             where logs and benchmark results go (default: build/gpu)
#   WHEELS=folder tools/gpu.sh build    wheels of what the machine lacks (expecttest, hypothesis, rich)
#   PYTEST_ADDOPTS="-k graph" tools/gpu.sh tests
#   TORCHOPS_CMAKE_ARGS=-DCMAKE_BUILD_TYPE=Debug tools/gpu.sh build tests    kernels that check their data
#
# A stage goes on where another one failed; the summary says which did.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}

build() {
  if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --no-index --find-links "$WHEELS" expecttest hypothesis rich || return
  fi
  # For this GPU alone, which halves the time.
  local arch='import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))'
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c "$arch" 2>/dev/null)}
  FORCE_CUDA=${FORCE_CUDA:-1} "$python" -m pip install --no-build-isolation --no-deps --no-index -v -e . &&
    "$python" -c "import torchops; torchops.show_config()"
}

tests() {
  "$python" -m pytest -m cuda -p no:cacheprovider --durations=15
}

# Every operator forward and backward on all of its samples, and on bad data. Without torch's allocator, which hands
# out parts of larger blocks: what lies behind a tensor would count as allocated.
sanitizer() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 99 \
    "$python" -m pytest -q -p no:cacheprovider -k "no_synchronisation or bad_data" tests/test_cuda.py
}

benchmarks() {
  local families=(torchops/benchmarks/[a-z]*.py) family status=0
  for family in "${families[@]}"; do
    "$python" -m torchops bench "$(basename "$family" .py)" --device cuda --no-plot || status=1
  done
  cp docs/figures/*-cuda-*.json "$out" || status=1
  return $status
}

# Why a stage cannot run here, or nothing.
obstacle() {
  if [ "$1" != build ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "torch finds no CUDA device"
    return
  fi
  case $1 in
    *check) command -v compute-sanitizer >/dev/null || echo "compute-sanitizer was not found" ;;
    benchmarks) "$python" -c "import rich" 2>/dev/null || echo "rich is not installed" ;;
  esac
}

summary=()
failed=0
for stage in "${@:-build tests memcheck racecheck synccheck benchmarks}"; do
  for name in $stage; do
    case $name in
      build | tests | benchmarks) run=("$name") ;;
      memcheck | racecheck | synccheck) run=(sanitizer "$name") ;;
      *) echo "no stage $name" && exit 2 ;;
    esac
    printf '\n===== %s\n' "$name"
    start=$SECONDS
    if reason=$(obstacle "$name") && [ -n "$reason" ]; then
      result="skipped: $reason"
    elif "${run[@]}" 2>&1 | tee "$out/$name.log"; then
      result=passed
    elif grep -q "Device not supported" "$out/$name.log"; then
      result="skipped: compute-sanitizer does not support this device"
    else
      result="FAILED, see $out/$name.log"
      failed=1
    fi
    summary+=("$(printf '%-10s %5d s  %s' "$name" $((SECONDS - start)) "$result")")
  done
done
printf '\n===== summary\n'
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
