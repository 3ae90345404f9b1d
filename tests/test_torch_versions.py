"""One package for several versions of torch: which library the import and find_package take, and what pip is told."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_process import ROOT

import torchops
from torchops import _build, _library

PACKAGE = Path(torchops.__file__).parent
VERSIONS = ["2.11.0", "2.12.1", "2.14.1"]
HERE = _library._release(torch.__version__)


@pytest.fixture
def for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "TORCH_VERSIONS", VERSIONS)
    monkeypatch.setattr(_build, "LIBRARY_DIR", "torch-{release}")


@pytest.mark.parametrize(
    "version, built_against",
    [("2.11.0+cu130", "2.11.0"), ("2.12.0", "2.12.1"), ("2.12.1+cpu", "2.12.1"), ("2.14.2a0+git1c2d3e", "2.14.1")],
)
def test_patches_and_builds_of_a_release_take_its_library(for_several: None, version: str, built_against: str) -> None:
    assert _library.torch_built_against(version) == built_against
    assert _library.library_for(version) == PACKAGE / f"torch-{built_against[:4]}" / "libtorchops.so"


@pytest.mark.parametrize("version", ["2.1.2", "2.10.0", "2.13.0+cpu", "2.15.0.dev20261130", "3.11.0"])
def test_no_library_for_this_torch(for_several: None, version: str) -> None:
    with pytest.raises(ImportError) as raised:
        _library.library_for(version)
    assert str(raised.value) == (
        f"torchops was built against torch 2.11.0 or 2.12.1 or 2.14.1, and this is torch {version}: rebuild it with "
        "'pip install --no-build-isolation --force-reinstall --no-deps --no-binary torchops "
        f"torchops=={torchops.__version__}', or install torch 2.11.0 or 2.12.1 or 2.14.1."
    )


def test_a_build_for_one_torch_has_its_library_in_lib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "TORCH_VERSIONS", ["2.12.1"])
    monkeypatch.setattr(_build, "LIBRARY_DIR", "lib")
    assert _library.library_for("2.12.0") == PACKAGE / "lib" / "libtorchops.so"
    with pytest.raises(ImportError, match="against torch 2.12.1, and this is .* or install torch 2.12.1.$") as raised:
        _library.library_for("2.13.0")
    assert "--no-deps <folder of torchops>'" in str(raised.value)


@pytest.fixture
def package_for_several(tmp_path: Path) -> Path:
    """The folder of a copy of the package, with a library for this torch and, for others, files that are none."""
    package = tmp_path / "torchops"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    for version in {*VERSIONS, torch.__version__}:
        folder = package / f"torch-{_library._release(version)}"
        folder.mkdir(exist_ok=True)
        (folder / "libtorchops.so").write_text(f"no library, of torch {version}")
    shutil.copy(torchops.utils.library_path, package / f"torch-{HERE}")
    values = {name: value for name, value in vars(_build).items() if name.isupper()}
    values |= {"TORCH_VERSIONS": [*VERSIONS, torch.__version__], "LIBRARY_DIR": "torch-{release}"}
    (package / "_build.py").write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
    return tmp_path


def run_in(folder: Path, code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_import_takes_the_library_of_this_torch(package_for_several: Path) -> None:
    code = "import torch, torchops; print(torch.ops.loaded_libraries); torchops.show_config()"
    run = run_in(package_for_several, code)
    assert run.returncode == 0, run.stderr
    loaded, *shown = run.stdout.splitlines()
    library = package_for_several / "torchops" / f"torch-{HERE}" / "libtorchops.so"
    assert loaded == str({str(library)})
    assert f"{'library:':21}{library}" in shown


def test_broken_library(package_for_several: Path) -> None:
    """It says which of them, and a build from source takes the place of all."""
    other = next(version for version in VERSIONS if _library._release(version) != HERE)
    run = run_in(package_for_several, f"import torch; torch.__version__ = {other!r}; import torchops")
    message = run.stderr.strip().splitlines()[-1]
    library = package_for_several / "torchops" / f"torch-{_library._release(other)}" / "libtorchops.so"
    assert message.startswith(f"ImportError: torchops cannot load {library} (")
    assert f"--no-binary torchops torchops=={torchops.__version__}'" in message


# ---- the build ------------------------------------------------------------------------------------------------------

needs_cmake = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists() or shutil.which("cmake") is None, reason="needs the sources and cmake"
)


def headers_of_torch(version: str, folder: Path) -> Path:
    """Of a torch package, what tells its version."""
    header = folder / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    header.write_text("".join(f"#define TORCH_VERSION_{part} {number}\n" for part, number in numbers))
    return folder


def configure(source: Path, build: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["cmake", "-S", source, "-B", build, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module", params=["2.11.0;2.12.1", None])
def cmake_package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A prefix with what a build against torch 2.12.1 writes, and whether that is for several versions of torch."""
    folder = tmp_path_factory.mktemp("package")
    arguments = [f"-DTORCHOPS_TORCH_DIR={headers_of_torch('2.12.1', folder / 'torch')}"]
    if request.param:
        arguments.append(f"-DTORCHOPS_TORCH_VERSIONS={request.param}")
    run = configure(ROOT, folder / "build", *arguments)
    assert run.returncode == 0, run.stderr
    config = folder / "prefix" / "share" / "cmake" / "torchops"
    config.mkdir(parents=True)
    for file in (folder / "build").glob("torchopsConfig*.cmake"):
        shutil.copy(file, config)
    shutil.copy(folder / "build" / "_build.py", folder / "prefix")
    return folder / "prefix", request.param is not None


