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
torch=${TORCHOPS_CUDA_TORCH:-torch==2.11.0}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/torchops/$torch
if [ ! -e "$cache/complete" ]; then
  rm -rf "$cache" && mkdir -p "$cache"
  python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$cache" "$torch"
  python3 - "$cache" <<'PY'
import sys, zipfile
from pathlib import Path
cache = Path(sys.argv[1])
wheel = next(cache.glob("*.whl"))
libraries = ("libc10.so", "libc10_cuda.so", "libtorch_cpu.so", "libgomp")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.startswith("torch/include/") or (name.startswith("torch/lib/") and Path(name).name.startswith(libraries)):
            archive.extract(name, cache)
wheel.unlink()
PY
  touch "$cache/complete"
fi

# From nothing, so that the log has every kernel.
log=build/cuda.log
rm -rf build/cuda && mkdir -p build
cmake -S . -B build/cuda -GNinja -DTORCHOPS_TORCH_DIR="$cache/torch" -DTORCHOPS_CUDA=ON -DTORCHOPS_PYTHON=OFF \
  -DTORCHOPS_WERROR=ON >"$log" 2>&1 && cmake --build build/cuda >>"$log" 2>&1 || { tail -n 60 "$log"; exit 1; }
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
