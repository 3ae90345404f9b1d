"""What a user sees when the library and torch do not fit, and what the package says of itself."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchops

PACKAGE = Path(torchops.__file__).parent


def import_error(preparation: str) -> str:
    """The last line of what `import torchops` says after some lines of Python."""
    run = subprocess.run(
        [sys.executable, "-c", f"{preparation}\nimport torchops"], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert run.returncode != 0, "the import succeeded"
    return run.stderr.strip().splitlines()[-1]


def test_another_torch() -> None:
    message = import_error("import torch; torch.__version__ = '2.11.0+cu130'")
    assert f"built against torch {torchops._build.TORCH_VERSIONS[0]}, and this is torch 2.11.0+cu130" in message
    assert "rebuild it with 'pip install --no-build-isolation" in message


def test_no_torch() -> None:
    message = import_error("import sys; sys.modules['torch'] = None")
    assert message == "ImportError: torchops needs torch >= 2.11, which is not installed: run 'pip install torch'."


@pytest.fixture
def copy_of_package(tmp_path: Path) -> Path:
    """The Python files alone, as in a source tree that was not built."""
    for file in PACKAGE.rglob("*.py"):
        target = tmp_path / "torchops" / file.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path


def test_not_built(copy_of_package: Path) -> None:
    (copy_of_package / "torchops" / "_build.py").unlink()
    # The finder of an editable install would fetch the missing file from the source tree.
    only_the_copy = (
        f"import sys; sys.path.insert(0, {str(copy_of_package)!r});"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]"
    )
    message = import_error(only_the_copy)
    assert "is not built: run 'pip install --no-build-isolation -e .'" in message


def test_missing_library(copy_of_package: Path) -> None:
    message = import_error(f"import sys; sys.path.insert(0, {str(copy_of_package)!r})")
    assert "torchops cannot load" in message and "libtorchops.so" in message and "rebuild it with" in message


@pytest.mark.parametrize("name", ["libtorchops.so", "renamed_torchops.so", "renamed.so"])
def test_another_copy_of_the_library(tmp_path: Path, name: str) -> None:
    """The package would run on the other's operators."""
    copy = shutil.copy(torchops.utils.library_path, tmp_path / name)
    message = import_error(f"import torch; torch.ops.load_library({str(copy)!r})")
    assert message.startswith(f"ImportError: torchops cannot load {torchops.utils.library_path}: ")
    assert f"another copy of the library ({copy}), and can hold one" in message


def test_another_copy_loaded_without_torch(tmp_path: Path) -> None:
    copy = shutil.copy(torchops.utils.library_path, tmp_path)
    message = import_error(f"import ctypes, torch; ctypes.CDLL({str(copy)!r})")
    assert f"another copy of the library ({copy})" in message


def test_another_copy_loaded_afterwards_registers_nothing(tmp_path: Path) -> None:
    """Python cannot catch what a library throws while it loads, so it warns."""
    copy = shutil.copy(torchops.utils.library_path, tmp_path / "renamed.so")
    code = (
        "import torch, torchops\n"
        "kernels = torch._C._dispatch_dump_table('torchops::merge_tokens')\n"
        f"torch.ops.load_library({str(copy)!r})\n"
        "assert torch._C._dispatch_dump_table('torchops::merge_tokens') == kernels\n"
        "print(torchops.bipartite_assignment(torch.ones(1, 4, 2), 1).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "[[0, 0, 1, 2]]", run.stderr
    assert run.stderr.count("Warning:") == 1, run.stderr
    assert (
        f"torchops: {copy} registers nothing, for this process has loaded another copy of the library, " in run.stderr
    )
    assert f"{torchops.utils.library_path}: its operators stay" in run.stderr


def test_copies_are_told_apart_where_symbols_are_global(tmp_path: Path) -> None:
    first, second = (shutil.copy(torchops.utils.library_path, tmp_path / name) for name in ("first.so", "second.so"))
    code = f"import ctypes, torch\nfor path in {[str(first), str(second)]}: ctypes.CDLL(path, ctypes.RTLD_GLOBAL)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = f"{second} registers nothing, for this process has loaded another copy of the library, {first}: its"
    assert expected in run.stderr


def imported(preparation: str) -> str:
    """What a process prints as the version, after some lines of Python."""
    code = f"{preparation}\nimport torchops; print(torchops.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_its_own_library_may_be_loaded_already(tmp_path: Path) -> None:
    """Under any of its names."""
    link = tmp_path / "link.so"
    link.symlink_to(torchops.utils.library_path)
    assert imported(f"import torch; torch.ops.load_library({str(link)!r})") == torchops.__version__


def test_without_the_files_that_are_not_python(copy_of_package: Path) -> None:
    """As in frozen applications, which collect modules and libraries."""
    library = Path(torchops.utils.library_path)
    target = copy_of_package / "torchops" / library.relative_to(PACKAGE)
    target.parent.mkdir()
    shutil.copy(library, target)
    only_the_copy = (
        f"import os, sys; os.chdir({str(copy_of_package)!r}); sys.path.insert(0, {str(copy_of_package)!r});"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]"
    )
    assert imported(f"{only_the_copy}; import torchops; assert {str(copy_of_package)!r} in torchops.__file__") == (
        torchops.__version__
    )
    assert not (copy_of_package / "torchops" / "version.txt").exists()


def test_what_takes_long_to_import_is_left_out() -> None:
    left_out = ["torch.distributed.tensor", "torch._inductor", "transformers"]
    script = f"import sys, torchops; print([name for name in {left_out} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert run.stdout.strip() == "[]"


def test_version_is_the_one_of_the_sources() -> None:
    sources = Path(__file__).parent.parent / "torchops"
    assert torchops.__version__ == (sources / "version.txt").read_text().strip()


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    torchops.show_config()
    shown = capsys.readouterr().out
    assert torchops.__version__ in shown
    assert torch.__version__ in shown
    level, levels = torchops.utils.cpu_capability(), torchops.utils.cpu_levels
    assert level in shown
    # Why not a higher one, where there is one.
    assert level == levels[-1] or f"; not {levels[levels.index(level) + 1]}: " in shown


def test_library_loads_without_the_package() -> None:
    """torch.ops.load_library is enough to call operators and to load what was scripted with them."""
    code = (
        f"import torch; torch.ops.load_library({torchops.utils.library_path!r});"
        "print(torch.ops.torchops.bipartite_assignment(torch.ones(1, 4, 2), 1).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent.parent)
    assert run.stdout.strip() == "[[0, 0, 1, 2]]", run.stderr


def test_cmake_package_is_where_utils_says() -> None:
    assert (Path(torchops.utils.cmake_prefix_path) / "torchops" / "torchopsConfig.cmake").is_file()
    assert (PACKAGE / "include" / "torchops" / "torchops.h").is_file()
