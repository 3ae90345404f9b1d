"""The stf family: factorizations of weights."""

import math
from collections.abc import Iterator, Sequence

import torch
from contract import Inputs, Invalid, OpCase, Sample, random
from torch import Tensor

from torchops.reference import stf as reference

# Factorizations are many; where there is one best product, it is compared with the reference's. The weight is
# computed in float32, which decompositions leave with a few roundings more than a product has.
DECOMPOSITION_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def product(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [reference.dense(*outputs)]


def whole_factors(rows: int, cols: int, basis_size: int, dtype: torch.dtype, device: str) -> Inputs:
    """With as many nonzeros as vectors the best product is that of the truncated SVD."""
    return {"weight": random(rows, cols, dtype=dtype, device=device), "basis_size": basis_size, "nnz": basis_size}


def gram_of_inputs(features: int, dtype: torch.dtype, device: str) -> Tensor:
    """X^T X of some inputs, one of which is always zero, and 1. Its first row is ones, which expanded is a matrix of
    squares, too."""
    inputs = random(50, features, dtype=dtype, device=device, seed=1)
    inputs[:, 0] = 0
    return inputs.T @ inputs + 1


def factorize_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for rows, cols, basis_size in ((9, 6, 3), (5, 8, 2), (1, 1, 1), (7, 40, 3), (0, 6, 2), (5, 0, 2)):
        yield Sample(f"R{rows}-C{cols}-K{basis_size}", whole_factors(rows, cols, basis_size, dtype, device))
    inputs = whole_factors(9, 12, 3, dtype, device)
    yield Sample("blocks", inputs | {"num_blocks": 3})
    yield Sample("no-iterations", inputs | {"num_iterations": 0})
    gram = gram_of_inputs(12, dtype, device)
    yield Sample("gram", inputs | {"gram": gram})
    yield Sample("gram-blocks", inputs | {"gram": gram, "num_blocks": 2})
    row_gram = gram_of_inputs(9, dtype, device)
    yield Sample("row-gram", inputs | {"row_gram": row_gram})
    yield Sample("row-gram-blocks", inputs | {"row_gram": row_gram, "num_blocks": 3})
    yield Sample("both-grams", inputs | {"gram": gram, "row_gram": row_gram})
    yield Sample("row-gram-nnz0", inputs | {"row_gram": row_gram, "nnz": 0})
    yield Sample("row-gram-R0", whole_factors(0, 6, 2, dtype, device) | {"row_gram": row_gram[:0, :0]})
    yield Sample("nnz0", inputs | {"nnz": 0})
    yield Sample("zeros", inputs | {"weight": torch.zeros_like(inputs["weight"])})
    # Rows that one atom each gives exactly: the same atom for all, or one of a few.
    rows = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0], dtype=dtype, device=device)[:, None]
    yield Sample("one-direction", {"weight": rows * rows[:4, 0], "basis_size": 2, "nnz": 1})
    units = torch.eye(5, dtype=dtype, device=device)[[0, 3, 1, 3, 4, 2, 0]]
    yield Sample("unit-vectors", {"weight": 2 * units, "basis_size": 5, "nnz": 1})
    # Squares of these are infinite, or zero.
    for exponent in (-4, 4) if dtype == torch.float16 else (-30, 30):
        weight = random(9, 6, dtype=dtype, device=device).clamp(-2, 2) * 10.0**exponent
        yield Sample(f"times-1e{exponent}", {"weight": weight, "basis_size": 6, "nnz": 6})


def invalid_matrix(good: Inputs) -> Iterator[Invalid]:
    """What is refused of the weight."""
    weight = good["weight"]
    yield Invalid("rank", good | {"weight": weight[0]}, "expected weight of shape [rows, cols], got [6]")
    yield Invalid(
        "dtype", good | {"weight": weight.int()}, "expected weight of dtype Double, Float, BFloat16 or Half, got Int"
    )
    yield Invalid("negative-nnz", good | {"nnz": -1}, "expected nnz >= 0, got -1")
    yield Invalid("iterations", good | {"num_iterations": -1}, "expected num_iterations >= 0, got -1")
    for value, name in ((math.nan, "nan"), (-math.inf, "inf")):
        wrong = weight.clone()
        wrong[3, 2] = value
        yield Invalid(
            f"weight-{name}",
            good | {"weight": wrong},
            "expected weight to be finite, got a NaN or an infinity",
            data_dependent=True,
        )


