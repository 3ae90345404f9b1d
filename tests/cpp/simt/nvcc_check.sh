#!/usr/bin/env bash
# Compiles the sample kernels, and with them every function of core/cuda/device.cuh, with nvcc: warnings
# and spilled registers are errors. Prints each kernel's use of registers. Needs neither torch nor a GPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
nvcc=${1:-nvcc}
object=$(mktemp)
trap 'rm -f "$object"' EXIT
for architecture in sm_80 sm_90; do
  echo "$architecture"
  "$nvcc" -std=c++20 -O3 -arch=$architecture -I "$here/../../../csrc" -I "$here" --Werror all-warnings \
    -Xcompiler -Wall,-Wextra,-Werror -Xptxas --verbose,--warn-on-spills,--warning-as-error \
    -c "$here/nvcc_check.cu" -o "$object" 2>&1 |
    sed -n "s/.*Compiling entry function '\([^']*\)'.*/\1/p; s/.*Used \(.*\)/    \1/p; /error\|warning/p" | c++filt -p
done
