"""Drives the CMake build of torchops; what the package is stands in pyproject.toml.

Environment variables:
    FORCE_CUDA           1 builds the CUDA kernels or fails, 0 does not; by default they are built where torch
                         is a CUDA build and nvcc is found
    TORCH_CUDA_ARCH_LIST architectures to compile for (default: 8.0;9.0+PTX)
    TORCHOPS_CMAKE_ARGS  further arguments for cmake, e.g. "-DTORCHOPS_TESTS=ON"
    MAX_JOBS             parallel compile jobs (default: all cores)
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            sys.exit(
                "torchops builds against the torch you have, and this Python has none: "
                "run 'pip install torch' and then 'pip install --no-build-isolation <folder of torchops>'."
            )
        if shutil.which("cmake") is None:
            sys.exit("torchops needs cmake to build: run 'pip install cmake ninja' and then the same command again.")

        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DTORCHOPS_TORCH_DIR={torch.submodule_search_locations[0]}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCHOPS_CUDA={ {'1': 'ON', '0': 'OFF'}.get(os.environ.get('FORCE_CUDA', ''), 'AUTO') }",
            *(["-GNinja"] if shutil.which("ninja") else []),
            *shlex.split(os.environ.get("TORCHOPS_CMAKE_ARGS", "")),
        ]
        # setuptools takes only the extension from an editable build; the rest goes beside it here.
        prefixes = [package, ROOT / "torchops"] if self.editable_mode else [package]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (
            configure,
            ["cmake", "--build", str(build), "--parallel", jobs],
            *(["cmake", "--install", str(build), "--prefix", str(prefix)] for prefix in prefixes),
        ):
            if subprocess.run(command).returncode != 0:
                sys.exit(f"torchops: '{shlex.join(command)}' failed; what went wrong stands above this line.")


if int(setuptools.__version__.split(".")[0]) < 77:
    # It would print the schema of pyproject.toml, whose license it cannot read.
    sys.exit(
        f"torchops needs setuptools >= 77 to build, and this is {setuptools.__version__}: "
        "run 'pip install --upgrade setuptools' and then the same command again."
    )
setup(ext_modules=[Extension("torchops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
