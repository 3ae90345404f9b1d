#!/usr/bin/env bash
# Compiles and links the CUDA half without a GPU and without a CUDA build of torch in the environment: against
# the headers and libraries of one, unpacked into a cache (about 1 GB, once). Warnings are errors; prints what
# nvcc says of each kernel and fails if one spills registers.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null; then
  echo "nvcc was not found: the CUDA kernels are NOT compiled here."
  exit 0
fi
torch=$(tools/fetch_torch.sh "${TORCHOPS_CUDA_TORCH:-torch==2.11.0}")

# From nothing, so that the log has every kernel.
log=build/cuda.log
rm -rf build/cuda && mkdir -p build
cmake -S . -B build/cuda -GNinja -DTORCHOPS_TORCH_DIR="$torch" -DTORCHOPS_CUDA=ON -DTORCHOPS_WERROR=ON \
  >"$log" 2>&1 && cmake --build build/cuda >>"$log" 2>&1 || { tail -n 60 "$log"; exit 1; }
python3 - "$log" <<'PY'
import re, subprocess, sys
found = re.findall(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    open(sys.argv[1]).read(), flags=re.DOTALL)
names = subprocess.run(["c++filt", *[row[0] for row in found]], capture_output=True, text=True, check=True).stdout
for name, (_, target, stores, loads, registers) in sorted(zip(names.splitlines(), found)):
    short = re.sub(r"\(.*", "", name.replace("(int)", "")).replace("torchops::kernels::", "").removeprefix("void ")
    print(f"{target} {registers:>4} registers, spilled {int(stores) + int(loads):3} bytes  {short}")
spilling = sum(int(stores) + int(loads) > 0 for _, _, stores, loads, _ in found)
print(f"{len(found)} kernels compiled, {spilling} of them spill registers")
sys.exit(not found or spilling > 0)
PY
