"""Every Catch2 test case as a pytest item."""

import os
import subprocess
from pathlib import Path

import pytest
from own_process import BUILD, unpoisoned

import torchops

# TORCHOPS_CPP_TESTS names another build of them, e.g. one with sanitizers.
FOLDER = Path(os.environ.get("TORCHOPS_CPP_TESTS", BUILD / "tests" / "cpp"))
LEVELS_HERE = torchops.utils.cpu_capabilities()
# Types whose kernels differ from another's in numbers only, which the programs without sanitizers compare: float16 is
# bfloat16 to AddressSanitizer, and where threads meet double is float.
LEFT_OUT = {"_asan": ("- float16",), "_tsan": ("- float16", "- double")}


def programs() -> list[Path]:
    found = sorted(
        path for path in FOLDER.glob("*_test*") if path.is_file() and path.suffix == "" and "_coverage" not in path.name
    )
    # A program for a level that this CPU does not have would be an illegal instruction.
    missing = tuple(f"_test_{level}" for level in torchops.utils.cpu_levels if level not in LEVELS_HERE)
    return [program for program in found if not program.name.endswith(missing)]


def cases_of_programs() -> list:
    items = []
    for program in programs():
        # Catch2 2 returns the number of cases as its exit status.
        run = subprocess.run([program, "--list-test-names-only"], env=unpoisoned(), capture_output=True, text=True)
        names = [line.strip() for line in run.stdout.splitlines() if line.strip()]
        # A sanitizer that refuses to start, say.
        assert names, f"{program} names no tests: {run.stderr}"
        left_out = LEFT_OUT.get(program.name[-5:], ())
        items += [
            pytest.param(program, name, id=f"{program.name}: {name}") for name in names if not name.endswith(left_out)
        ]
    return items


def test_programs_are_built() -> None:
    names = {program.name for program in programs()}
    folder = Path(__file__).parent / "cpp"
    expected = {path.stem for path in folder.glob("*_test.cpp")} - {"simd_test"}
    expected |= {f"simd_test_{level}" for level in LEVELS_HERE}
    expected |= {f"{path.stem}_emulated" for path in (folder / "emulated").glob("*_test.cpp")}
    expected |= {f"{name}_test_emulated" for name in ("dense_product", "span_attention", "stf")}
    if "TORCHOPS_CPP_TESTS" not in os.environ:  # the kernel tests bring sanitizers of their own
        kernel_tests = {path.stem for path in (folder / "simt").glob("*_test.cpp")}
        ways = ("", "_asan", "_tsan")
        expected |= {f"{name}{way}" for name in kernel_tests - {"mutation_test"} for way in ways} | {"mutation_test"}
    assert names >= expected, (
        f"missing {sorted(expected - names)} in {FOLDER}: build them with "
        "TORCHOPS_CMAKE_ARGS=-DTORCHOPS_TESTS=ON pip install --no-build-isolation -e ."
    )


@pytest.mark.way("C++")
@pytest.mark.parametrize("program, name", cases_of_programs())
def test_cpp(program: Path, name: str) -> None:
    # A comma separates test names on Catch2's command line.
    command = [program, name.replace(",", "\\,")]
    # Sanitizers are loaded before anything else and fill memory themselves.
    sanitized = "TORCHOPS_CPP_TESTS" in os.environ or program.name.endswith(("_asan", "_tsan", "mutation_test"))
    environment = unpoisoned() if sanitized else os.environ
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "test case" in run.stdout, run.stdout
