"""ONNX Runtime computes what the operators do, by torchops.decompositions()."""

import pytest
import torch
from contract import Inputs, OpCase, assert_close, outputs_of
from exported_calls import Calls
from test_decompositions import DECOMPOSED
from torch import Tensor
from torch.utils import _pytree as pytree

import torchops

WHY = "needs {0}: pip install onnx onnxscript onnxruntime"
Results = list[tuple[dict[str, Inputs], dict[str, list[Tensor]]]]


@pytest.fixture(scope="module")
def results() -> Results:
    """Of the calls that were exported, and of twice as many rows."""
    pytest.importorskip("onnxscript", reason=WHY.format("onnxscript"))
    onnxruntime = pytest.importorskip("onnxruntime", reason=WHY.format("onnxruntime"))
    calls = Calls(DECOMPOSED)
    program = calls.exported().run_decompositions(torchops.decompositions())
    saved = torch.onnx.export(program, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(saved.model_proto.SerializeToString())
    _, structure = pytree.tree_flatten(calls(calls.inputs))

    def run(inputs: dict[str, Inputs]) -> dict[str, list[Tensor]]:
        tensors = [value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor)]
        names = [argument.name for argument in session.get_inputs()]
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return pytree.tree_unflatten([torch.from_numpy(output) for output in session.run(None, given)], structure)

    return [(inputs, run(inputs)) for inputs in (calls.inputs, calls.twice_the_batch())]


@pytest.mark.way("ONNX")
@pytest.mark.parametrize("case", DECOMPOSED, ids=str)
def test_it_runs_in_onnx_runtime(case: OpCase, results: Results) -> None:
    for inputs, outputs in results:
        actual, expected = case.compared(outputs[case.name]), case.compared(outputs_of(case.op(**inputs[case.name])))
        for one, other in zip(actual, expected, strict=True):
            exact = other.double() if other.is_floating_point() else other
            assert_close(one, exact, torch.float32, case.name, 1e-4)
