"""What this copy of torchops is, and where its parts for C++ lie."""

from typing import Dict, List, Optional

import torch

from . import _build
from ._library import FOLDER, library_for, torch_built_against
from ._namespace import cpu

__all__ = [
    "cmake_prefix_path",
    "library_path",
    "cpu_capability",
    "cpu_capabilities",
    "cpu_levels",
    "config",
    "show_config",
]

cmake_prefix_path: str = str(FOLDER / "share" / "cmake")
"""For ``cmake -DCMAKE_PREFIX_PATH=...``, so that ``find_package(torchops)`` finds this copy, and in it
the library for the torch that ``find_package(Torch)`` found."""

library_path: str = str(library_for(torch.__version__))
"""libtorchops.so for the torch that runs, for ``torch.ops.load_library`` and ``dlopen``."""

cpu_levels: List[str] = _build.CPU_LEVELS
"""The instruction-set levels that the library has kernels for, lowest first."""


def cpu_capability() -> str:
    """The instruction-set level in use: the best of :func:`cpu_capabilities`, or the one that the
    environment variable TORCHOPS_CPU_CAPABILITY named when torchops was imported.

    >>> torchops.utils.cpu_capability() in torchops.utils.cpu_capabilities()
    True
    """
    return cpu.capability()


def cpu_capabilities() -> List[str]:
    """Those of :data:`cpu_levels` that this CPU can execute, lowest first."""
    return cpu.capabilities()


def config() -> Dict[str, Optional[str]]:
    """Versions and instruction set, as :func:`show_config` prints them."""
    why = cpu.why_no_higher_level()
    return {
        "torchops": _build.VERSION,
        "built against torch": torch_built_against(torch.__version__),
        "running with torch": torch.__version__,
        "compiler": _build.COMPILER,
        "build type": _build.BUILD_TYPE,
        "CUDA": _build.CUDA_VERSION or "not built",
        "CPU level": f"{cpu_capability()} (of {', '.join(cpu_capabilities())})" + (f"; not {why}" if why else ""),
        "library": library_path,
    }


def show_config() -> None:
    """Prints version, torch it was built against, CUDA or not, and the instruction set in use, with what the next
    higher one lacks."""
    for name, value in config().items():
        print(f"{name + ':':21}{value}")
