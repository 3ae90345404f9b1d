"""CUDA kernels with a mistake built in, which the tests on the host must find: tests/cpp/simt/mutations."""

import json
import subprocess

import pytest
from own_process import BUILD, ROOT, unpoisoned

PROGRAMS = BUILD / "tests" / "cpp" / "mutations"
TABLES = {
    table.stem: json.loads(table.read_text())
    for table in sorted((ROOT / "tests" / "cpp" / "simt" / "mutations").glob("*.json"))
}


def run(table: str, way: str, cases: str, mistake: str = "") -> subprocess.CompletedProcess[str]:
    program = PROGRAMS / f"mutants_{table}_{way}"
    assert program.exists(), f"no {program}: build with TORCHOPS_CMAKE_ARGS=-DTORCHOPS_TESTS=ON"
    return subprocess.run(
        [program, "--abort", cases],
        env={**unpoisoned(), "TSAN_OPTIONS": "halt_on_error=1", "SIMT_MISTAKE": mistake},  # the first one is enough
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("table", TABLES)
def test_without_a_mistake(table: str) -> None:
    """What is built in changes nothing by itself. Sanitizers run the kernels as they are in test_cpp."""
    cases = {mutation["case"] for mutation in TABLES[table]}
    result = run(table, "plain", ",".join(sorted(cases)))
    assert "All tests passed" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize(
    "table, mutation",
    [
        pytest.param(table, mutation, id=f"{table}: {mutation['name']}")
        for table, mutations in TABLES.items()
        for mutation in mutations
    ],
)
def test_mistake_is_found(table: str, mutation: dict[str, str]) -> None:
    kernel, text = (ROOT / "csrc" / mutation["file"]).read_text(), mutation["text"]
    within = mutation.get("within", text)
    assert kernel.count(within) == within.count(text) == 1, f"the text is not exactly once in csrc/{mutation['file']}"
    result = run(table, mutation["way"], mutation["case"], mutation["name"])
    assert result.returncode != 0, "nobody noticed"
    assert mutation["report"] in result.stdout + result.stderr, result.stdout[-3000:] + result.stderr[-3000:]
