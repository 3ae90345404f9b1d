"""Loads libtorchops, or says in one sentence why it cannot and what repairs it."""

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
VERSION = (FOLDER / "version.txt").read_text().strip()
LIBRARY = FOLDER / "lib" / "libtorchops.so"

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps <folder of torchops>"


def _release(version: str) -> str:
    """'2.13.0+cpu' -> '2.13': torch's C++ interface is the same within a release."""
    found = re.match(r"\d+\.\d+", version)
    return found.group() if found else version


def load() -> None:
    """Registers the operators of libtorchops with torch.

    Raises:
        ImportError: torch is missing, is not the one this copy was built against, or the library
            is missing or broken.
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
    try:
        torch.ops.load_library(LIBRARY)
        from . import _C
    except (OSError, ImportError) as error:
        raise ImportError(f"torchops cannot load {LIBRARY} ({error}): rebuild it with '{REINSTALL}'.") from error
    try:
        _C.cpu_capability()
    except ValueError as error:
        raise ImportError(f"torchops: {error}") from error
