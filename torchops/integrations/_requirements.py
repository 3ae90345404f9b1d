"""The libraries that integrations import: what to install, or why what is installed cannot be imported."""

from contextlib import contextmanager
from importlib import metadata
from typing import Iterator, List

from torch.torch_version import TorchVersion

__all__: List[str] = []


@contextmanager
def imports_of(module: str, library: str, oldest: str) -> Iterator[None]:
    """Around the imports of a module that needs a library of at least that version.

    Raises:
        ImportError: if the library is missing, is older, or fails in its own imports; then with the first reason.
    """
    try:
        version = TorchVersion(metadata.version(library))
    except metadata.PackageNotFoundError:
        version = TorchVersion("0")
    if version < oldest:
        raise ImportError(
            f"{module} needs {library} {oldest} or newer: pip install '{library}>={oldest}'", name=library
        )
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        name = first.name if isinstance(first, ImportError) else library
        raise ImportError(f"{module} cannot import {library} {version}: {first}", name=name) from error
