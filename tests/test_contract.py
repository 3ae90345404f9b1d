"""Every operator against every contract, driven by the case tables in tests/cases."""

import re
from collections.abc import Callable, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import DIFFERENTIABLE_OPS, EVERY_DTYPE, EVERY_OP, PUBLIC_OPS
from contract import (
    FOR_ONE_LEVEL,
    LARGE,
    Inputs,
    Invalid,
    OpCase,
    assert_close,
    assert_same_bits,
    cotangents,
    differentiable_outputs,
    given,
    gradients,
    gradients_of,
    map_tensors,
    outputs_of,
    require_grad,
    to_double,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchops


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All non-empty selections."""
    return list(chain.from_iterable(combinations(names, size) for size in range(1, len(names) + 1)))


def test_every_registered_operator_has_a_case() -> None:
    registered = {
        schema.name.removeprefix("torchops::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("torchops::")
    }
    assert registered == {case.name for case in cases.ALL}


SOURCES = Path(__file__).parent.parent / "csrc"


@pytest.mark.skipif(not SOURCES.exists(), reason="needs the sources")
@pytest.mark.parametrize("floor, suffix", [("cpu", "cpp"), ("cuda", "cu")])
def test_every_operator_is_on_every_floor(floor: str, suffix: str) -> None:
    """A build without CUDA would not miss a CUDA kernel that was forgotten."""
    sources = "".join(path.read_text() for path in SOURCES.glob(f"*/{floor}/*.{suffix}"))
    assert {case.name for case in cases.ALL} == set(re.findall(r'm\.impl\("(\w+)"', sources))


@PUBLIC_OPS
def test_names_are_the_same_everywhere(case: OpCase) -> None:
    assert getattr(torchops, case.name).__doc__, f"torchops.{case.name} has no documentation"
    assert case.reference is not None and case.reference.__name__ == case.name
    wrapper = torch.jit.script(getattr(torchops, case.name)).schema
    assert [argument.name for argument in wrapper.arguments] == [
        argument.name for argument in case.overload._schema.arguments
    ]


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.numeric
@PUBLIC_OPS
@EVERY_DTYPE
def test_forward_matches_reference(case: OpCase, dtype: torch.dtype, device: str) -> None:
    for sample in case.samples(dtype, device):
        actual = outputs_of(case.op(**sample.inputs))
        expected = outputs_of(case.reference(**to_double(sample.inputs)))
        assert len(actual) == len(expected)
        for index, (one, other) in enumerate(zip(case.compared(actual), case.compared(expected), strict=True)):
            assert_close(one, other, dtype, f"{sample.id}, output {index}", case.output_tolerance.get(dtype, 0))


@pytest.mark.numeric
@DIFFERENTIABLE_OPS
@EVERY_DTYPE
def test_gradients_match_reference(case: OpCase, dtype: torch.dtype, device: str) -> None:
    """For every selection of inputs that require a gradient."""
    for sample in case.samples(dtype, device):
        differentiable = given(sample.inputs, case.differentiable)
        if not differentiable:
            continue
        grads = cotangents(outputs_of(case.op(**sample.inputs)))
        exact = require_grad(to_double(sample.inputs), differentiable)
        exact_outputs = outputs_of(case.reference(**exact))
        derivatives = gradients_of(exact_outputs, [exact[name] for name in differentiable], grads)
        expected = dict(zip(differentiable, derivatives, strict=True))
        # Which gradients are computed is decided above the kernels, the same way at every level.
        for names in [differentiable] if FOR_ONE_LEVEL else subsets(differentiable):
            inputs = require_grad(sample.inputs, names)
            actual = gradients_of(outputs_of(case.op(**inputs)), [inputs[name] for name in names], grads)
            for name, one in zip(names, actual, strict=True):
                assert one.dtype == inputs[name].dtype
                other = torch.zeros_like(exact[name]) if expected[name] is None else expected[name]
                what = f"{sample.id}, gradient to {name} of {names}"
                assert_close(one, other, dtype, what, case.gradient_tolerance.get(dtype, 0))


@DIFFERENTIABLE_OPS
def test_gradcheck(case: OpCase, device: str) -> None:
    for sample in case.samples(torch.float64, device):
        names = [name for name in given(sample.inputs, case.differentiable) if name not in case.straight_through]
        if "zero-total" in sample.id:
            names = ["input"]  # dividing or not is a jump in the weights
        if not names or any(
            sample.inputs[name].numel() > 400 or sample.inputs[name].dtype != torch.float64 for name in names
        ):
            continue  # finite differences take a call per element
        inputs = require_grad(sample.inputs, names)

        def call(*tensors: Tensor, names=names, inputs=inputs) -> tuple[Tensor, ...]:
            outputs = outputs_of(case.op(**(inputs | dict(zip(names, tensors, strict=True)))))
            return tuple(out.masked_fill(out.isinf(), 0) for out in outputs)  # a difference of infinities is NaN

        assert torch.autograd.gradcheck(call, [inputs[name] for name in names]), sample.id


@pytest.mark.numeric
@EVERY_OP
@EVERY_DTYPE
def test_same_bits_every_time_and_for_any_number_of_threads(
    case: OpCase, dtype: torch.dtype, device: str, two_threads: int
) -> None:
    inputs = case.sized(dtype, device, LARGE)
    names = given(inputs, case.differentiable)

    def run() -> list[Tensor]:
        results = outputs_of(case.op(**inputs))
        return results + (gradients(case.op, inputs, names) if names else [])

    first = run()
    assert_same_bits(run(), first, "run to run")
    if case.decomposes:
        return
    torch.set_num_threads(1)
    assert_same_bits(run(), first, f"1 thread and {two_threads}")


# ---- memory layouts -----------------------------------------------------------------------------


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values with no contiguous dimension."""
    padded = torch.empty([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    view = padded[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def transposed_storage(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def rows_in_a_wider_tensor(tensor: Tensor) -> Tensor:
    """The last dimension contiguous, the others not: what kernels read without a copy."""
    wide = torch.empty([*tensor.shape[:-1], tensor.shape[-1] + 3], dtype=tensor.dtype, device=tensor.device)
    return wide[..., 1 : 1 + tensor.shape[-1]].copy_(tensor)


@EVERY_OP
@pytest.mark.parametrize("layout", [with_gaps, transposed_storage, rows_in_a_wider_tensor])
def test_any_memory_layout(case: OpCase, layout: Callable[[Tensor], Tensor], device: str) -> None:
    for sample in case.samples(torch.float32, device):
        inputs = map_tensors(sample.inputs, lambda t: layout(t.detach()))
        expected = outputs_of(case.op(**sample.inputs))
        assert_same_bits(outputs_of(case.op(**inputs)), expected, sample.id)


@EVERY_OP
def test_expanded_inputs(case: OpCase, device: str) -> None:
    """A batch that is one row with stride 0, in the inputs and in the gradients that come back."""
    for sample in case.samples(torch.float32, device):
        tensors = [value for value in sample.inputs.values() if isinstance(value, Tensor)]
        if any(tensor.shape[0] == 0 for tensor in tensors):
            continue
        expanded = map_tensors(sample.inputs, lambda t: t[:1].expand_as(t))
        copied = map_tensors(expanded, lambda t: t.contiguous())
        assert_same_bits(outputs_of(case.op(**expanded)), outputs_of(case.op(**copied)), sample.id)


@DIFFERENTIABLE_OPS
def test_expanded_gradients(case: OpCase, device: str) -> None:
    """sum().backward() hands over a gradient in which every stride is 0."""
    for sample in case.samples(torch.float64, device):
        names = given(sample.inputs, case.differentiable)
        inputs = require_grad(sample.inputs, names)
        sum(out.sum() for out in differentiable_outputs(case.op(**inputs))).backward()
        exact = require_grad(to_double(sample.inputs), names)
        sum(out.sum() for out in differentiable_outputs(case.reference(**exact))).backward()
        for name in names:
            assert_close(inputs[name].grad, exact[name].grad, torch.float64, f"{sample.id}, gradient to {name}")


# ---- the dispatcher -----------------------------------------------------------------------------


@EVERY_OP
def test_opcheck(case: OpCase, device: str) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs it: pip install expecttest")
    for sample in case.samples(torch.float32, device):
        names = given(sample.inputs, case.differentiable)
        inputs = require_grad(sample.inputs, names)
        schema = case.overload._schema.arguments
        positional = tuple(inputs[a.name] for a in schema if not a.kwarg_only and a.name in inputs)
        keywords = {a.name: inputs[a.name] for a in schema if a.kwarg_only and a.name in inputs}
        torch.library.opcheck(case.overload, positional, keywords)


@EVERY_OP
@EVERY_DTYPE
def test_meta_has_the_shapes_and_dtypes_of_the_result(case: OpCase, dtype: torch.dtype, device: str) -> None:
    for sample in case.samples(dtype, device):
        actual = outputs_of(case.op(**map_tensors(sample.inputs, lambda t: t.to("meta"))))
        expected = outputs_of(case.op(**sample.inputs))
        describe = [(out.shape, out.dtype, out.stride()) for out in expected]
        assert [(out.shape, out.dtype, out.stride()) for out in actual] == describe, sample.id


def invalid_calls() -> list[Any]:
    return [pytest.param(case, call, id=f"{case}-{call.id}") for case in cases.ALL for call in case.invalid("cpu")]


@pytest.mark.parametrize("case, call", invalid_calls())
def test_bad_input_raises_the_same_clear_error_from_real_and_fake_tensors(case: OpCase, call: Invalid) -> None:
    with pytest.raises(ValueError) as real:
        case.op(**call.inputs)
    assert str(real.value).splitlines()[0] == f"{case.name}: {call.message}"
    if call.data_dependent:
        return
    with pytest.raises(ValueError) as meta:
        case.op(**map_tensors(call.inputs, lambda t: t.to("meta")))
    assert str(meta.value).splitlines()[0] == f"{case.name}: {call.message}"
    with FakeTensorMode() as mode, pytest.raises(ValueError) as fake:
        case.op(**map_tensors(call.inputs, mode.from_tensor))
    assert str(fake.value).splitlines()[0] == f"{case.name}: {call.message}"


@EVERY_OP
def test_mixed_devices_raise(case: OpCase) -> None:
    """Each tensor argument in turn on another device than the rest."""
    inputs = case.sized(torch.float32, "cpu", 8)
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    for name in tensors if len(tensors) > 1 else []:
        with pytest.raises(ValueError, match=rf"{case.name}: expected .* device"):
            case.op(**(inputs | {name: inputs[name].to("meta")}))


@PUBLIC_OPS
def test_autocast(case: OpCase, device: str) -> None:
    if case.autocast is None:
        inputs = expected_inputs = case.sized(torch.float32, device, 8)
    else:
        inputs, expected_inputs = case.autocast(device)
    with torch.autocast(device, torch.bfloat16):
        actual = outputs_of(case.op(**inputs))
    assert_same_bits(actual, outputs_of(case.op(**expected_inputs)), "autocast")


@pytest.mark.parametrize("case", [case for case in cases.ALL if case.backward], ids=str)
def test_double_backward_raises_by_name(case: OpCase, device: str) -> None:
    inputs = case.sized(torch.float32, device, 8)
    names = given(inputs, case.differentiable)
    inputs = require_grad(inputs, names)
    outputs = differentiable_outputs(case.op(**inputs))
    grads = [grad.requires_grad_() for grad in cotangents(outputs)]
    first = torch.autograd.grad(outputs, [inputs[names[0]]], grads, create_graph=True)
    with pytest.raises(RuntimeError, match=f"torchops::{case.backward} is not implemented"):
        first[0].sum().backward()


@DIFFERENTIABLE_OPS
def test_torch_func_raises(case: OpCase) -> None:
    inputs = case.sized(torch.float32, "cpu", 8)
    name = case.differentiable[0]

    def loss(tensor: Tensor) -> Tensor:
        return outputs_of(case.op(**(inputs | {name: tensor})))[0].sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(inputs[name])


@PUBLIC_OPS
def test_inference_mode(case: OpCase, device: str) -> None:
    inputs = case.sized(torch.float32, device, 8)
    with torch.inference_mode():
        assert_same_bits(outputs_of(case.op(**inputs)), outputs_of(case.op(**inputs)), "inference mode")


# ---- compilers ----------------------------------------------------------------------------------


def run_with_gradients(op: Callable, inputs: Inputs, names: Sequence[str]) -> list[Tensor]:
    inputs = require_grad(inputs, names)
    outputs = outputs_of(op(**inputs))
    wanted = [out for out in outputs if out.requires_grad]
    if not wanted:
        return outputs
    grads = torch.autograd.grad(wanted, [inputs[name] for name in names], cotangents(wanted))
    return [out.detach() for out in outputs] + list(grads)


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
    assert_same_bits(actual, run_with_gradients(model, inputs, names), case.name)
