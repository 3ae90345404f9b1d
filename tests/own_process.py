"""Processes of their own: pytest with another library or environment, and memory filled with NaN."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torchops

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
# What a test records under contract.EXECUTED when its memory is filled with NaN by tests/cpp/poison.cpp.
POISONED = "poisoned memory"
POISON = BUILD / "tests" / "cpp" / "libpoison.so"


def poison_memory_of_new_processes() -> None:
    """The workers of pytest-xdist first of all, and the processes that they start."""
    if POISON.exists():
        os.environ.setdefault("LD_PRELOAD", str(POISON))


def is_poisoned() -> bool:
    return str(POISON) in Path("/proc/self/maps").read_text()


def unpoisoned() -> dict[str, str]:
    """The environment for a process that measures its memory, or checks it by itself."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def package_with(library: Path, folder: Path) -> Path:
    """A copy of the package around another build of its library; the folder it lies in."""
    assert library.exists(), f"no {library}: build with TORCHOPS_CMAKE_ARGS=-DTORCHOPS_TESTS=ON"
    package = folder / "torchops"
    shutil.copytree(Path(torchops.__file__).parent, package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (package / "lib").mkdir()
    shutil.copy(library, package / "lib")
    return folder


def run_pytest(*arguments: str, environment: Mapping[str, str], folder: Path | None = None) -> str:
    """What it printed. python -m looks for the package in the folder first, then for the examples."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    print(run.stdout.splitlines()[-1])
    return run.stdout
