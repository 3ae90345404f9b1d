"""The CUDA floor, host layers and kernels, without a GPU: the contract in a process in which g++ has compiled it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cuda_on_host
import pytest
from contract import CUDA_ON_HOST, EXECUTED

import torchops

TESTS = Path(__file__).parent
PACKAGE = Path(torchops.__file__).parent
LIBRARY = (
    TESTS.parent / "build" / f"cmake-{sys.implementation.cache_tag}" / "tests" / "cpp" / "on_host" / "libtorchops.so"
)
# What depends on the device: numbers, memory layouts, launches.
TO_RUN = (
    "matches_reference or same_bits or layout or expanded or meta_has or launches or rounding or copy or overflows"
    " or summed_in"
)

pytestmark = [
    pytest.mark.skipif(cuda_on_host.ACTIVE, reason="this is the process that was started"),
    pytest.mark.skipif(torchops._build.CUDA_VERSION != "", reason="this build has its CUDA floor on the GPU"),
]


def test_cuda_floor(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    assert LIBRARY.exists(), f"no {LIBRARY}: build with TORCHOPS_CMAKE_ARGS=-DTORCHOPS_TESTS=ON"
    package = tmp_path / "torchops"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (package / "lib").mkdir()
    shutil.copy(LIBRARY, package / "lib")
    files = [str(TESTS / name) for name in ("test_contract.py", "test_launches.py", "test_tokens.py", "test_stf.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", TO_RUN, "-p", "no:cacheprovider", *files],
        env={key: value for key, value in os.environ.items() if key != "TORCHOPS_CPU_CAPABILITY"},
        cwd=tmp_path,  # python -m looks there first
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-5000:]
    print(run.stdout.splitlines()[-1])
    record_property(EXECUTED, CUDA_ON_HOST)
