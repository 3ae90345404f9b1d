"""Every operator's derivatives against the contract, driven by the case tables in tests/cases."""

from collections.abc import Callable, Iterator

import cases
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import DIFFERENTIABLE_OPS, EVERY_DTYPE, PUBLIC_OPS
from contract import (
    FOR_ONE_LEVEL,
    OpCase,
    assert_close,
    assert_same_bits,
    cotangents,
    differentiable_outputs,
    given,
    gradients_of,
    outputs_of,
    require_grad,
    subsets,
    to_double,
)
from torch import Tensor


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


def largest_number(tensor: Tensor) -> float:
    """In magnitude, of those that are finite; 0 for integers, of which none is stepped."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0
    return tensor.abs().nan_to_num(posinf=0, nan=0).max().item()


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
        if any(largest_number(value) > 1e3 for value in sample.inputs.values() if isinstance(value, Tensor)):
            continue  # beside such numbers the step of finite differences vanishes
        inputs = require_grad(sample.inputs, names)

        def call(*tensors: Tensor, names=names, inputs=inputs) -> tuple[Tensor, ...]:
            outputs = outputs_of(case.op(**(inputs | dict(zip(names, tensors, strict=True)))))
            return tuple(out.masked_fill(out.isinf(), 0) for out in outputs)  # a difference of infinities is NaN

        assert torch.autograd.gradcheck(call, [inputs[name] for name in names]), sample.id


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


@DIFFERENTIABLE_OPS
def test_a_loss_on_one_output_only(case: OpCase, device: str) -> None:
    """What does not depend on it has no gradient, rather than one of zeros."""
    for sample in case.samples(torch.float64, device):
        names = given(sample.inputs, case.differentiable)
        inputs, exact = require_grad(sample.inputs, names), require_grad(to_double(sample.inputs), names)
        outputs, exact_outputs = outputs_of(case.op(**inputs)), outputs_of(case.reference(**exact))
        for index, (out, exact_out) in enumerate(zip(outputs, exact_outputs, strict=True)):
            assert out.requires_grad == exact_out.requires_grad, f"{sample.id}, output {index}"
            if not out.requires_grad:
                continue
            grads = [cotangents([out])[0], cotangents([exact_out])[0]]
            actual = torch.autograd.grad(
                out, [inputs[name] for name in names], grads[0], allow_unused=True, retain_graph=True
            )
            expected = torch.autograd.grad(
                exact_out, [exact[name] for name in names], grads[1], allow_unused=True, retain_graph=True
            )
            for name, one, other in zip(names, actual, expected, strict=True):
                what = f"{sample.id}, gradient of output {index} to {name}"
                assert (one is None) == (other is None), what
                if one is not None:
                    assert_close(one, other, torch.float64, what, case.gradient_tolerance.get(torch.float64, 0))


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


# ---- forward mode -------------------------------------------------------------------------------


def tangent_of(case: OpCase, op: Callable, inputs: dict, name: str, tangent: Tensor) -> Iterator[Tensor]:
    """Of each floating output, in the direction of one input, by dual numbers."""
    with forward_ad.dual_level():
        outputs = outputs_of(op(**(inputs | {name: forward_ad.make_dual(inputs[name], tangent)})))
        for out in outputs:
            if out.is_floating_point():
                of_out = forward_ad.unpack_dual(out).tangent
                yield torch.zeros_like(out) if of_out is None else of_out


@DIFFERENTIABLE_OPS
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_is_right_or_refused_by_name(case: OpCase, grad_mode: bool, device: str) -> None:
    inputs = case.sized(torch.float64, device, 8)
    for name in given(inputs, case.differentiable):
        tangent = cotangents([inputs[name]])[0]
        call = lambda tensor, name=name: outputs_of(case.op(**(inputs | {name: tensor})))  # noqa: E731
        with torch.set_grad_enabled(grad_mode):
            try:
                actual = list(tangent_of(case, case.op, inputs, name, tangent))
            except NotImplementedError as refusal:
                assert str(refusal).startswith(f"{case.name}: the derivative"), name
                with pytest.raises(NotImplementedError, match=f"{case.name}: the derivative"):
                    torch.func.jvp(call, (inputs[name],), (tangent,))
                continue
        expected = list(tangent_of(case, case.reference, inputs, name, tangent))
        by_transform = [out for out in torch.func.jvp(call, (inputs[name],), (tangent,))[1] if out.is_floating_point()]
        for index, (one, other, third) in enumerate(zip(actual, expected, by_transform, strict=True)):
            what = f"{name}, output {index}"
            assert_close(one, other, torch.float64, what, case.gradient_tolerance.get(torch.float64, 0))
            assert_same_bits([third], [one], what)


@PUBLIC_OPS
def test_forward_mode_of_what_has_no_derivative(case: OpCase, device: str) -> None:
    """An operator without gradients whose outputs are numbers says so instead of giving zero."""
    inputs = case.sized(torch.float64, device, 8)
    for name, value in inputs.items():
        if name in case.differentiable or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if not any(out.is_floating_point() for out in outputs_of(case.op(**inputs))):
            continue
        with pytest.raises((NotImplementedError, RuntimeError), match=case.name):
            list(tangent_of(case, case.op, inputs, name, torch.ones_like(value)))


# ---- where gradients are computed ---------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in cases.PUBLIC if case.differentiable], ids=str)
def test_gradients_under_autocast(case: OpCase, device: str) -> None:
    """They come back in the dtypes of the inputs, as those of the same call without it."""
    if case.autocast is None:
        inputs = expected_inputs = case.sized(torch.float32, device, 8)
    else:
        inputs, expected_inputs = case.autocast(device)
    names = given(inputs, case.differentiable)
    inputs, expected_inputs = require_grad(inputs, names), require_grad(expected_inputs, names)
    with torch.autocast(device, torch.bfloat16):
        outputs = differentiable_outputs(case.op(**inputs))
    expected_outputs = differentiable_outputs(case.op(**expected_inputs))
    actual = torch.autograd.grad(outputs, [inputs[name] for name in names], cotangents(outputs))
    expected = torch.autograd.grad(expected_outputs, [expected_inputs[name] for name in names], cotangents(outputs))
    for name, one, other in zip(names, actual, expected, strict=True):
        assert one.dtype == inputs[name].dtype, name
        assert_same_bits([one], [other.to(one.dtype)], name)
