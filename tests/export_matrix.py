"""Which operators work in which ways: docs/export.md is written from the tests of a run (pytest --export-matrix=PAGE).

A test that shows it has a mark ``way`` with the name of the way, and a parameter ``case``; a test of C++ is about the
operators that its source calls.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import cases
import pytest

WAYS = ("eager", "TorchScript", "torch.compile", "torch.export", "AOTInductor", "ONNX", "C++")
BEGIN, END = "<!-- matrix: pytest --export-matrix=docs/export.md -->", "<!-- end of matrix -->"
YES, NO, NOT_RUN = "yes", "**no**", ""
# Under this name a test records the operators and ways that its outcome is about.
SHOWN = "export matrix"

Cells = dict[str, dict[str, str]]


def shown_by(item: pytest.Item) -> list[list[str]]:
    """[operator, way] for each that the test is about."""
    ways = [mark.args[0] for mark in item.iter_markers("way")]
    if not ways:
        return []
    parameters = item.callspec.params
    operators = [parameters["case"].name] if "case" in parameters else CALLED_IN_CPP.get(parameters["name"], [])
    return [[operator, way] for operator in operators for way in ways]


def called_in_cpp() -> dict[str, list[str]]:
    """The public operators that each Catch2 test of the C++ functions calls."""
    public = {case.name for case in cases.PUBLIC}
    found = {}
    for path in sorted((Path(__file__).parent / "cpp").glob("*_test.cpp")):
        for test in path.read_text().split('TEST_CASE("')[1:]:
            found[test.partition('"')[0]] = sorted(public & set(re.findall(r"torchops::(\w+)\(", test)))
    return found


CALLED_IN_CPP = called_in_cpp()


def cells_of(reports: Iterable[pytest.TestReport], before: Cells) -> Cells:
    """An operator works in a way if every test of that has passed. Cells without a test in this run stay as before."""
    outcomes: dict[tuple[str, str], set[str]] = {}
    for report in reports:
        for name, shown in report.user_properties:
            if name == SHOWN:
                for operator, way in shown:
                    outcomes.setdefault((operator, way), set()).add(report.outcome)
    words = {key: NO if "failed" in seen else YES for key, seen in outcomes.items() if seen != {"skipped"}}
    return {
        case.name: {way: words.get((case.name, way), before.get(case.name, {}).get(way, NOT_RUN)) for way in WAYS}
        for case in cases.PUBLIC
    }


def write(page: Path, reports: Iterable[pytest.TestReport]) -> None:
    cells = cells_of(reports, read(page))
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [f"| operator | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    lines += [f"| `{operator}` | {' | '.join(words[way] for way in WAYS)} |" for operator, words in cells.items()]
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]))


def read(page: Path) -> Cells:
    """What `write` wrote."""
    _, _, rest = page.read_text().partition(BEGIN)
    table, end, _ = rest.partition(END)
    if not end:
        raise ValueError(f"--export-matrix: expected the lines {BEGIN} and {END} in {page}, got none")
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}
