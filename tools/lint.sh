#!/usr/bin/env bash
# Formatting, lint and types: `lint.sh <python> check` reports, `lint.sh <python> fix` repairs.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(dirname "$("$1" -c 'import sys; print(sys.executable)')")
mapfile -t sources < <(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
if [ "$2" = fix ]; then
  "$bin/ruff" check --fix --quiet .
  "$bin/ruff" format --quiet .
  "$bin/clang-format" -i "${sources[@]}"
else
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  "$bin/clang-format" --dry-run --Werror "${sources[@]}"
  "$bin/mypy"
fi
