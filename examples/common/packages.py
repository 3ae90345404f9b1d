"""What packages of third parties carry that the examples do not require."""

import hashlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def module(package: str, missing: str) -> ModuleType:
    """An installed package. What fails while it is imported is shown as it is.

    Args:
        missing: what to say where it is not installed: how it gets there.
    """
    if find_spec(package) is None:
        raise SystemExit(f"No package {package!r}.\n{missing}")
    return import_module(package)


def file_in(package: str, name: str, sha256: str, missing: str) -> Path:
    """A file of an installed package, of which nothing is imported, after checking that it is the one that figures were
    made with."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"No package {package!r}.\n{missing}")
    path = Path(spec.submodule_search_locations[0]) / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none, since there is no such file"
    if digest != sha256:
        raise SystemExit(f"{path} is not the file that was expected: its SHA-256 is {digest}.\n{missing}")
    return path
