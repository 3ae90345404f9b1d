"""The stf family: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from contract import Inputs, Invalid, OpCase, Sample, random
from torch import Tensor

from torchops.reference import stf as reference


def index_dtype(basis_size: int) -> torch.dtype:
    return torch.uint8 if basis_size <= 256 else torch.int16


def random_indices(rows: int, blocks: int, basis_size: int, nnz: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows + basis_size)
    chosen = torch.rand(rows, blocks, basis_size, generator=generator).argsort(-1)[..., :nnz]
    return chosen.sort(-1).values.to(device=device, dtype=index_dtype(basis_size))


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
    _, _, basis_size, _, rows, _ = shape
    inputs = factored(shape, transpose, dtype, device, bias)
    # By the reference, so that the operator that packs is not needed to test the one that computes.
    packed_values, mask = reference.stf_pack(inputs.pop("values"), inputs.pop("indices"), basis_size)
    return inputs | {"packed_values": packed_values, "mask": mask, "rows": rows}


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


def invalid_indices(good: Inputs) -> Iterator[Invalid]:
    for value in (4, 255, -1, 32767):
        indices = good["indices"].to(torch.uint8 if 0 <= value < 256 else torch.int16, copy=True)
        indices[6, 1, 2] = value
        indices[3, 0, 1] = value  # the first of both
        yield Invalid(
            f"index-{value}",
            good | {"indices": indices},
            f"expected indices in 0..3, got {value} at [3, 0, 1]",
            data_dependent=True,
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


def lowered(wide: Inputs) -> tuple[Inputs, Inputs]:
    """All that is multiplied or added is brought to one dtype."""
    return wide, {
        name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in wide.items()
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
    output, atoms = torch.ops.torchops._stf_linear_with_atoms(**inputs)
    return {name: value for name, value in inputs.items() if name != "bias"} | {
        "grad_output": random(*output.shape, dtype=output.dtype, device=output.device.type, seed=5),
        "atoms": atoms,
        "to_latent": False,
        "output_mask": [True] * 4,
    }


def backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in layer_samples(factored, INTERNAL_SHAPES, dtype, device):
        inputs = backward_inputs(sample.inputs)
        yield Sample(sample.id, inputs)
        yield Sample(f"{sample.id}-to-latent", inputs | {"to_latent": True})
        if sample.id.startswith("leading-sizes"):
            for index, name in enumerate(("input", "basis", "values", "bias")):
                yield Sample(f"{sample.id}-to-{name}", inputs | {"output_mask": [index == i for i in range(4)]})


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


# ---- stf_select, _stf_select_backward -----------------------------------------------------------

# rows, blocks, K, nnz.
SELECTIONS = [
    (7, 2, 5, 3),
    (3, 1, 256, 40),
    (3, 2, 257, 100),
    (20, 4, 6, 6),
    (5, 1, 1, 1),
    (5, 2, 4, 0),
    (0, 2, 4, 3),
    (5, 0, 4, 3),
]


def select_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for rows, blocks, basis_size, nnz in SELECTIONS:
        latent = random(rows, blocks, basis_size, dtype=dtype, device=device)
        yield Sample(f"R{rows}-B{blocks}-K{basis_size}-s{nnz}", {"latent": latent, "nnz": nnz})
    # Too many numbers for gradcheck: a selection among equals is no smooth function.
    ties = random(11, 2, 40, dtype=dtype, device=device).mul(2).round()
    ties[0, 0, 4:7] = -0.0
    ties[2, 1, 3] = math.inf
    ties[2, 1, 8] = -math.inf
    for nnz in (1, 7, 39):
        yield Sample(f"ties-inf-s{nnz}", {"latent": ties, "nnz": nnz})


def select_invalid(device: str) -> Iterator[Invalid]:
    latent = random(7, 2, 4, dtype=torch.float32, device=device)
    yield Invalid("rank", {"latent": latent[0], "nnz": 1}, "expected latent of shape [rows, blocks, K], got [2, 4]")
    yield Invalid(
        "dtype", {"latent": latent.int(), "nnz": 1}, "expected latent of dtype Double, Float, BFloat16 or Half, got Int"
    )
    for size in (0, 32768):
        yield Invalid(
            f"K{size}",
            {"latent": torch.zeros(1, 1, size, device=device), "nnz": 0},
            f"expected latent's last dimension K in 1..32767, got {size}",
        )
    yield Invalid("nnz", {"latent": latent, "nnz": 5}, "expected nnz <= K = 4, got 5")
    yield Invalid("negative-nnz", {"latent": latent, "nnz": -2}, "expected nnz >= 0, got -2")


def select_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return {"latent": random(length, 3, 30, dtype=dtype, device=device), "nnz": 12}


MANY_ROWS = 2**26 + 1


def select_large(device: str) -> Inputs:
    latent = torch.empty(MANY_ROWS, 1, 32, dtype=torch.bfloat16, device=device)
    return {"latent": latent.normal_(), "nnz": 8}


def select_backward_inputs(
    rows: int, blocks: int, basis_size: int, nnz: int, dtype: torch.dtype, device: str
) -> Inputs:
    return {
        "grad_values": random(rows, blocks, nnz, dtype=dtype, device=device),
        "indices": random_indices(rows, blocks, basis_size, nnz, device),
        "basis_size": basis_size,
    }


def select_backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for rows, blocks, basis_size, nnz in SELECTIONS:
        inputs = select_backward_inputs(rows, blocks, basis_size, nnz, dtype, device)
        yield Sample(f"R{rows}-B{blocks}-K{basis_size}-s{nnz}", inputs)


def select_backward_invalid(device: str) -> Iterator[Invalid]:
    good = select_backward_inputs(7, 2, 4, 3, torch.float32, device)
    yield from invalid_values(good, "grad_values")
    for size in (0, 32768):
        yield Invalid(f"K{size}", good | {"basis_size": size}, f"expected basis_size in 1..32767, got {size}")
    yield Invalid("nnz", good | {"basis_size": 2}, "expected grad_values' last dimension nnz <= basis_size = 2, got 3")


def select_backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return select_backward_inputs(length, 3, 30, 12, dtype, device)


def select_backward_large(device: str) -> Inputs:
    grad_values = torch.empty(MANY_ROWS, 1, 8, dtype=torch.bfloat16, device=device)
    indices = torch.arange(0, 32, 4, dtype=torch.uint8, device=device)
    return {"grad_values": grad_values.normal_(), "indices": indices.repeat(MANY_ROWS, 1, 1), "basis_size": 32}


# ---- stf_pack, stf_linear_packed ----------------------------------------------------------------


def invalid_values(good: Inputs, values: str) -> Iterator[Invalid]:
    """What is refused of values and indices without a layer."""
    yield Invalid(
        f"{values}-rank",
        good | {values: good[values][0]},
        f"expected {values} of shape [rows, blocks, nnz], got [2, 3]",
    )
    yield Invalid(
        f"{values}-dtype",
        good | {values: good[values].int()},
        f"expected {values} of dtype Double, Float, BFloat16 or Half, got Int",
    )
    yield Invalid(
        "indices-rank",
        good | {"indices": good["indices"][0]},
        "expected indices of shape [rows, blocks, nnz], got [2, 3]",
    )
    yield Invalid(
        "indices-shape",
        good | {"indices": good["indices"][1:]},
        "expected indices of shape [rows, blocks, nnz] = [7, 2, 3], got [6, 2, 3]",
    )
    yield Invalid(
        "indices-dtype",
        good | {"indices": good["indices"].int()},
        "expected indices of dtype Byte or Short, got Int",
    )


def pack_inputs(rows: int, blocks: int, basis_size: int, nnz: int, dtype: torch.dtype, device: str) -> Inputs:
    inputs = select_backward_inputs(rows, blocks, basis_size, nnz, dtype, device)
    return {"values": inputs.pop("grad_values"), **inputs}


def pack_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for rows, blocks, basis_size, nnz in [*SELECTIONS, (16, 1, 6, 2), (50, 2, 9, 4)]:
        inputs = pack_inputs(rows, blocks, basis_size, nnz, dtype, device)
        yield Sample(f"R{rows}-B{blocks}-K{basis_size}-s{nnz}", inputs)
    inputs = pack_inputs(20, 2, 5, 3, dtype, device)
    inputs["values"][4] = 0
    yield Sample("zeros-are-values", inputs)


def pack_invalid(device: str) -> Iterator[Invalid]:
    good = pack_inputs(7, 2, 4, 3, torch.float32, device)
    yield from invalid_values(good, "values")
    for size in (0, 32768):
        yield Invalid(f"K{size}", good | {"basis_size": size}, f"expected basis_size in 1..32767, got {size}")
    yield Invalid("nnz", good | {"basis_size": 2}, "expected values' last dimension nnz <= basis_size = 2, got 3")
    yield from invalid_indices(good)
    for name, row in (("repeated", [0, 2, 2]), ("descending", [0, 2, 1])):
        indices = good["indices"].clone()
        indices[5, 1] = torch.tensor(row, dtype=torch.uint8, device=device)
        yield Invalid(
            name,
            good | {"indices": indices},
            "expected indices to increase in every row and block, got one at [5, 1, 2] that is not larger than the"
            " one before",
            data_dependent=True,
        )


def pack_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return pack_inputs(length, 3, 30, 12, dtype, device)


def pack_large(device: str) -> Inputs:
    """The last group has one row, as that has alone."""
    values = torch.empty(MANY_ROWS, 1, 32, dtype=torch.bfloat16, device=device)
    indices = torch.arange(0, 64, 2, dtype=torch.uint8, device=device)
    return {"values": values.normal_(), "indices": indices.repeat(MANY_ROWS, 1, 1), "basis_size": 64}


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
    # By how many tokens there are, the factor is read as it is, as lists, or as a dense matrix.
    for name, dtype, num_tokens, wrong in (
        ("few", torch.float32, 5, another_bit),
        ("many", torch.float32, 70, another_bit),
        ("many-rows", torch.float32, 70, another_row),
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
        launches=1,
        large=stf_linear_large,
    ),
    OpCase("_stf_linear_with_atoms", with_atoms_samples, with_atoms_invalid, stf_linear_sized, launches=1),
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
        "stf_select",
        select_samples,
        select_invalid,
        select_sized,
        reference=reference.stf_select,
        differentiable=("latent",),
        backward="_stf_select_backward",
        launches=1,
        large=select_large,
    ),
    OpCase(
        "_stf_select_backward",
        select_backward_samples,
        select_backward_invalid,
        select_backward_sized,
        launches=1,
        large=select_backward_large,
    ),
    # One group of 16 rows and more groups are two programs.
    OpCase(
        "stf_pack",
        pack_samples,
        pack_invalid,
        pack_sized,
        reference=reference.stf_pack,
        least_batch=17,
        launches=1,
        large=pack_large,
    ),
    OpCase(
        "stf_linear_packed",
        packed_samples,
        packed_invalid,
        packed_sized,
        reference=reference.stf_linear_packed,
        unbatched=("basis", "packed_values", "mask", "bias"),
        autocast=packed_autocast,
        launches=1,
        large=packed_large,
    ),
]
