#!/usr/bin/env bash
# Builds torchops with several versions of torch, each in an environment of its own, and runs the numbers of the contract:
#   tools/torch_versions.sh [VERSION...]
#   WHEEL=<file> tools/torch_versions.sh [VERSION...]   installs that wheel instead of building
# Without arguments the oldest that is supported and the newest that pip installs. Prints a row for each;
# README's table of what is supported comes from here. CPU only: the CUDA half is tools/gpu.sh's.
set -euo pipefail
[ -z "${WHEEL:-}" ] || WHEEL=$(realpath "$WHEEL")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# What pip would install: the newest that is listed may be excluded by constraints.
newest() {
  "$python" -m pip install --quiet --dry-run --ignore-installed --no-deps --report - torch 2>/dev/null |
    "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'
}

# Everything that can go wrong is in the log; the row says at which step it did.
try() {
  local version=$1 folder=$PWD/build/torch-$1
  local source=$folder/source log=$folder/log bin=$folder/venv/bin step how=built
  [ -z "${WHEEL:-}" ] || how=installed
  rm -rf "$folder" && mkdir -p "$source"
  git archive HEAD | tar -x -C "$source"
  {
    step="no such version" && "$python" -m venv "$folder/venv" && "$bin/pip" install -q "torch==$version" &&
      step="environment" && "$bin/pip" install -q numpy pytest expecttest hypothesis "setuptools>=77" wheel &&
      step="not $how" && PATH="$bin:$PATH" FORCE_CUDA=0 \
        "$bin/pip" install -v --no-build-isolation "${WHEEL:-$source}" "torch==$version" &&
      step="import" && (cd "$folder" && "$bin/python" -c "import torchops; torchops.show_config()") &&
      step="tests" && rm -rf "$source/torchops" &&
      (cd "$source" && "$bin/python" -m pytest -q -k "(reference or opcheck) and not float16" tests/test_contract*.py) &&
      step="ok"
  } >"$log" 2>&1 || true
  if [ "$step" = ok ]; then
    printf 'torch %-8s %s, imported, %s\n' "$version" "$how" "$(grep -oE '[0-9]+ passed' "$log" | tail -n 1)"
  else
    printf 'torch %-8s FAILED at: %s (%s)\n' "$version" "$step" "$log"
    return 1
  fi
}

[ $# -gt 0 ] || set -- 2.11.0 "$(newest)"
failed=0
for version in "$@"; do
  try "$version" || failed=1
done
exit $failed
