"""What is special to the stf family: the packed layout, straight-through gradients, where errors lie, the modules."""

import math
from collections.abc import Iterator
from itertools import chain, combinations, product
from typing import Any

import pytest
import torch
from cases.stf import factored, packed_of
from contract import FLOATS, assert_close, cotangents, require_grad, to_double
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchops
from torchops.reference import stf as reference
from torchops.reference.stf import dense, stf_unpack


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, size) for size in range(1, len(names) + 1)))


# ---- properties ---------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    blocks, basis_size, width = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 4))
    rows, tokens, nnz = draw(st.integers(0, 40)), draw(st.integers(0, 9)), draw(st.integers(0, basis_size))
    transpose = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    values, indices = torchops.stf_select(torch.randn(rows, blocks, basis_size, dtype=torch.float64), nnz)
    return {
        "input": torch.randn(tokens, rows if transpose else blocks * width, dtype=torch.float64),
        "basis": torch.randn(blocks, basis_size, width, dtype=torch.float64),
        "values": values,
        "indices": indices,
        "transpose": transpose,
    }


@settings(deadline=None, max_examples=60)
@given(layers())
def test_packed_layer_computes_what_the_factored_one_does(layer: dict[str, Any]) -> None:
    expected = torchops.stf_linear(**layer)
    values, indices = layer.pop("values"), layer.pop("indices")
    packed_values, mask = torchops.stf_pack(values, indices, layer["basis"].shape[1])
    actual = torchops.stf_linear_packed(**layer, packed_values=packed_values, mask=mask, rows=values.shape[0])
    torch.testing.assert_close(actual, expected)
    unpacked = stf_unpack(packed_values, mask, values.shape[0])
    assert torch.equal(unpacked[0], values) and torch.equal(unpacked[1], indices)


@settings(deadline=None, max_examples=60)
@given(layers())
def test_the_gradient_to_the_input_is_the_layer_with_the_factor_on_the_other_side(layer: dict[str, Any]) -> None:
    input = layer["input"].requires_grad_()
    output = torchops.stf_linear(**layer)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected = torchops.stf_linear(**(layer | {"input": grad, "transpose": not layer["transpose"]}))
    torch.testing.assert_close(input.grad, expected)


@settings(deadline=None, max_examples=60)
@given(layers())
def test_straight_through_gradient_is_that_of_the_dense_factor_that_was_selected(layer: dict[str, Any]) -> None:
    values, indices = layer.pop("values"), layer.pop("indices")
    basis_size = layer["basis"].shape[1]
    shape = (*values.shape[:2], basis_size)
    # Entries that are dropped, below those that are kept, and the factor without them.
    kept = torch.zeros(shape, dtype=torch.float64).scatter(-1, indices.long(), values)
    smallest = values.abs().min().item() if values.numel() else 1.0
    latent = torch.where(kept == 0, smallest / 2, kept).requires_grad_()
    factor = kept.clone().requires_grad_()
    output = torchops.stf_linear_straight_through(**layer, latent=latent, nnz=values.shape[2])
    everything = torchops.stf_linear_straight_through(**layer, latent=factor, nnz=basis_size)
    grad = torch.randn_like(output)
    torch.testing.assert_close(output, everything)
    torch.testing.assert_close(
        torch.autograd.grad(output, latent, grad)[0], torch.autograd.grad(everything, factor, grad)[0]
    )


@pytest.mark.parametrize("transpose", [False, True])
def test_output_has_the_same_bits_whether_or_not_gradients_are_asked_for(transpose: bool) -> None:
    values, indices = torchops.stf_select(torch.randn(40, 2, 9), 4)
    input, basis = torch.randn(7, 40 if transpose else 6), torch.randn(2, 9, 3)
    plain = torchops.stf_linear(input, basis, values, indices, transpose=transpose)
    with_gradient = torchops.stf_linear(input, basis.requires_grad_(), values, indices, transpose=transpose)
    assert with_gradient.requires_grad and torch.equal(plain, with_gradient)


# ---- the packed layout, which files hold --------------------------------------------------------


