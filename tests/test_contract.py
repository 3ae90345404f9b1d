"""Every operator against every contract, driven by the case tables in tests/cases."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import cuda_on_host
import pytest
import torch
from cases import EVERY_DTYPE, EVERY_OP, PUBLIC_OPS
from contract import (
    LARGE,
    Invalid,
    OpCase,
    assert_close,
    assert_same_bits,
    given,
    gradients,
    map_tensors,
    outputs_of,
    require_grad,
    to_double,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchops
from torchops._namespace import NAMESPACE


def registered_schemas() -> dict[str, torch.FunctionSchema]:
    prefix = f"{NAMESPACE}::"
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name.removeprefix(prefix): schema for schema in schemas if schema.name.startswith(prefix)}


def test_every_registered_operator_has_a_case() -> None:
    assert registered_schemas().keys() == {case.name for case in cases.ALL}


def test_tensors_are_no_keyword_only_arguments() -> None:
    """torch.library.register_vmap and DTensor's register_sharding refuse those."""
    for name, schema in registered_schemas().items():
        keywords = [argument for argument in schema.arguments if argument.kwarg_only]
        assert not [argument.name for argument in keywords if "Tensor" in str(argument.type)], name


SOURCES = Path(__file__).parent.parent / "csrc"


@pytest.mark.skipif(not SOURCES.exists(), reason="needs the sources")
@pytest.mark.parametrize("floor", ["cpu", "cuda"])
def test_every_operator_is_on_every_floor(floor: str) -> None:
    """A build without CUDA would not miss a CUDA kernel that was forgotten."""
    sources = "".join(path.read_text() for path in SOURCES.glob(f"*/{floor}/*.cpp"))
    assert {case.name for case in cases.ALL} == set(re.findall(r'm\.impl\("(\w+)"', sources))


@PUBLIC_OPS
def test_names_are_the_same_everywhere(case: OpCase) -> None:
    assert getattr(torchops, case.name).__doc__, f"torchops.{case.name} has no documentation"
    assert case.reference is not None and case.reference.__name__ == case.name
    # The function's order is the reference's, the operator has its tensors first.
    arguments = [argument.name for argument in torch.jit.script(getattr(torchops, case.name)).schema.arguments]
    assert arguments == list(inspect.signature(case.reference).parameters)
    assert sorted(arguments) == sorted(argument.name for argument in case.overload._schema.arguments)


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.way("eager")
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
@EVERY_OP
@EVERY_DTYPE
def test_same_bits_every_time_and_for_any_number_of_threads(
    case: OpCase, dtype: torch.dtype, device: str, two_threads: int
) -> None:
    # The host executes a fiber for each CUDA thread; several blocks are enough there.
    inputs = case.sized(dtype, device, 200 if cuda_on_host.ACTIVE else LARGE)
    names = given(inputs, case.differentiable)

    def run() -> list[Tensor]:
        results = outputs_of(case.op(**inputs))
        return results + (gradients(case.op, inputs, names) if names else [])

    first = run()
    if cuda_on_host.ACTIVE:
        with cuda_on_host.random_order():
            assert_same_bits(run(), first, "another order of threads and blocks")
        return
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
        inputs = map_tensors(sample.inputs, lambda t: layout(t.detach()) if t.dim() > 0 else t)
        as_they_lie = {name: sample.inputs[name] for name in case.bits_follow_layout if name in sample.inputs}
        expected = outputs_of(case.op(**sample.inputs))
        assert_same_bits(outputs_of(case.op(**(inputs | as_they_lie))), expected, sample.id)
        tolerance = max(case.output_tolerance.get(torch.float32, 0), cases.backward_tolerance(case, torch.float32))
        for index, (one, other) in enumerate(zip(outputs_of(case.op(**inputs)), expected, strict=True)):
            exact = other.double() if other.is_floating_point() else other
            assert_close(one, exact, torch.float32, f"{sample.id}, output {index}", tolerance)


@EVERY_OP
def test_expanded_inputs(case: OpCase, device: str) -> None:
    """A batch that is one row with stride 0, in the inputs and in the gradients that come back."""
    for sample in case.samples(torch.float32, device):
        tensors = [value for value in sample.inputs.values() if isinstance(value, Tensor)]
        if any(tensor.shape[:1] == (0,) for tensor in tensors):
            continue
        expanded = map_tensors(sample.inputs, lambda t: t.contiguous()[:1].expand_as(t) if t.dim() > 0 else t)
        expanded |= {name: sample.inputs[name] for name in case.not_expanded}
        copied = map_tensors(expanded, lambda t: t.contiguous())
        assert_same_bits(outputs_of(case.op(**expanded)), outputs_of(case.op(**copied)), sample.id)


# ---- the dispatcher -----------------------------------------------------------------------------


@EVERY_OP
def test_opcheck(case: OpCase, device: str) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs it: pip install expecttest")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for number, sample in enumerate(case.samples(torch.float32, device)):
        names = given(sample.inputs, case.differentiable)
        inputs = require_grad(sample.inputs, names)
        schema = case.overload._schema.arguments
        positional = tuple(inputs.get(a.name, a.default_value) for a in schema if not a.kwarg_only)
        keywords = {a.name: inputs[a.name] for a in schema if a.kwarg_only and a.name in inputs}
        # The last takes most of the time, and is what test_compile does with every sample.
        torch.library.opcheck(case.overload, positional, keywords, test_utils=checks if number == 0 else checks[:3])


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


@PUBLIC_OPS
def test_inference_mode(case: OpCase, device: str) -> None:
    inputs = case.sized(torch.float32, device, 8)
    expected = outputs_of(case.op(**inputs))
    with torch.inference_mode():
        assert_same_bits(outputs_of(case.op(**inputs)), expected, "inference mode")


@PUBLIC_OPS
def test_vmap(case: OpCase, device: str) -> None:
    """Over the first tensor: what the operator gives call by call."""
    inputs = case.sized(torch.float32, device, 8)
    name = next(name for name, value in inputs.items() if isinstance(value, Tensor))
    stacked = torch.stack([inputs[name], inputs[name].flip(-1)])
    actual = torch.func.vmap(lambda tensor: tuple(outputs_of(case.op(**(inputs | {name: tensor})))))(stacked)
    for index, one in enumerate(stacked):
        expected = outputs_of(case.op(**(inputs | {name: one})))
        assert_same_bits([out[index] for out in actual], expected, f"call {index}")
