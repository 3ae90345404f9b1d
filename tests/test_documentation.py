"""Examples in docstrings and pages run, and what pages link to is there."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import torchops

ROOT = Path(__file__).parent.parent
PAGES = [path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(torchops.__path__, "torchops.")
    if not module.name.startswith(("torchops.benchmarks", "torchops.integrations", "torchops._"))
]


@pytest.mark.parametrize("name", ["torchops", *MODULES])
def test_examples_in_docstrings(name: str) -> None:
    torch.manual_seed(0)
    names = {"torch": torch, "nn": torch.nn, "torchops": torchops}
    result = doctest.testmod(
        importlib.import_module(name), extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE, report=True
    )
    assert result.failed == 0


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("torchops.ops.", "torchops.nn."))])
def test_public_names_have_docstrings_and_are_exported(name: str) -> None:
    module = importlib.import_module(name)
    package = torchops.nn if name.startswith("torchops.nn.") else torchops
    for public in module.__all__:
        assert len(getattr(module, public).__doc__.split()) > 10, public
        assert getattr(package, public) is getattr(module, public)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks marked ```python, one after the other, with the libraries that are named behind it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = re.findall(r"```python([^\n]*)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    libraries = {library for needed, _ in found for library in needed.split() if library != "no-run"}
    missing = {library for library in libraries if importlib.util.find_spec(library) is None}
    # A file, since TorchScript looks up the source of what it compiles.
    blocks = [block for needed, block in found if not {"no-run", *missing} & set(needed.split())]
    (tmp_path / "page.py").write_text("\n".join(blocks))
    runpy.run_path("page.py")
    if missing:
        pytest.skip(f"blocks that need {', '.join(sorted(missing))}, not installed, were left out")


def test_cpp_program_of_the_readme_is_built_and_runs(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    for name, language in {"CMakeLists.txt": "cmake", "app.cpp": "cpp"}.items():
        [block] = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
        (tmp_path / name).write_text(block)
    if shutil.which("cmake") is None:
        pytest.skip("no cmake is installed")
    prefixes = f"{torchops.utils.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={prefixes}"],
        ["cmake", "--build", "build"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run([tmp_path / "build" / "app"], capture_output=True, text=True).stdout == "[8, 181, 64]\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_in_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not re.match(r"https?://|mailto:", target):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
