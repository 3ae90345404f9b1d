"""CUDA kernels with a mistake built in, which the tests on the host must find: tests/cpp/simt/mutations."""

import json
import subprocess

import pytest
from own_process import BUILD, ROOT, unpoisoned

PROGRAMS = BUILD / "tests" / "cpp" / "mutations"
TABLES = sorted((ROOT / "tests" / "cpp" / "simt" / "mutations").glob("*.json"))


def mutations() -> list:
    return [
        pytest.param(table.stem, mutation, id=f"{table.stem}: {mutation['name']}")
        for table in TABLES
        for mutation in json.loads(table.read_text())["mutations"]
    ]


@pytest.mark.parametrize("family, mutation", mutations())
def test_mistake_is_found(family: str, mutation: dict[str, str]) -> None:
    kernel = (ROOT / "csrc" / mutation["file"]).read_text()
    assert kernel.count(mutation["text"]) == 1, f"the text is not exactly once in csrc/{mutation['file']}"
    program = PROGRAMS / f"mutant_{family}_{mutation['name']}"
    assert program.exists(), f"no {program}: build with TORCHOPS_CMAKE_ARGS=-DTORCHOPS_TESTS=ON"
    run = subprocess.run(
        [program, "--abort", mutation["case"]],
        env={**unpoisoned(), "TSAN_OPTIONS": "halt_on_error=1"},  # the first one is enough
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode != 0, "nobody noticed"
    assert mutation["report"] in run.stdout + run.stderr, run.stdout[-3000:] + run.stderr[-3000:]
