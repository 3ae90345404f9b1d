"""AOTInductor: an exported program compiled to a shared library, which then runs without its Python code."""

import cases
import pytest
import torch
from contract import Inputs, OpCase, assert_same_bits, outputs_of
from exported_calls import Calls
from torch import Tensor

Results = list[tuple[dict[str, Inputs], dict[str, list[Tensor]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of the calls that were exported, and of twice as many rows."""
    calls = Calls(cases.PUBLIC)
    package = str(tmp_path_factory.mktemp("compiled") / "operators.pt2")
    torch._inductor.aoti_compile_and_package(calls.exported(), package_path=package)
    compiled = torch._inductor.aoti_load_package(package)
    return [(inputs, compiled(inputs)) for inputs in (calls.inputs, calls.twice_the_batch())]


@pytest.mark.way("AOTInductor")
@cases.PUBLIC_OPS
def test_it_runs_in_a_program_compiled_ahead_of_time(case: OpCase, results: Results) -> None:
    for inputs, outputs in results:
        assert_same_bits(outputs[case.name], outputs_of(case.op(**inputs[case.name])), case.name)
