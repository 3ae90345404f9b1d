"""The stf family: linear layers with a sparse factor."""

from collections.abc import Iterator
from typing import Any

import torch
from contract import Inputs, Invalid, OpCase, Sample, lowered, random
from torch import Tensor

from torchops._namespace import operators
from torchops.reference import stf as reference

from .stf_sparse_factor import invalid_indices, random_indices

# Leading sizes of the input, blocks, K, cols, rows, nnz. Kernels take rows by 16, 32 and 256, and tokens by up to 128.
Shape = tuple[tuple[int, ...], int, int, int, int, int]
SHAPES: dict[str, Shape] = {
    "plain": ((5,), 1, 4, 6, 7, 2),
    "one-number": ((1,), 1, 1, 1, 1, 1),
    "vector": ((), 2, 5, 6, 9, 3),
    "leading-sizes": ((2, 3), 2, 7, 10, 17, 3),
    "one-token": ((1,), 4, 6, 8, 35, 3),
    "T40": ((40,), 2, 9, 14, 37, 4),
    "T150": ((3, 50), 1, 11, 5, 48, 5),
    "many-tokens-of-blocks": ((100,), 3, 5, 12, 20, 2),
    "chunks-of-rows": ((70,), 2, 37, 6, 300, 5),
    "chunks-of-atoms": ((33,), 1, 600, 5, 9, 40),
    "parts-of-rows": ((3,), 2, 6, 4, 1100, 2),
    "K256": ((2,), 1, 256, 9, 16, 130),
    "K257": ((5,), 2, 257, 8, 11, 70),
    "all-of-K": ((9,), 4, 6, 12, 33, 6),
    "nnz0": ((5,), 2, 4, 6, 7, 0),
    "T0": ((2, 0), 2, 4, 6, 7, 2),
    "rows0": ((5,), 2, 4, 6, 0, 2),
    "cols0": ((5,), 2, 4, 0, 7, 2),
    "blocks0": ((5,), 0, 4, 0, 7, 2),
}


