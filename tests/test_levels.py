"""The numeric rows at every CPU level but the one in use, each in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contract import BY_EMULATION, EMULATED, EXECUTED, FOR_ONE_LEVEL, TOLERANCE, assert_close
from level_outputs import outputs_of_level
from own_process import BUILD, package_with, run_pytest
from torch import Tensor

import torchops

IN_USE = torchops.utils.cpu_capability()
LOWER_LEVELS = [level for level in torchops.utils.cpu_capabilities() if level != IN_USE]
EMULATED_LEVELS = [level for level in EMULATED if level not in torchops.utils.cpu_capabilities()]
TESTS = Path(__file__).parent
EMULATED_LIBRARY = BUILD / "tests" / "cpp" / "emulated" / "libtorchops.so"


@pytest.mark.skipif(FOR_ONE_LEVEL, reason="this run is for one level already")
@pytest.mark.parametrize("level", LOWER_LEVELS)
def test_numeric_rows_at(level: str, record_property: Callable[[str, object], None]) -> None:
    run_pytest("-m", "numeric", str(TESTS), environment={**os.environ, "TORCHOPS_CPU_CAPABILITY": level})
    record_property(EXECUTED, level)


@pytest.mark.skipif(FOR_ONE_LEVEL, reason="this run is for one level already")
@pytest.mark.parametrize("level", EMULATED_LEVELS)
def test_numeric_rows_at_emulated(level: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """In plain C++ in place of the instructions: tests/cpp/emulated."""
    run_pytest(
        *("-m", "numeric", *rows_at_emulated(level), str(TESTS)),
        environment={**os.environ, "TORCHOPS_CPU_CAPABILITY": level},
        folder=package_with(EMULATED_LIBRARY, tmp_path),
    )
    record_property(EXECUTED, BY_EMULATION + level)


@pytest.fixture(scope="module")
def in_use() -> dict[str, list[Tensor]]:
    return outputs_of_level()


@pytest.mark.skipif(FOR_ONE_LEVEL, reason="this run is for one level already")
@pytest.mark.parametrize("level", LOWER_LEVELS + EMULATED_LEVELS)
def test_levels_agree(level: str, in_use: dict[str, list[Tensor]], tmp_path: Path) -> None:
    """Also about what becomes of a NaN, which no reference tells."""
    folder = package_with(EMULATED_LIBRARY, tmp_path) if level in EMULATED_LEVELS else TESTS.parent
    environment = {**os.environ, "TORCHOPS_CPU_CAPABILITY": level, "PYTHONPATH": str(folder)}
    file = tmp_path / "outputs.pt"
    subprocess.run([sys.executable, TESTS / "level_outputs.py", file], env=environment, check=True)
    of_level = torch.load(file)
    assert of_level.keys() == in_use.keys()
    for call, expected in in_use.items():
        assert len(of_level[call]) == len(expected), call
        for one, other in zip(of_level[call], expected, strict=True):
            # Both may be off by the tolerance, and more is said of single operators where they meet a reference.
            assert_close(one, other, other.dtype, call, 4 * TOLERANCE.get(other.dtype, 0))


def rows_at_emulated(level: str) -> tuple[str, ...]:
    """Those whose kernels amx has on tiles, all in bfloat16: of the others it executes the same as avx512_bf16."""
    return ("-k", "bfloat16 and (span_attention or stf)") if level == "avx512_bf16" else ()


def test_levels_of_the_library_and_of_the_cpu() -> None:
    """The closing list of tests goes over the first, which CMake writes; the second is C++'s."""
    levels = torchops.utils.cpu_levels
    assert levels[0] == "baseline" and torchops.utils.cpu_capability() in levels
    assert torchops.utils.cpu_capabilities() == [
        level for level in levels if level in torchops.utils.cpu_capabilities()
    ]


def test_unknown_level_is_an_import_error_that_lists_the_known_ones() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import torchops"],
        env={**os.environ, "TORCHOPS_CPU_CAPABILITY": "sse9"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    expected = f"levels this CPU has ({', '.join(torchops.utils.cpu_capabilities())}), got sse9"
    assert expected in run.stderr.splitlines()[-1]


def test_kernel_objects_share_no_functions_between_levels() -> None:
    """A weak symbol that two levels emit would be linked once, perhaps the AVX-512 one for both."""
    objects = sorted(BUILD.glob("CMakeFiles/torchops_kernels_*.dir/**/*.o"))
    assert objects, f"no kernel objects in {BUILD}"
    for path in objects:
        level = next(part for part in path.parts if part.startswith("torchops_kernels_"))
        level = level.removeprefix("torchops_kernels_").removesuffix(".dir")
        listed = subprocess.run(["nm", "--defined-only", "-C", path], capture_output=True, text=True, check=True)
        for line in listed.stdout.splitlines():
            kind, symbol = line.split(maxsplit=2)[1:]
            if kind in "WVu":
                assert f"::{level}::" in symbol, f"{path.name} at {level} emits {symbol}"
            assert not symbol.startswith("_GLOBAL__sub_I"), f"{path.name} at {level} has a static initializer"
