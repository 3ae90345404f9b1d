"""Files that packages carry, of which nothing is imported."""

import hashlib
from importlib.util import find_spec
from pathlib import Path


def file_in(package: str, name: str, sha256: str, missing: str) -> Path:
    """A file of an installed package, after checking that it is the one that figures were made with.

    Args:
        package, name: where it is.
        sha256: of its bytes.
        missing: what to say where the package is not installed: how it gets there.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"No package {package!r}.\n{missing}")
    path = Path(spec.submodule_search_locations[0]) / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none, since there is no such file"
    if digest != sha256:
        raise SystemExit(f"{path} is not the file that was expected: its SHA-256 is {digest}.\n{missing}")
    return path