def layer_inputs(shape: Shape, transpose: bool, dtype: torch.dtype, device: str, bias: bool = True) -> Inputs:
    """The arguments that every layer has."""
    leading, blocks, basis_size, cols, rows, _ = shape
    inputs: Inputs = {
        "input": random(*leading, rows if transpose else cols, dtype=dtype, device=device),
        "basis": random(blocks, basis_size, cols // max(blocks, 1), dtype=dtype, device=device, seed=1),
    }
    if bias:
        inputs["bias"] = random(cols if transpose else rows, dtype=dtype, device=device, seed=2)
    return inputs | {"transpose": transpose}


def factored(shape: Shape, transpose: bool, dtype: torch.dtype, device: str, bias: bool = True) -> Inputs:
    _, blocks, basis_size, _, rows, nnz = shape
    return layer_inputs(shape, transpose, dtype, device, bias) | {
        "values": random(rows, blocks, nnz, dtype=dtype, device=device, seed=3),
        "indices": random_indices(rows, blocks, basis_size, nnz, device),
    }


def with_latent(shape: Shape, transpose: bool, dtype: torch.dtype, device: str, bias: bool = True) -> Inputs:
    _, blocks, basis_size, _, rows, nnz = shape
    return layer_inputs(shape, transpose, dtype, device, bias) | {
        "latent": random(rows, blocks, basis_size, dtype=dtype, device=device, seed=3),
        "nnz": nnz,
    }


def packed(shape: Shape, transpose: bool, dtype: torch.dtype, device: str, bias: bool = True) -> Inputs:
    return packed_of(factored(shape, transpose, dtype, device, bias))


def packed_of(inputs: Inputs) -> Inputs:
    """By the reference, so that the operator that packs is not needed to test the one that computes."""
    given = {name: value for name, value in inputs.items() if name not in ("values", "indices")}
    values = inputs["values"]
    packed_values, mask = reference.stf_pack(values, inputs["indices"], inputs["basis"].shape[1])
    return given | {"packed_values": packed_values, "mask": mask, "rows": values.shape[0]}


def layer_samples(make: Any, names: Any, dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Each shape with the sparse factor on the output's and on the input's side, with and without a bias."""
    for index, name in enumerate(names):
        for transpose in (False, True):
            bias = (index + transpose) % 2 == 0
            yield Sample(
                f"{name}{'-transpose' if transpose else ''}", make(SHAPES[name], transpose, dtype, device, bias)
            )


# ---- stf_linear ---------------------------------------------------------------------------------


def stf_linear_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    yield from layer_samples(factored, SHAPES, dtype, device)
    for name in ("plain", "many-tokens-of-blocks"):
        for transpose in (False, True):
            inputs = factored(SHAPES[name], transpose, dtype, device)
            side = "-transpose" if transpose else ""
            # What stf_pack refuses, and int16 where uint8 would do.
            indices = inputs["indices"].to(torch.int16).flip(-1)
            indices[3] = 1
            yield Sample(f"unordered-{name}{side}", inputs | {"indices": indices})


# A good call that the invalid ones change: cols 6, rows 7.
GOOD: Shape = ((5,), 2, 4, 6, 7, 3)


def invalid_layer(device: str, good: Inputs, sparse: str) -> Iterator[Invalid]:
    """What every layer refuses. `sparse` is the argument that holds the sparse factor."""
    input, basis, bias = good["input"], good["basis"], good.get("bias")
    rank = {"values": "[rows, blocks, nnz]", "latent": "[rows, blocks, K]"}.get(sparse)
    if rank:
        shape = list(good[sparse].shape[1:])
        yield Invalid(
            f"{sparse}-rank", good | {sparse: good[sparse][0]}, f"expected {sparse} of shape {rank}, got {shape}"
        )
    yield Invalid("scalar", good | {"input": input[0, 0]}, "expected input of shape [..., in], got []")
    yield Invalid(
        "dtype", good | {"input": input.int()}, "expected input of dtype Double, Float, BFloat16 or Half, got Int"
    )
    yield Invalid(
        "basis-rank", good | {"basis": basis[0]}, "expected basis of shape [blocks, K, cols / blocks], got [4, 3]"
    )
    yield Invalid("basis-dtype", good | {"basis": basis.half()}, "expected basis of input's dtype Float, got Half")
    for size in (0, 32768):
        yield Invalid(
            f"K{size}",
            good | {"basis": torch.zeros(2, size, 3, device=device)},
            f"expected basis's second dimension K in 1..32767, got {size}",
        )
    yield Invalid("in", good | {"input": input[:, :5]}, "expected input's last dimension to be cols = 6, got 5")
    yield Invalid(
        "in-transpose",
        good | {"transpose": True},
        "expected input's last dimension to be rows = 7, got 6",
    )
    yield Invalid(
        f"{sparse}-dtype",
        good | {sparse: good[sparse].double()},
        f"expected {sparse} of input's dtype Float, got Double",
    )
    if bias is not None:
        yield Invalid("bias-rank", good | {"bias": bias[None]}, "expected bias of shape [out], got [1, 7]")
        yield Invalid("bias-shape", good | {"bias": bias[1:]}, "expected bias of shape [out] = [7], got [6]")
        yield Invalid(
            "bias-shape-transpose",
            good | {"input": torch.zeros(5, 7, device=device), "transpose": True},
            "expected bias of shape [out] = [6], got [7]",
        )
        yield Invalid("bias-dtype", good | {"bias": bias.double()}, "expected bias of input's dtype Float, got Double")


def invalid_factored(device: str, good: Inputs) -> Iterator[Invalid]:
    yield from invalid_layer(device, good, "values")
    values, indices = good["values"], good["indices"]
    yield Invalid(
        "values-blocks",
        good | {"values": values[:, :1]},
        "expected values of shape [rows, blocks, nnz] = [7, 2, 3], got [7, 1, 3]",
    )
    yield Invalid(
        "nnz",
        good | {"values": torch.zeros(7, 2, 5, device=device)},
        "expected values' last dimension nnz <= K = 4, got 5",
    )
    yield Invalid(
        "indices-shape",
        good | {"indices": indices[..., :2]},
        "expected indices of shape [rows, blocks, nnz] = [7, 2, 3], got [7, 2, 2]",
    )
    yield Invalid(
        "indices-dtype", good | {"indices": indices.long()}, "expected indices of dtype Byte or Short, got Long"
    )


def stf_linear_invalid(device: str) -> Iterator[Invalid]:
    good = factored(GOOD, False, torch.float32, device)
    yield from invalid_factored(device, good)
    yield from invalid_indices(good)
    transposed = factored(GOOD, True, torch.float32, device)
    for call in invalid_indices(transposed):
        yield Invalid(f"{call.id}-transpose", call.inputs, call.message, data_dependent=True)


def tokens_of(length: int) -> Shape:
    return ((length,), 2, 24, 96, 80, 10)


def stf_linear_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return factored(tokens_of(length), False, dtype, device)


# Calls with more than 2^31 elements, in 4 GB a tensor. Of a layer that is the factor, without a zero in it.
# The last token alone goes by other kernels than all together: sums of few ones have the same bits in any order.
LARGE_ROWS, LARGE_BASIS, LARGE_TOKENS = 2**17 + 1, 2**14, 40


def ones(*shape: int, device: str, share: float = 1) -> Tensor:
    """-1, 0 and 1; about so much of it is not left 0."""
    tensor = torch.randint(-1, 2, shape, dtype=torch.bfloat16, device=device)
    return tensor if share == 1 else tensor * (torch.rand(shape, device=device) < share)


def large_layer(device: str) -> Inputs:
    return {
        "input": ones(LARGE_TOKENS, 8, device=device),
        "basis": ones(1, LARGE_BASIS, 8, device=device, share=8 / LARGE_BASIS),
    }


def stf_linear_large(device: str) -> Inputs:
    indices = torch.arange(LARGE_BASIS, dtype=torch.int16, device=device)
    return large_layer(device) | {
        "values": ones(LARGE_ROWS, 1, LARGE_BASIS, device=device),
        "indices": indices.repeat(LARGE_ROWS, 1, 1),
    }


def stf_linear_autocast(device: str) -> tuple[Inputs, Inputs]:
    return lowered(stf_linear_sized(torch.float32, device, 8))


# ---- _stf_linear_with_atoms, _stf_linear_backward -----------------------------------------------

INTERNAL_SHAPES = ("plain", "vector", "leading-sizes", "K257", "nnz0", "T0", "rows0", "cols0")


def with_atoms_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    return layer_samples(factored, INTERNAL_SHAPES, dtype, device)


def with_atoms_invalid(device: str) -> Iterator[Invalid]:
    return invalid_factored(device, factored(GOOD, False, torch.float32, device))


def backward_inputs(inputs: Inputs) -> Inputs:
    output, atoms = operators._stf_linear_with_atoms(**inputs)
    return {name: value for name, value in inputs.items() if name != "bias"} | {
        "grad_output": random(*output.shape, dtype=output.dtype, device=output.device.type, seed=5),
        "atoms": atoms,
        "basis_sizes": list(inputs["basis"].shape),
        "to_latent": False,
        "output_mask": [True] * 4,
    }


def needed(inputs: Inputs) -> Inputs:
    """Without what no gradient that is asked for takes."""
    to_input, to_basis, to_values, _ = inputs["output_mask"]
    transpose = inputs["transpose"]
    takes = {
        "input": to_values if transpose else to_basis,
        "basis": to_input or (transpose and to_values),
        "values": to_input or (not transpose and to_basis),
        "atoms": to_basis if transpose else to_values,
    }
    takes["indices"] = takes["values"] or (to_values and not inputs["to_latent"])
    return {name: None if takes.get(name) is False else value for name, value in inputs.items()}


def backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in layer_samples(factored, INTERNAL_SHAPES, dtype, device):
        inputs = backward_inputs(sample.inputs)
        yield Sample(sample.id, inputs)
        yield Sample(f"{sample.id}-to-latent", inputs | {"to_latent": True})
        if sample.id.startswith("leading-sizes"):
            for index, name in enumerate(("input", "basis", "values", "bias")):
                alone = inputs | {"output_mask": [index == i for i in range(4)]}
                yield Sample(f"{sample.id}-to-{name}", needed(alone))
                if name == "values":
                    yield Sample(f"{sample.id}-to-latent-alone", needed(alone | {"to_latent": True}))


def backward_invalid(device: str) -> Iterator[Invalid]:
    good = backward_inputs(factored(GOOD, False, torch.float32, device))
    yield from invalid_factored(device, good)
    yield from invalid_indices(good)
    yield Invalid(
        "grad-shape",
        good | {"grad_output": good["grad_output"][:, 1:]},
        "expected grad_output of shape [5, 7], got [5, 6]",
    )
    yield Invalid(
        "grad-dtype",
        good | {"grad_output": good["grad_output"].half()},
        "expected grad_output of input's dtype Float, got Half",
    )
    yield Invalid(
        "atoms-shape",
        good | {"atoms": good["atoms"][:, :4]},
        "expected atoms of shape [blocks, T, K] = [2, 5, 4], got [2, 4, 4]",
    )
    yield Invalid(
        "atoms-dtype",
        good | {"atoms": good["atoms"].double()},
        "expected atoms of input's dtype Float, got Double",
    )
    dims = {
        "basis": "[blocks, K, cols / blocks] = ",
        "values": "[rows, blocks, nnz] = ",
        "indices": "[rows, blocks, nnz] = ",
        "atoms": "[blocks, T, K] = ",
    }
    for transpose in (False, True):
        good = backward_inputs(factored(GOOD, transpose, torch.float32, device))
        for index in range(4):
            alone = needed(good | {"output_mask": [index == i for i in range(4)]})
            for name in ("input", "basis", "values", "indices", "atoms"):
                if alone[name] is not None:
                    yield Invalid(
                        f"no-{name}-{index}{'-transpose' if transpose else ''}",
                        alone | {name: None},
                        f"expected {name} to be a tensor because a gradient that is asked for takes it, got None",
                    )
                    expected = f"{dims.get(name, '')}{list(alone[name].shape)}"
                    wrong = alone[name][:-1] if name in ("basis", "atoms") else alone[name][..., :-1, :]
                    yield Invalid(
                        f"{name}-of-another-{index}{'-transpose' if transpose else ''}",
                        alone | {name: wrong},
                        f"expected {name} of shape {expected}, got {list(wrong.shape)}",
                    )
    yield Invalid(
        "basis-sizes",
        good | {"basis_sizes": [2, 4]},
        "expected basis_sizes' length to be that of [blocks, K, cols / blocks] = 3, got 2",
    )


def backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return backward_inputs(stf_linear_sized(dtype, device, length))


# ---- stf_linear_straight_through ----------------------------------------------------------------

STRAIGHT_THROUGH_SHAPES = ("plain", "vector", "leading-sizes", "T40", "K257", "all-of-K", "nnz0", "T0", "rows0")


def straight_through_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    return layer_samples(with_latent, STRAIGHT_THROUGH_SHAPES, dtype, device)


def straight_through_invalid(device: str) -> Iterator[Invalid]:
    good = with_latent(GOOD, False, torch.float32, device)
    yield from invalid_layer(device, good, "latent")
    for change, got in ((good["latent"][:, 1:], [7, 1, 4]), (good["latent"][..., 1:], [7, 2, 3])):
        yield Invalid(
            f"latent-shape-{got}",
            good | {"latent": change},
            f"expected latent of shape [rows, blocks, K] = [7, 2, 4], got {got}",
        )
    yield Invalid("nnz", good | {"nnz": 5}, "expected nnz <= K = 4, got 5")
    yield Invalid("negative-nnz", good | {"nnz": -1}, "expected nnz >= 0, got -1")


def straight_through_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return with_latent(tokens_of(length), True, dtype, device)


def straight_through_large(device: str) -> Inputs:
    input = ones(LARGE_TOKENS, LARGE_ROWS, device=device, share=16 / LARGE_ROWS)
    input[:, -1] = 1  # the row beyond 32-bit offsets
    return {
        "input": input,
        "basis": ones(1, LARGE_BASIS, 8, device=device),
        "latent": ones(LARGE_ROWS, 1, LARGE_BASIS, device=device),
        "nnz": 64,
        "transpose": True,
    }


def straight_through_autocast(device: str) -> tuple[Inputs, Inputs]:
    return lowered(straight_through_sized(torch.float32, device, 8))


# ---- stf_linear_packed --------------------------------------------------------------------------


def packed_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    return layer_samples(packed, SHAPES, dtype, device)


def packed_invalid(device: str) -> Iterator[Invalid]:
    good = packed(GOOD, False, torch.float32, device)
    yield Invalid("negative-rows", good | {"rows": -1}, "expected rows >= 0, got -1")
    yield from invalid_layer(device, good, "packed_values")
    mask, packed_values = good["mask"], good["packed_values"]
    yield Invalid(
        "mask-rank", good | {"mask": mask[0]}, "expected mask of shape [ceil(rows / 16), blocks, K], got [2, 4]"
    )
    yield Invalid(
        "mask-shape",
        good | {"mask": mask[:, 1:]},
        "expected mask of shape [ceil(rows / 16), blocks, K] = [1, 2, 4], got [1, 1, 4]",
    )
    yield Invalid("mask-dtype", good | {"mask": mask.int()}, "expected mask of dtype Short, got Int")
    yield Invalid(
        "values-rank",
        good | {"packed_values": packed_values[0]},
        "expected packed_values of shape [ceil(rows / 16), blocks, 16 * nnz], got [2, 48]",
    )
    yield Invalid(
        "values-shape",
        good | {"packed_values": packed_values[:, :1]},
        "expected packed_values of shape [ceil(rows / 16), blocks, 16 * nnz] = [1, 2, 48], got [1, 1, 48]",
    )
    yield Invalid(
        "values-size",
        good | {"packed_values": packed_values[..., 1:]},
        "expected packed_values' last dimension to be a multiple of rows of a group = 16, got 47",
    )
    another_bit, another_row = mask.clone(), mask.clone()
    another_bit[0, 1, 2] ^= 4
    rows = [row for row in range(reference.ROWS_PER_GROUP) if mask[0, 1, 2] >> row & 1 == 0][:1]
    rows += [row for row in range(reference.ROWS_PER_GROUP) if mask[0, 1, 2] >> row & 1]
    another_row[0, 1, 2] ^= sum(1 << row for row in rows[:2])
    # By dtype and by how many tokens there are, the factor is read as it is, as lists, or as a dense matrix. Only lists
    # tell whose row a bit is, and are what float16 always makes of many tokens.
    for name, dtype, num_tokens, wrong in (
        ("few", torch.float32, 5, another_bit),
        ("many", torch.float32, 70, another_bit),
        ("many-rows", torch.float16, 70, another_row),
        ("many-bfloat16", torch.bfloat16, 100, another_bit),
    ):
        for transpose in (False, True):
            if transpose and wrong is another_row:
                continue  # a sum over all rows does not ask which of them a value belongs to
            yield Invalid(
                f"mask-of-another-{name}{'-transpose' if transpose else ''}",
                packed(((num_tokens,), *GOOD[1:]), transpose, dtype, device) | {"mask": wrong},
                "expected mask to have nnz = 3 bits for every row, got another number: both come from one stf_pack",
                data_dependent=True,
            )


def packed_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return packed(tokens_of(length), False, dtype, device)


def packed_large(device: str) -> Inputs:
    groups = -(-LARGE_ROWS // reference.ROWS_PER_GROUP)
    return large_layer(device) | {
        "packed_values": ones(groups, 1, reference.ROWS_PER_GROUP * LARGE_BASIS, device=device),
        "mask": torch.full((groups, 1, LARGE_BASIS), -1, dtype=torch.int16, device=device),
        "rows": LARGE_ROWS,
    }


def packed_autocast(device: str) -> tuple[Inputs, Inputs]:
    return lowered(packed_sized(torch.float32, device, 8))


CASES = [
    OpCase(
        "stf_linear",
        stf_linear_samples,
        stf_linear_invalid,
        stf_linear_sized,
        reference=reference.stf_linear,
        differentiable=("input", "basis", "values", "bias"),
        backward="_stf_linear_backward",
        unbatched=("basis", "values", "indices", "bias"),
        autocast=stf_linear_autocast,
        launches=2,
        large=stf_linear_large,
    ),
    OpCase("_stf_linear_with_atoms", with_atoms_samples, with_atoms_invalid, stf_linear_sized, launches=2),
    OpCase("_stf_linear_backward", backward_samples, backward_invalid, backward_sized, launches=2),
    OpCase(
        "stf_linear_straight_through",
        straight_through_samples,
        straight_through_invalid,
        straight_through_sized,
        reference=reference.stf_linear_straight_through,
        differentiable=("input", "basis", "latent", "bias"),
        straight_through=("latent",),
        backward="_stf_linear_backward",
        unbatched=("basis", "latent", "bias"),
        autocast=straight_through_autocast,
        launches=2,
        large=straight_through_large,
    ),
    OpCase(
        "stf_linear_packed",
        packed_samples,
        packed_invalid,
        packed_sized,
        reference=reference.stf_linear_packed,
        differentiable=("input", "bias"),
        summed_by_torch=("bias",),
        unbatched=("basis", "packed_values", "mask", "bias"),
        autocast=packed_autocast,
        launches=2,
        large=packed_large,
    ),
]