@needs_cmake
def test_what_a_build_tells_the_import(cmake_package: tuple[Path, bool]) -> None:
    prefix, several = cmake_package
    written = runpy.run_path(str(prefix / "_build.py"))
    assert written["TORCH_VERSIONS"] == (["2.11.0", "2.12.1"] if several else ["2.12.1"])
    assert written["LIBRARY_DIR"] == ("torch-{release}" if several else "lib")
    install = (prefix.parent / "build" / "cmake_install.cmake").read_text()
    assert f'"${{CMAKE_INSTALL_PREFIX}}/{"torch-2.12" if several else "lib"}" TYPE SHARED_LIBRARY' in install


@needs_cmake
@pytest.mark.parametrize("version", ["2.11.2", "2.12.1", "2.1.0", "2.13.0"])
def test_find_package(cmake_package: tuple[Path, bool], tmp_path: Path, version: str) -> None:
    """In C++ the library is the one of the torch that find_package(Torch) finds."""
    prefix, several = cmake_package
    found = tmp_path / "torch"
    found.mkdir()
    (found / "TorchConfig.cmake").write_text("set(TORCH_LIBRARIES torch)\n")
    (found / "TorchConfigVersion.cmake").write_text(
        f"set(PACKAGE_VERSION {version})\nset(PACKAGE_VERSION_COMPATIBLE ON)\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(program LANGUAGES NONE)\nfind_package(torchops REQUIRED)\n"
        "get_target_property(library torchops::torchops IMPORTED_LOCATION)\nmessage(STATUS ${library})\n"
    )
    run = configure(tmp_path, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix / 'share' / 'cmake'};{found}")
    release = version.rpartition(".")[0]
    if release == "2.12" or (several and release == "2.11"):
        assert run.returncode == 0, run.stderr
        assert f"-- {prefix}/{f'torch-{release}' if several else 'lib'}/libtorchops.so" in run.stdout
    else:
        message = " ".join(run.stderr.split())
        built_against = "2.11.0 or 2.12.1" if several else "2.12.1"
        assert f"built against torch {built_against}, and {found} is torch {version}: use a torch" in message


@needs_cmake
def test_a_build_is_one_of_those_that_the_package_is_for(tmp_path: Path) -> None:
    torch_dir = headers_of_torch("2.13.0", tmp_path / "torch")
    run = configure(
        ROOT, tmp_path / "build", f"-DTORCHOPS_TORCH_DIR={torch_dir}", "-DTORCHOPS_TORCH_VERSIONS=2.11.0;2.12.1"
    )
    assert run.returncode != 0
    assert f"TORCHOPS_TORCH_VERSIONS is 2.11.0;2.12.1, and {torch_dir} is torch 2.13.0" in " ".join(run.stderr.split())


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")
@pytest.mark.parametrize(
    "versions, required",
    [([], "torch>=2.11"), (["2.12.1"], "torch<2.13,>=2.12"), (["2.14.1", "2.11.0", "2.12.1"], "torch<2.15,>=2.11")],
)
def test_what_pip_installs_beside_a_wheel(tmp_path: Path, versions: list[str], required: str) -> None:
    """No torch that the wheel has no library for."""
    folders = [str(headers_of_torch(version, tmp_path / version)) for version in versions]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TORCHOPS_TORCH_DIRS": ":".join(folders)},
        check=True,
    )
    assert (tmp_path / "torchops.egg-info" / "requires.txt").read_text().splitlines()[0] == required
