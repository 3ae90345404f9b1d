"""What the build says when it cannot go on: one sentence that names the repair."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists() or shutil.which("cmake") is None, reason="needs the sources and cmake"
)


def configure(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), f"-DPython_EXECUTABLE={sys.executable}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def one_line(text: str) -> str:
    """CMake wraps its messages."""
    return " ".join(text.split())


def test_torch_too_old(tmp_path: Path) -> None:
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n#define TORCH_VERSION_PATCH 1\n")
    run = configure(tmp_path, f"-DTORCHOPS_TORCH_DIR={tmp_path / 'torch'}")
    assert run.returncode != 0
    message = one_line(run.stderr)
    assert "torchops needs torch >= 2.11, and" in message
    assert "is 2.10.1: run 'pip install --upgrade torch'" in message


def test_no_torch_in_the_folder(tmp_path: Path) -> None:
    run = configure(tmp_path, f"-DTORCHOPS_TORCH_DIR={tmp_path}")
    assert run.returncode != 0
    assert "holds no torch >= 2.11" in one_line(run.stderr)


@pytest.mark.skipif((TORCH / "lib" / "libc10_cuda.so").exists(), reason="this torch is a CUDA build")
def test_cuda_asked_for_beside_a_cpu_torch(tmp_path: Path) -> None:
    run = configure(tmp_path, f"-DTORCHOPS_TORCH_DIR={TORCH}", "-DTORCHOPS_CUDA=ON")
    assert run.returncode != 0
    assert "is a CPU build: install a CUDA build of torch." in one_line(run.stderr)


@pytest.mark.parametrize(
    "missing, repair",
    [
        ("torch", "pip install torch"),
        ("cmake", "pip install cmake ninja"),
        ("setuptools", "needs setuptools >= 77 to build, and this is 76.1.0: run 'pip install --upgrade setuptools'"),
    ],
)
def test_setup_names_what_is_missing(tmp_path: Path, missing: str, repair: str) -> None:
    environment = dict(os.environ)
    prepare = "import importlib.util as u; u.find_spec = lambda name: None; " if missing == "torch" else ""
    if missing == "setuptools":
        prepare = "import setuptools; setuptools.__version__ = '76.1.0'; "
    if missing != "torch":  # nor does a check that fails to stop it build anything
        environment["PATH"] = str(tmp_path)
    code = (
        f"{prepare}import runpy, sys; sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}];"
        "runpy.run_path('setup.py')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert repair in run.stderr.strip().splitlines()[-1]


def test_setuptools_that_is_asked_for_is_the_one_that_is_checked() -> None:
    assert 'requires = ["setuptools>=77"]' in (ROOT / "pyproject.toml").read_text()
    assert "< 77:" in (ROOT / "setup.py").read_text()
