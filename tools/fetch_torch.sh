#!/usr/bin/env bash
# Headers and libraries of a version of torch, to compile against without installing it: downloads its wheel without what
# it depends on (half a gigabyte for a CUDA build), unpacks what is needed into a cache, once, and prints the folder.
#   tools/fetch_torch.sh torch==2.11.0
set -euo pipefail
torch=$1
python=${PYTHON:-python3}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/torchops/$torch
if [ ! -e "$cache/complete" ]; then
  rm -rf "$cache" && mkdir -p "$cache"
  "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$cache" "$torch" >&2
  "$python" - "$cache" <<'PY'
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
echo "$cache/torch"
