#!/usr/bin/env bash
# Prepares an environment for a purpose (build, test, examples, bench, docs or lint) and prints the Python to use;
# everything else it has to say goes to standard error.
#
# The environment in use is taken as it is when it has torch >= 2.11; otherwise one is made in .venv,
# with torch==2.13.0 or what the variable TORCH names.
set -euo pipefail
cd "$(dirname "$0")/.."
purpose=$1
exec 3>&1 1>&2

say() { printf '\033[1m%s\033[0m\n' "$*"; }

has_torch() {
  "$1" - <<'PY' 2>/dev/null
import importlib.metadata as m, sys
major, minor = map(int, m.version("torch").split(".")[:2])
sys.exit((major, minor) < (2, 11))
PY
}

python=${PYTHON:-python3}
if ! has_torch "$python"; then
  if [ ! -x .venv/bin/python ]; then
    say "Making an environment in .venv"
    "$python" -m venv .venv
  fi
  python=$PWD/.venv/bin/python
  if ! has_torch "$python"; then
    say "Installing ${TORCH:-torch==2.13.0}"
    "$python" -m pip install --quiet "${TORCH:-torch==2.13.0}" numpy
  fi
fi
PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH"

# Catch2 runs the C++ tests, Boost.Context the fibers that CUDA kernels are executed on there; with ccache, what was
# compiled once is not compiled again, in another clone neither.
missing=()
header() { [ -e "/usr/include/$1" ] || [ -e "/usr/local/include/$1" ]; }
header catch2 || missing+=(catch2)
header boost/context || missing+=(libboost-context-dev)
command -v ccache >/dev/null || missing+=(ccache)
if [ "$purpose" = test ] && [ ${#missing[@]} -gt 0 ]; then
  as_root=$([ "$(id -u)" = 0 ] || echo sudo)
  if command -v apt-get >/dev/null && { [ -z "$as_root" ] || command -v sudo >/dev/null; }; then
    say "Installing ${missing[*]} for the C++ tests"
    $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"
  else
    say "The C++ tests need your system's packages of Catch2, Boost.Context and ccache (on Debian: ${missing[*]})."
    exit 1
  fi
fi

extras=$([ "$purpose" = build ] || echo "[$purpose]")
cmake_args=${TORCHOPS_CMAKE_ARGS:-}
[ "$purpose" = test ] && cmake_args="-DTORCHOPS_TESTS=ON $cmake_args"
"$python" -m pip install --quiet "setuptools>=77" wheel $(command -v cmake >/dev/null || echo cmake) \
  $(command -v ninja >/dev/null || echo ninja)
log=build/install.log
if [ "$purpose" = test ]; then
  say "Building torchops and its C++ tests (a quarter of an hour the first time; $log shows how far it is)"
else
  say "Building torchops (two to four minutes the first time)"
fi
mkdir -p build
if ! TORCHOPS_CMAKE_ARGS="$cmake_args" "$python" -m pip install --no-build-isolation -e ".$extras" -v >"$log" 2>&1; then
  tail -n 60 "$log"
  say "The build failed; the whole log is in $log."
  exit 1
fi

if [ "$purpose" = test ]; then
  # torchvision's wheel may be made for another build of torch; the tests declare what it misses.
  "$python" -m pip install --quiet --no-deps "timm==1.0.31" "torchvision==0.28.0" &&
    "$python" -m pip install --quiet huggingface_hub safetensors pyyaml pillow ||
    say "timm could not be installed: its tests will be skipped."
  "$python" -m pip install --quiet "transformers==5.23.0" "tokenizers==0.23.3" "safetensors==0.8.0" ||
    say "transformers could not be installed: its tests will be skipped."
  "$python" -m pip install --quiet "peft==0.21.2" "accelerate==1.15.0" ||
    say "peft could not be installed: its tests will be skipped."
fi
echo "$python" >&3
