"""Exported programs without operators of torchops: torchops.decompositions()."""

import cases
import pytest
import torch
from contract import OpCase, assert_close, given, outputs_of, require_grad
from test_serialization import Call, twice_the_batch

import torchops
from torchops._namespace import operators

TABLE = torchops.decompositions()
# They convert and train models, and torch's decompositions are what they are made of.
NOT_EXPORTED = {"stf_factorize", "stf_project"}
DECOMPOSED = [case for case in cases.PUBLIC if case.overload in TABLE]
# Of two results that are both rounded, one of them by sums of up to 5000 numbers in turn.
BOTH_ROUNDED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def test_every_public_operator_is_there() -> None:
    assert {case.name for case in cases.PUBLIC if case.overload not in TABLE} == NOT_EXPORTED


@pytest.mark.parametrize("case", DECOMPOSED, ids=str)
@pytest.mark.parametrize("dtype", BOTH_ROUNDED, ids=str)
def test_it_computes_what_the_operator_does(case: OpCase, dtype: torch.dtype) -> None:
    """Every sample, empty and awkward ones included."""
    for sample in case.samples(dtype, "cpu"):
        actual = case.compared(outputs_of(TABLE[case.overload](**sample.inputs)))
        expected = case.compared(outputs_of(case.op(**sample.inputs)))
        assert [(one.dtype, one.shape) for one in actual] == [(one.dtype, one.shape) for one in expected], sample.id
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            tolerance = max(2 * case.output_tolerance.get(dtype, 0), BOTH_ROUNDED[dtype])
            exact = other.double() if other.is_floating_point() else other
            assert_close(one, exact, dtype, f"{sample.id}, output {number}", tolerance)


@pytest.mark.parametrize("case", [case for case in DECOMPOSED if not case.name.endswith("_lse")], ids=str)
def test_no_operator_is_left_in_an_exported_program(case: OpCase) -> None:
    """With a dynamic batch, and inputs that require gradients as a model's parameters do."""
    inputs = case.sized(torch.float32, "cpu", 24)
    batch = torch.export.Dim("batch", min=case.least_batch)
    dynamic = {
        name: {0: batch} if isinstance(value, torch.Tensor) and name not in case.unbatched else None
        for name, value in inputs.items()
    }
    inputs = require_grad(inputs, given(inputs, case.differentiable))
    program = torch.export.export(Call(case), (inputs,), dynamic_shapes={"inputs": dynamic})
    assert any("torchops" in str(node.target) for node in program.graph.nodes)
    program = program.run_decompositions(torchops.decompositions())
    assert not [node.target for node in program.graph.nodes if "torchops" in str(node.target)]
    for call in (inputs, twice_the_batch(case, inputs)):
        actual = case.compared(outputs_of(program.module()(call)))
        for one, other in zip(actual, case.compared(outputs_of(case.op(**call))), strict=True):
            exact = other.detach().double() if other.is_floating_point() else other
            assert_close(one.detach(), exact, torch.float32, case.name, 1e-5)


@pytest.mark.parametrize("gate_at", ["input", "output", "both"])
def test_blocks_that_nobody_chose_may_hold_anything(gate_at: str) -> None:
    index, gate = torch.tensor([[0, 2], [2, -1], [0, 0]]), torch.rand(3, 2)
    w1, w2 = torch.randn(3, 6, 4), torch.randn(3, 4, 6)
    w1[1], w2[1] = torch.nan, torch.inf
    call = {"input": torch.randn(3, 4), "index": index, "gate": gate, "w1": w1, "w2": w2, "gate_at": gate_at}
    output = TABLE[operators.routed_ffn.default](**call)
    torch.testing.assert_close(output, torchops.routed_ffn(**call))
    assert output.isfinite().all()


class Model(torch.nn.Module):
    """Merges tokens, attends to a span and to chosen keys, routes, multiplies by a factored weight, and unmerges."""

    def __init__(self) -> None:
        super().__init__()
        self.routed = torchops.nn.RoutedFFN(16, 32)
        self.factored = torchops.nn.STFLinear.from_linear(torch.nn.Linear(16, 16), 1.5).pack()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assign = torchops.bipartite_assignment(input, 6, 1)
        tokens, _ = torchops.merge_tokens(input, assign, torchops.num_groups(24, 6, 1))
        heads = tokens.unflatten(2, (2, 8)).transpose(1, 2)
        lists = torchops.score_topk(heads, heads, 5, is_causal=True)
        attended = torchops.span_attention(heads, heads, heads, left=3, right=0, is_causal=True)
        attended = attended + torchops.topk_attention(heads, heads, heads, lists)
        tokens = self.factored(tokens + attended.transpose(1, 2).flatten(2))
        return torchops.unmerge_tokens(self.routed(tokens), assign, input)


def test_a_model_runs_in_onnx_runtime() -> None:
    why = "needs {0}: pip install onnx onnxscript onnxruntime"
    pytest.importorskip("onnxscript", reason=why.format("onnxscript"))
    onnxruntime = pytest.importorskip("onnxruntime", reason=why.format("onnxruntime"))
    model, input = Model().eval(), torch.randn(2, 24, 16)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (input,), dynamic_shapes=({0: batch},))
    saved = torch.onnx.export(program.run_decompositions(torchops.decompositions()), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(saved.model_proto.SerializeToString())
    (name,) = (argument.name for argument in session.get_inputs())
    for tokens in (input, torch.randn(5, 24, 16)):
        (output,) = session.run(None, {name: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(tokens), rtol=1e-4, atol=1e-4)


def test_positions_of_factored_layers_are_read_without_views() -> None:
    """In all of 16 bits."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(2, -1)
    read = TABLE[torch.ops.aten.view.dtype]
    assert torch.equal(read(numbers.view(torch.uint8), torch.int16), numbers)
    assert read(numbers, torch.uint8) is NotImplemented
