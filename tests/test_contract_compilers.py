"""Every operator under torch.compile, driven by the case tables in tests/cases."""

from collections.abc import Callable, Sequence
from typing import Any

import cases
import pytest
import torch
from cases import PUBLIC_OPS
from contract import (
    Inputs,
    OpCase,
    assert_close,
    assert_same_bits,
    cotangents,
    given,
    outputs_of,
    require_grad,
    subsets,
)
from torch import Tensor


def run_with_gradients(op: Callable, inputs: Inputs, names: Sequence[str]) -> list[Tensor]:
    inputs = require_grad(inputs, names)
    outputs = outputs_of(op(**inputs))
    wanted = [out for out in outputs if out.requires_grad]
    if not wanted:
        return outputs
    grads = torch.autograd.grad(wanted, [inputs[name] for name in names], cotangents(wanted))
    return [out.detach() for out in outputs] + list(grads)


def assert_as_inductor_has_it(case: OpCase, actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """The same bits, unless torch adds up a gradient, which inductor does in an order of its own."""
    if not case.summed_by_torch:
        assert_same_bits(actual, expected, what)
        return
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other.double(), torch.float32, what)


@PUBLIC_OPS
def test_compile(case: OpCase, device: str) -> None:
    """fullgraph, forward and backward: every sample. Sizes 0 and 1 and absent tensors compile anew."""
    torch._dynamo.reset()
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=64):
        for sample in case.samples(torch.float32, device):
            names = given(sample.inputs, case.differentiable)
            actual = run_with_gradients(compiled, sample.inputs, names)
            assert_same_bits(actual, run_with_gradients(case.op, sample.inputs, names), sample.id)


@pytest.mark.parametrize("case", [case for case in cases.PUBLIC if len(case.differentiable) > 1], ids=str)
def test_compile_for_every_selection_of_gradients(case: OpCase, device: str) -> None:
    inputs = case.sized(torch.float32, device, 8)
    for names in subsets(given(inputs, case.differentiable)):
        torch._dynamo.reset()
        compiled = torch.compile(case.op, fullgraph=True)
        actual = run_with_gradients(compiled, inputs, names)
        assert_as_inductor_has_it(case, actual, run_with_gradients(case.op, inputs, names), f"gradients to {names}")


@pytest.mark.way("torch.compile")
@PUBLIC_OPS
def test_compile_once_for_all_lengths(case: OpCase, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (40, 50, 70):
        inputs = case.sized(torch.float32, device, length)
        names = given(inputs, case.differentiable)
        with torch._dynamo.config.patch(error_on_recompile=length > 40):
            actual = run_with_gradients(compiled, inputs, names)
        assert_same_bits(actual, run_with_gradients(case.op, inputs, names), f"length {length}")


@pytest.mark.way("torch.compile")
@PUBLIC_OPS
def test_compile_inductor(case: OpCase, device: str) -> None:
    torch._dynamo.reset()

    def model(**inputs: Any) -> list[Tensor]:
        outputs = outputs_of(case.op(**inputs))
        return [out * 2 if out.is_floating_point() else out + 1 for out in outputs]

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    inputs = case.sized(torch.float32, device, 40)
    names = given(inputs, case.differentiable)
    actual = run_with_gradients(compiled, inputs, names)
    assert_as_inductor_has_it(case, actual, run_with_gradients(model, inputs, names), case.name)
