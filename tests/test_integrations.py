"""What integrations say where a library is missing, too old, or broken."""

import importlib
import sys
from collections.abc import Callable
from importlib import metadata

import pytest

LIBRARIES = {
    "timm": ("timm", "1.0.26"),
    "peft": ("peft", "0.21"),
    "transformers": ("transformers", "5.23"),
    "transformers_stf": ("transformers", "5.23"),
    "transformers_routed_ffn": ("transformers", "5.23"),
    "transformers_routed_experts": ("transformers", "5.23"),
    "transformers_token_merging": ("transformers", "5.23"),
}


@pytest.fixture(autouse=True)
def nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torchops.integrations.")]:
        monkeypatch.delitem(sys.modules, name)


def absent(library: str) -> str:
    raise metadata.PackageNotFoundError(library)


@pytest.mark.parametrize("version", [absent, lambda library: "0.20.1"], ids=["none", "old"])
@pytest.mark.parametrize("module", LIBRARIES)
def test_what_to_install(module: str, version: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    library, oldest = LIBRARIES[module]
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: (version if name == library else installed)(name))
    with pytest.raises(ImportError, match=rf"{library} {oldest} or newer: pip install '{library}>={oldest}'") as raised:
        importlib.import_module(f"torchops.integrations.{module}")
    assert raised.value.name == library


@pytest.mark.parametrize("module", LIBRARIES)
def test_what_a_library_itself_lacks(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reason is told, not that the library were missing."""
    library, _ = LIBRARIES[module]

    class Broken:
        def find_spec(self, name: str, *args: object) -> None:
            if name.partition(".")[0] == library:
                reason = RuntimeError("operator torchvision::nms does not exist")
                raise ModuleNotFoundError(f"Could not import module {name!r}") from reason

    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    expected = rf"cannot import {library} .*: operator torchvision::nms does not exist"
    with pytest.raises(ImportError, match=expected) as raised:
        importlib.import_module(f"torchops.integrations.{module}")
    assert raised.value.name == library