def factorize_invalid(device: str) -> Iterator[Invalid]:
    good = whole_factors(7, 6, 3, torch.float32, device) | {"num_blocks": 2}
    yield from invalid_matrix(good)
    for size in (0, 32768):
        yield Invalid(f"K{size}", good | {"basis_size": size}, f"expected basis_size in 1..32767, got {size}")
    yield Invalid("nnz", good | {"nnz": 4}, "expected nnz <= basis_size = 3, got 4")
    yield Invalid("blocks", good | {"num_blocks": 0}, "expected num_blocks >= 1, got 0")
    yield Invalid(
        "blocks-of-columns",
        good | {"num_blocks": 4},
        "expected weight's number of columns to be a multiple of num_blocks = 4, got 6",
    )
    for name, size, sizes in (("gram", 6, "[cols, cols] = [6, 6]"), ("row_gram", 7, "[rows, rows] = [7, 7]")):
        yield Invalid(
            f"{name}-shape",
            good | {name: torch.eye(size + 1, device=device)},
            f"expected {name} of shape {sizes}, got [{size + 1}, {size + 1}]",
        )
        yield Invalid(
            f"{name}-dtype",
            good | {name: torch.eye(size, device=device).int()},
            f"expected {name} of dtype Double, Float, BFloat16 or Half, got Int",
        )
        yield Invalid(
            f"{name}-nan",
            good | {name: torch.full((size, size), math.nan, device=device)},
            f"expected {name} to be finite, got a NaN or an infinity",
            data_dependent=True,
        )
        yield Invalid(
            f"{name}-indefinite",
            good | {name: -torch.eye(size, device=device)},
            f"expected {name} to be X^T X of inputs X, got a matrix with a negative square",
            data_dependent=True,
        )


def factorize_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return {"weight": random(length, 24, dtype=dtype, device=device), "basis_size": 6, "nnz": 2, "num_iterations": 3}


def orthonormal_basis(blocks: int, basis_size: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    drawn = random(blocks, width, width, dtype=torch.float64, device=device, seed=9)
    return torch.linalg.qr(drawn).Q[:, :basis_size].to(dtype).contiguous()


def project_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    weight = random(9, 8, dtype=dtype, device=device)
    # As many nonzeros as vectors: the least-squares code, once or with a better basis, which has the same span.
    whole = {"weight": weight, "basis": random(1, 3, 8, dtype=dtype, device=device), "nnz": 3, "num_iterations": 0}
    yield Sample("least-squares", whole)
    # Fewer: the largest products with an orthonormal basis are the best code.
    for blocks, basis_size, nnz in ((1, 6, 2), (2, 4, 3), (4, 2, 1)):
        basis = orthonormal_basis(blocks, basis_size, 8 // blocks, dtype, device)
        inputs = {"weight": weight, "basis": basis, "nnz": nnz, "num_iterations": 0}
        yield Sample(f"B{blocks}-K{basis_size}-s{nnz}", inputs)
    basis = orthonormal_basis(1, 40, 48, dtype, device)
    weight = random(12, 48, dtype=dtype, device=device)
    yield Sample("many-nonzeros", {"weight": weight, "basis": basis, "nnz": 20, "num_iterations": 0})
    yield Sample("nnz0", whole | {"nnz": 0, "num_iterations": 0})
    yield Sample("rows0", whole | {"weight": random(0, 8, dtype=dtype, device=device)})
    yield Sample("zeros", whole | {"weight": torch.zeros_like(whole["weight"])})


def project_invalid(device: str) -> Iterator[Invalid]:
    good = {
        "weight": random(7, 6, dtype=torch.float32, device=device),
        "basis": random(2, 4, 3, dtype=torch.float32, device=device),
        "nnz": 2,
    }
    yield from invalid_matrix(good)
    basis = good["basis"]
    yield Invalid(
        "basis-rank", good | {"basis": basis[0]}, "expected basis of shape [blocks, K, cols / blocks], got [4, 3]"
    )
    yield Invalid("basis-dtype", good | {"basis": basis.half()}, "expected basis of weight's dtype Float, got Half")
    for size in (0, 32768):
        yield Invalid(
            f"K{size}",
            good | {"basis": torch.zeros(2, size, 3, device=device)},
            f"expected basis's second dimension K in 1..32767, got {size}",
        )
    yield Invalid(
        "cols",
        good | {"weight": good["weight"][:, 1:]},
        "expected weight's number of columns to be that of all blocks = 6, got 5",
    )
    yield Invalid("nnz", good | {"nnz": 5}, "expected nnz <= K = 4, got 5")
    yield Invalid(
        "basis-nan",
        good | {"basis": torch.full_like(basis, math.nan)},
        "expected basis to be finite, got a NaN or an infinity",
        data_dependent=True,
    )


def to_factors_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in project_samples(dtype, device):
        yield sample
        yield Sample(f"{sample.id}-refined", sample.inputs | {"num_iterations": 2})


def project_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return {
        "weight": random(length, 24, dtype=dtype, device=device),
        "basis": random(2, 6, 12, dtype=dtype, device=device),
        "nnz": 2,
        "num_iterations": 1,
    }


CASES = [
    OpCase(
        "stf_factorize",
        factorize_samples,
        factorize_invalid,
        factorize_sized,
        reference=reference.stf_factorize,
        compared=product,
        output_tolerance=DECOMPOSITION_TOLERANCE,
        decomposes=True,
        unbatched=("gram", "row_gram"),
        least_batch=2,
    ),
    OpCase(
        "stf_project",
        project_samples,
        project_invalid,
        project_sized,
        reference=reference.stf_project,
        differentiable=("weight",),
        straight_through=("weight",),
        output_tolerance=DECOMPOSITION_TOLERANCE,
        decomposes=True,
        unbatched=("basis",),
    ),
    OpCase(
        "_stf_project_to_factors",
        to_factors_samples,
        project_invalid,
        project_sized,
        decomposes=True,
        unbatched=("basis",),
    ),
]
