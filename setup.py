"""Drives the CMake build of torchops; what the package is stands in pyproject.toml.

Environment variables:
    FORCE_CUDA           1 builds the CUDA kernels or fails, 0 does not; by default they are built where torch
                         is a CUDA build and nvcc is found
    TORCH_CUDA_ARCH_LIST architectures to compile for (default: 8.0;9.0+PTX)
    TORCHOPS_CMAKE_ARGS  further arguments for cmake, e.g. "-DTORCHOPS_TESTS=ON"
    TORCHOPS_TORCH_DIRS  folders of torch packages, separated by colons: a wheel for all of them, of
                         which the import chooses by torch's version (tools/release.sh)
    MAX_JOBS             parallel compile jobs (default: all cores)
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    # It would print the schema of pyproject.toml, whose license it cannot read.
    sys.exit(
        f"torchops needs setuptools >= 77 to build, and this is {setuptools.__version__}: "
        "run 'pip install --upgrade setuptools' and then the same command again."
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

ROOT = Path(__file__).resolve().parent


def version_of(torch: str) -> str:
    """'2.13.0', from the headers: such a torch need not be one that this Python can import."""
    header = Path(torch, "include", "torch", "headeronly", "version.h").read_text()
    return ".".join(re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))


# What TORCHOPS_TORCH_DIRS names: version -> folder.
TORCHES = {version_of(folder): folder for folder in os.environ.get("TORCHOPS_TORCH_DIRS", "").split(":") if folder}


def torch_requirement() -> str:
    if not TORCHES:
        return "torch>=2.11"
    # pip is not to install beside a wheel what the wheel has no library for.
    versions = sorted([int(number) for number in version.split(".")] for version in TORCHES)
    oldest, newest = versions[0], versions[-1]
    return f"torch>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"


class CMakeBuild(build_ext):
    """Builds no extension module, but the library that the import loads and what goes with it."""

    def run(self) -> None:
        prefix = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "torchops"
        if TORCHES:
            versions = f"-DTORCHOPS_TORCH_VERSIONS={';'.join(TORCHES)}"
            for version, folder in TORCHES.items():
                self.cmake(ROOT / "build" / f"cmake-torch-{version}", folder, prefix, versions)
            return
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            sys.exit(
                "torchops builds against the torch you have, and this Python has none: "
                "run 'pip install torch' and then 'pip install --no-build-isolation <folder of torchops>'."
            )
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        self.cmake(build, torch.submodule_search_locations[0], prefix)

    def cmake(self, build: Path, torch: str, prefix: Path, *arguments: str) -> None:
        """Configures and compiles in the folder ``build``, and installs below ``prefix``."""
        if shutil.which("cmake") is None:
            sys.exit("torchops needs cmake to build: run 'pip install cmake ninja' and then the same command again.")
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DTORCHOPS_TORCH_DIR={torch}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCHOPS_CUDA={ {'1': 'ON', '0': 'OFF'}.get(os.environ.get('FORCE_CUDA', ''), 'AUTO') }",
            *(["-GNinja"] if shutil.which("ninja") else []),
            *arguments,
            *shlex.split(os.environ.get("TORCHOPS_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (
            configure,
            ["cmake", "--build", str(build), "--parallel", jobs],
            ["cmake", "--install", str(build), "--prefix", str(prefix)],
        ):
            if subprocess.run(command).returncode != 0:
                sys.exit(f"torchops: '{shlex.join(command)}' failed; what went wrong stands above this line.")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """Compiled for a platform, but for no version of Python: the library does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    install_requires=[torch_requirement()],
    # For setuptools to know that there is something to compile, which CMake does.
    ext_modules=[Extension("torchops.libtorchops", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