def test_packed_layout() -> None:
    values = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    indices = torch.tensor([[[0, 2]], [[1, 2]]], dtype=torch.uint8)
    packed_values, mask = torchops.stf_pack(values, indices, basis_size=3)
    # Rows 2..15 are not there: zeros at columns 0 and 1.
    assert packed_values.tolist() == [[[1.0] + [0.0] * 14 + [3.0] + [0.0] * 14 + [2.0, 4.0]]]
    assert (mask.int() & 0xFFFF).tolist() == [[[0b1111111111111101, 0b1111111111111110, 0b11]]]
    assert mask.dtype == torch.int16


def test_packed_layout_of_several_groups_and_blocks() -> None:
    """Row r of 18 has in block b the column (r + b) % 4 with the value 100 b + r."""
    rows, blocks = torch.arange(18)[:, None, None], torch.arange(2)[None, :, None]
    packed_values, mask = torchops.stf_pack((100.0 * blocks + rows), ((rows + blocks) % 4).to(torch.uint8), 4)
    assert packed_values.shape == (2, 2, 16) and mask.shape == (2, 2, 4)
    assert packed_values[0, 0].int().tolist() == [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    assert packed_values[0, 1, :5].int().tolist() == [103, 107, 111, 115, 100]
    assert (mask[0, 0].int() & 0xFFFF).tolist() == [0x1111, 0x2222, 0x4444, 0x8888]
    # Rows 16 and 17 and those behind them, at column 0: 16 % 4 = 0 in block 0, 17 % 4 = 1.
    assert packed_values[1, 0].int().tolist() == [16] + [0] * 14 + [17]
    assert (mask[1, 0].int() & 0xFFFF).tolist() == [0xFFFD, 0x0002, 0, 0]


def test_packed_factors_have_no_gradient() -> None:
    basis = torch.randn(1, 5, 6, requires_grad=True)
    packed_values, mask = torchops.stf_pack(*torchops.stf_select(torch.randn(8, 1, 5), 2), 5)
    output = torchops.stf_linear_packed(torch.randn(3, 6), basis, packed_values, mask, 8)
    with pytest.raises(RuntimeError, match="torchops::stf_linear_packed is not implemented"):
        output.sum().backward()


# ---- what is saved for the backward -------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "form, names",
    [
        *product(("factored", "straight-through"), subsets(("input", "basis", "factor", "bias"))),
        *product(("packed",), subsets(("input", "bias"))),
    ],
)
def test_only_what_the_gradients_take_is_saved(form: str, names: tuple[str, ...], transpose: bool) -> None:
    """A frozen layer keeps its weight, as nn.Linear does, and none of the tokens."""
    num_tokens, rows, cols, basis_size, nnz = 100, 24, 30, 13, 5
    latent = torch.randn(rows, 2, basis_size)
    values, indices = torchops.stf_select(latent, nnz)
    packed_values, mask = torchops.stf_pack(values, indices, basis_size)
    tensors = {
        "input": torch.randn(num_tokens, rows if transpose else cols),
        "basis": torch.randn(2, basis_size, cols // 2),
        "factor": {"factored": values, "straight-through": latent, "packed": packed_values}[form],
        "bias": torch.randn(cols if transpose else rows),
    }
    for name in names:
        tensors[name].requires_grad_()
    input, basis, factor, bias = tensors.values()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        if form == "factored":
            output = torchops.stf_linear(input, basis, factor, indices, bias, transpose)
        elif form == "packed":
            output = torchops.stf_linear_packed(input, basis, factor, mask, rows, bias, transpose)
        else:
            output = torchops.stf_linear_straight_through(input, basis, factor, nnz, bias, transpose)
    packed = form == "packed"
    atoms_bytes, factor_bytes = 4 * 2 * num_tokens * basis_size, packed_values.nbytes if packed else values.nbytes
    index_bytes = mask.nbytes if packed else indices.nbytes
    # By gradient; a dict, for what serves two is saved once.
    takes: dict[str, int] = {}
    if "input" in names:
        takes |= {"basis": basis.nbytes, "values": factor_bytes, "indices": index_bytes}
    if "basis" in names:
        takes |= (
            {"atoms": atoms_bytes}
            if transpose
            else {
                "input": input.nbytes,
                "values": factor_bytes,
                "indices": index_bytes,
            }
        )
    if "factor" in names:
        takes |= {"basis": basis.nbytes, "input": input.nbytes} if transpose else {"atoms": atoms_bytes}
        takes |= {} if form == "straight-through" else {"indices": index_bytes}
    assert sum(saved) == sum(takes.values())
    output.sum().backward()
    assert all((tensor.grad is not None) == (name in names) for name, tensor in tensors.items())


def test_a_layer_without_a_gradient_to_its_output_has_none() -> None:
    """Not zeros in the size of the weights."""

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input: Tensor) -> Tensor:
            return input.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    basis, latent = torch.randn(1, 5, 6, requires_grad=True), torch.randn(8, 1, 5, requires_grad=True)
    input = torch.randn(3, 6, requires_grad=True)
    values, indices = torchops.stf_select(latent, 2)
    packed_values, mask = torchops.stf_pack(values.detach(), indices, 5)
    outputs = [
        torchops.stf_linear(input, basis, values, indices),
        torchops.stf_linear_straight_through(input, basis, latent, 2),
        torchops.stf_linear_packed(input, basis.detach(), packed_values, mask, 8),
        torchops.stf_project(latent[:, 0], basis.detach().new_ones(1, 3, 5), 2)[0],
    ]
    for output in outputs:
        assert torch.autograd.grad(Undefined.apply(output).sum(), [input, basis, latent], allow_unused=True) == (
            None,
            None,
            None,
        )


