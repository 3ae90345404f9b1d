"""Loads the libtorchops for the torch at hand, or says in one sentence why it cannot and what repairs it."""

import os
import re
from pathlib import Path
from typing import Optional

FOLDER = Path(__file__).resolve().parent


def _release(version: str) -> str:
    """'2.13.0+cpu' -> '2.13': torch's C++ interface is the same within a release."""
    found = re.match(r"\d+\.\d+", version)
    return found.group() if found else version


def _rebuild() -> str:
    """The command that puts a build against the torch at hand in the place of this copy."""
    from . import _build

    # What serves several versions of torch is the wheel that was released.
    source = "<folder of torchops>"
    if len(_build.TORCH_VERSIONS) > 1:
        source = f"--no-binary torchops torchops=={_build.VERSION}"
    return f"pip install --no-build-isolation --force-reinstall --no-deps {source}"


def torch_built_against(torch_version: str) -> str:
    """Of the versions that this copy was built against, the one that serves a version of torch.

    Raises:
        ImportError: none does.
    """
    from . import _build

    for version in _build.TORCH_VERSIONS:
        if _release(version) == _release(torch_version):
            return version
    built_against = f"torch {' or '.join(_build.TORCH_VERSIONS)}"
    raise ImportError(
        f"torchops was built against {built_against}, and this is torch {torch_version}: "
        f"rebuild it with '{_rebuild()}', or install {built_against}."
    )


def library_for(torch_version: str) -> Path:
    """libtorchops.so for a version of torch.

    Raises:
        ImportError: this copy has none for it.
    """
    from . import _build

    release = _release(torch_built_against(torch_version))
    return FOLDER / _build.LIBRARY_DIR.format(release=release) / "libtorchops.so"


def _other_copy(library: Path) -> Optional[str]:
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
    if any(os.path.samefile(path, library) for path in loaded if library.exists()):
        return None
    named = [path for path in loaded if "torchops" in os.path.basename(path)]
    return ", ".join(named or sorted(torch.ops.loaded_libraries)) or "a file of another name"


def load() -> None:
    """Registers the operators of libtorchops with torch.

    Raises:
        ImportError: torch is missing, is none that this copy was built against, the library of
            another copy is loaded, or the library is missing or broken.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("torchops needs torch >= 2.11, which is not installed: run 'pip install torch'.") from error
    try:
        from . import _build  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"torchops in {FOLDER} is not built: run 'pip install --no-build-isolation -e .' in the folder above it."
        ) from error
    library = library_for(torch.__version__)
    other = _other_copy(library)
    if other is not None:
        raise ImportError(
            f"torchops cannot load {library}: this process has loaded another copy of the library ({other}), and "
            "can hold one. Load this one in the other's place, or do not import the package."
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"torchops cannot load {library} ({error}): rebuild it with '{_rebuild()}'.") from error
    from ._namespace import cpu

    try:
        cpu.capability()
    except ValueError as error:
        raise ImportError(f"torchops: {error}") from error
