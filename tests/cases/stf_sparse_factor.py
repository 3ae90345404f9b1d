"""The stf family's sparse factor: how it is selected and packed."""

import math
from collections.abc import Iterator

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
    # Numbers that are equal in 16 bits, of both signs.
    alike = random(11, 2, 40, dtype=torch.float64, device=device)
    alike = (alike.sign() * (1 + 1e-3 * alike)).to(dtype)
    for nnz in (1, 7, 39):
        yield Sample(f"alike-s{nnz}", {"latent": alike, "nnz": nnz})


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


# ---- stf_pack -----------------------------------------------------------------------------------


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


CASES = [
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
]