# ---- awkward data -------------------------------------------------------------------------------


def test_select_takes_nan_first_and_the_lower_index_among_equals() -> None:
    nan = float("nan")
    latent = torch.tensor([[[1.0, -1.0, 1.0, -1.0]], [[0.0, -0.0, nan, 9.0]], [[-7.0, 5.0, 7.0, 6.0]]])
    values, indices = torchops.stf_select(latent, 2)
    assert indices.flatten(1).tolist() == [[0, 1], [2, 3], [0, 2]]
    torch.testing.assert_close(values.flatten(1), torch.tensor([[1.0, -1.0], [nan, 9.0], [-7.0, 7.0]]), equal_nan=True)


def test_an_index_that_stands_twice_counts_twice() -> None:
    basis, values = torch.randn(1, 4, 6), torch.randn(5, 1, 3)
    indices = torch.full((5, 1, 3), 2, dtype=torch.uint8)
    once = torchops.stf_linear(torch.eye(6), basis, values.sum(-1, keepdim=True), indices[..., :1])
    torch.testing.assert_close(torchops.stf_linear(torch.eye(6), basis, values, indices), once)


def nonfinite_calls(packed: bool, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """A NaN or an infinity that reaches some of the outputs, by few tokens and many: no zero is multiplied by it."""
    for num_tokens, transpose in product((1, 3, 20, 70, 130), (False, True)):
        inputs = factored(((num_tokens,), 2, 6, 8, 36, 2), transpose, dtype, "cpu")
        for argument, place in (("basis", (1, 2, 3)), ("values", (17, 0, 1)), ("input", (-1, 5))):
            if argument == "input" and transpose:
                continue  # gradients to all of the basis are NaN where some or all have to be
            changed = inputs[argument].clone()
            changed[place] = math.nan
            yield f"NaN in {argument}, T {num_tokens}, transpose {transpose}", inputs | {argument: changed}
        if packed and not transpose:
            # All of one sign: an infinity and its negative have no sum. Gradients to the factors have both.
            changed = inputs["input"].abs()
            changed[-1, 5] = math.inf
            positive = {name: inputs[name].abs() + 0.5 for name in ("basis", "values")}
            yield f"infinity in input, T {num_tokens}", inputs | positive | {"input": changed}


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_what_a_nonfinite_number_reaches_matches_reference(packed: bool, dtype: torch.dtype) -> None:
    op = torchops.stf_linear_packed if packed else torchops.stf_linear
    names = ["input", "bias"] if packed else ["input", "basis", "values", "bias"]
    for what, call in nonfinite_calls(packed, dtype):
        inputs = packed_of(call) if packed else call
        actual, exact = require_grad(inputs, names), require_grad(to_double(inputs), names)
        output = op(**actual)
        expected = (reference.stf_linear_packed if packed else reference.stf_linear)(**exact)
        assert_close(output, expected, dtype, what)
        grad = cotangents([expected])[0].to(dtype)
        grads = torch.autograd.grad(output, [actual[name] for name in names], grad)
        exact_grads = torch.autograd.grad(expected, [exact[name] for name in names], grad.double())
        for name, one, other in zip(names, grads, exact_grads, strict=True):
            assert_close(one, other, dtype, f"{what}, gradient to {name}")


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 20, 70, 200])
def test_repeated_indices_are_summed_in_a_wide_type(num_tokens: int, dtype: torch.dtype) -> None:
    """From 256 on, adding 1 in bfloat16 changes nothing."""
    repeats = 512
    values = torch.ones(3, 1, repeats, dtype=dtype)
    indices = torch.full((3, 1, repeats), 5, dtype=torch.int16)
    basis = torch.ones(1, 600, 1, dtype=dtype)
    output = torchops.stf_linear(torch.ones(num_tokens, 1, dtype=dtype), basis, values, indices)
    assert output.eq(repeats).all()


