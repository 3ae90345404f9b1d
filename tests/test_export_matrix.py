"""docs/export.md says of every public operator what the tests show of it."""

from pathlib import Path

import cases
import export_matrix
import pytest
from export_matrix import NO, NOT_RUN, WAYS, YES
from test_decompositions import DECOMPOSED

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
IN_CPP = {operator for operators in export_matrix.CALLED_IN_CPP.values() for operator in operators}
AGAIN = "write it again: pytest --export-matrix=docs/export.md"


@cases.PUBLIC_OPS
def test_the_page_says_what_is_tested(case: cases.OpCase) -> None:
    tested = set(WAYS)
    if case not in DECOMPOSED:
        tested.remove("ONNX")
    if case.name not in IN_CPP:
        tested.remove("C++")
    words = export_matrix.read(PAGE).get(case.name)
    assert words is not None, f"{PAGE.name} has no line for {case.name}; {AGAIN}"
    assert {way for way, word in words.items() if word == YES} == tested, AGAIN


def test_the_page_has_no_other_operators() -> None:
    assert export_matrix.read(PAGE).keys() == {case.name for case in cases.PUBLIC}, AGAIN


def test_a_cell_is_yes_only_if_all_of_its_tests_passed() -> None:
    def report(outcome: str, *shown: list[str]) -> pytest.TestReport:
        properties = [(export_matrix.SHOWN, [list(one) for one in shown])]
        return pytest.TestReport("", ("", None, ""), {}, outcome, None, "call", user_properties=properties)

    def word(before: str, *reports: pytest.TestReport) -> str:
        return export_matrix.cells_of(reports, {"route": {"C++": before}})["route"]["C++"]

    cell, other = ["route", "C++"], ["route", "eager"]
    assert word(NOT_RUN, report("passed", cell), report("failed", other)) == YES
    assert word(YES, report("passed", cell, other), report("failed", cell)) == NO
    assert word(YES, report("passed", other), report("skipped", cell)) == YES
