"""Loads libtorchops, or says in one sentence why it cannot and what repairs it."""

import os
import re
from pathlib import Path
from typing import Optional

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "lib" / "libtorchops.so"

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps <folder of torchops>"


def _release(version: str) -> str:
    """'2.13.0+cpu' -> '2.13': torch's C++ interface is the same within a release."""
    found = re.match(r"\d+\.\d+", version)
    return found.group() if found else version


def _other_copy() -> Optional[str]:
    """The library of another copy of torchops, if this process has loaded one.

    Its operators have the names of ours, which then registers none.
    """
    import torch

    from ._namespace import operators

    if not hasattr(operators, "merge_tokens"):
        return None
    maps = Path("/proc/self/maps")  # also names what was loaded without torch, by dlopen or as a dependency
    mapped = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    loaded = sorted(path for path in mapped | torch.ops.loaded_libraries if os.path.isfile(path))
    if any(os.path.samefile(path, LIBRARY) for path in loaded if LIBRARY.exists()):
        return None
    named = [path for path in loaded if "torchops" in os.path.basename(path)]
    return ", ".join(named or sorted(torch.ops.loaded_libraries)) or "a file of another name"


def load() -> None:
    """Registers the operators of libtorchops with torch.

    Raises:
        ImportError: torch is missing, is not the one this copy was built against, the library of
            another copy is loaded, or the library is missing or broken.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("torchops needs torch >= 2.11, which is not installed: run 'pip install torch'.") from error
    try:
        from . import _build
    except ImportError as error:
        raise ImportError(
            f"torchops in {FOLDER} is not built: run 'pip install --no-build-isolation -e .' in the folder above it."
        ) from error
    if _release(torch.__version__) != _release(_build.TORCH_VERSION):
        raise ImportError(
            f"torchops was built against torch {_build.TORCH_VERSION}, and this is torch {torch.__version__}: "
            f"rebuild it with '{REINSTALL}', or install torch {_build.TORCH_VERSION}."
        )
    other = _other_copy()
    if other is not None:
        raise ImportError(
            f"torchops cannot load {LIBRARY}: this process has loaded another copy of the library ({other}), and "
            "can hold one. Load this one in the other's place, or do not import the package."
        )
    try:
        torch.ops.load_library(LIBRARY)
        from . import _C
    except (OSError, ImportError) as error:
        raise ImportError(f"torchops cannot load {LIBRARY} ({error}): rebuild it with '{REINSTALL}'.") from error
    try:
        _C.cpu_capability()
    except ValueError as error:
        raise ImportError(f"torchops: {error}") from error