@pytest.mark.numeric
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 20, 70, 200])
def test_an_atom_that_overflows_reaches_the_rows_that_have_it(
    num_tokens: int, dtype: torch.dtype, packed: bool
) -> None:
    """Zeros times infinity would be NaN."""
    values, indices = torchops.stf_select(torch.randn(40, 2, 6, dtype=dtype), 2)
    basis = torch.randn(2, 6, 4, dtype=dtype)
    input = torch.randn(num_tokens, 8, dtype=dtype)
    largest = torch.finfo(dtype).max
    basis[1, 3], input[-1, 4:] = largest / 2, 2.0
    layer = {"input": input, "basis": basis}
    if packed:
        packed_values, mask = torchops.stf_pack(values, indices, 6)
        output = torchops.stf_linear_packed(**layer, packed_values=packed_values, mask=mask, rows=40)
    else:
        output = torchops.stf_linear(**layer, values=values, indices=indices)
    has_atom = indices[:, 1].eq(3).any(-1)
    assert 0 < has_atom.sum() < 40
    assert not output[-1, has_atom].isfinite().any()
    expected = torch.nn.functional.linear(input.double(), dense(basis.double(), values.double(), indices))
    torch.testing.assert_close(output[-1, ~has_atom].double(), expected[-1, ~has_atom], rtol=0.03, atol=0.1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_nan_stays_in_its_token(transpose: bool, packed: bool) -> None:
    """Tokens lie side by side in a vector."""
    values, indices = torchops.stf_select(torch.randn(20, 2, 5), 3)
    input, basis = torch.randn(9, 20 if transpose else 6), torch.randn(2, 5, 3)

    def layer(input: Tensor) -> Tensor:
        if packed:
            return torchops.stf_linear_packed(input, basis, *torchops.stf_pack(values, indices, 5), 20, None, transpose)
        return torchops.stf_linear(input, basis, values, indices, None, transpose)

    expected = layer(input)
    input[4, 1] = float("nan")
    actual = layer(input)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(actual[others], expected[others]) and actual[4].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_first_wrong_index_is_reported(transpose: bool, tokens: int, dtype: torch.dtype, two_threads: int) -> None:
    rows = 1500
    values, indices = torchops.stf_select(torch.randn(rows, 2, 9, dtype=dtype), 4)
    indices[1400, 1, 0] = 10
    indices[700, 1, 2] = 9
    indices[700, 1, 3] = 200
    input, basis = torch.randn(tokens, rows if transpose else 6, dtype=dtype), torch.randn(2, 9, 3, dtype=dtype)
    for threads in (1, two_threads):
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match=r"expected indices in 0..8, got 9 at \[700, 1, 2\]"):
            torchops.stf_linear(input, basis, values, indices, transpose=transpose)
    with pytest.raises(ValueError, match=r"stf_pack: expected indices in 0..8, got 9 at \[700, 1, 2\]"):
        torchops.stf_pack(values, indices, 9)


def test_dense_multiplies_the_factors() -> None:
    """The form in the documentation, entry by entry."""
    basis, values = torch.randn(2, 4, 3), torch.randn(5, 2, 2)
    indices = torch.tensor([[0, 2], [1, 3]], dtype=torch.uint8).expand(5, 2, 2)
    expected = torch.zeros(5, 6)
    for row in range(5):
        for block in range(2):
            for e in range(2):
                expected[row, 3 * block : 3 * block + 3] += (
                    values[row, block, e] * basis[block, indices[row, block, e].item()]
                )
    torch.testing.assert_close(dense(basis, values, indices), expected)
