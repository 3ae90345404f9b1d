"""How close factorizations come, on matrices that are known to have factors."""

import pytest
import torch
from torch import Tensor, nn

import torchops
from torchops.reference.stf import dense


def planted(rows: int, cols: int, basis_size: int, nnz: int, noise: float, seed: int = 0) -> Tensor:
    """A sparse code times a basis of vectors of length 1, and noise relative to that."""
    generator = torch.Generator().manual_seed(seed)
    basis = nn.functional.normalize(torch.randn(basis_size, cols, generator=generator), dim=1)
    chosen = torch.rand(rows, basis_size, generator=generator).argsort(1)[:, :nnz]
    code = torch.zeros(rows, basis_size).scatter(1, chosen, torch.randn(rows, nnz, generator=generator))
    weight = code @ basis
    return weight + noise * weight.square().mean().sqrt() * torch.randn(rows, cols, generator=generator)


def relative_error(weight: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> float:
    return ((weight - dense(*factors)).norm() / weight.norm()).item()


def truncated_svd_error(weight: Tensor, stored_numbers: int) -> float:
    singular_values = torch.linalg.svdvals(weight)
    return (singular_values[stored_numbers // sum(weight.shape) :].norm() / singular_values.norm()).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_factors_are_found(seed: int) -> None:
    weight = planted(1024, 64, basis_size=48, nnz=4, noise=0.05, seed=seed)
    error = relative_error(weight, torchops.stf_factorize(weight, 48, 4))
    assert error < truncated_svd_error(weight, 48 * 64 + 1024 * 4) / 8  # 0.10; the noise is 0.05


def test_factors_with_many_nonzeros_come_closer_than_the_truncated_svd() -> None:
    weight = planted(400, 120, basis_size=90, nnz=30, noise=0.1)
    error = relative_error(weight, torchops.stf_factorize(weight, 60, 20))
    assert error < 0.9 * truncated_svd_error(weight, 60 * 120 + 400 * 20)


@pytest.mark.parametrize("nnz, most", [(12, 0.15), (17, 0.37), (24, 0.32), (48, 0.14)])
def test_few_and_many_nonzeros_are_found_alike(nnz: int, most: float) -> None:
    """K-SVD with the same code step comes to 0.32, 0.35, 0.30 and 0.13; the noise is 0.05."""
    weight = planted(1024, 128, basis_size=96, nnz=nnz, noise=0.05)
    assert relative_error(weight, torchops.stf_factorize(weight, 96, nnz)) < most


@pytest.mark.parametrize("nnz", [3, 20])
def test_error_of_a_factorization_never_rises(nnz: int) -> None:
    weight = planted(120, 48, basis_size=40, nnz=4, noise=0.3)
    errors = [relative_error(weight, torchops.stf_factorize(weight, 40, nnz, 1, steps)) for steps in range(8)]
    assert all(after <= before for before, after in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < errors[0]


def test_blocks_are_factored_each_for_itself() -> None:
    weight = torch.randn(30, 24)
    basis, values, indices = torchops.stf_factorize(weight, 6, 2, num_blocks=2)
    for block, part in enumerate(weight.split(12, 1)):
        alone = torchops.stf_factorize(part, 6, 2)
        assert torch.equal(basis[block], alone[0][0])
        assert torch.equal(values[:, block], alone[1][:, 0]) and torch.equal(indices[:, block], alone[2][:, 0])


# ---- awkward weights ----------------------------------------------------------------------------


def awkward_weights(rows: int, cols: int) -> dict[str, Tensor]:
    """In float64, with a largest number near 1: of low rank, with rows that are equal or zero, of one number."""
    generator = torch.Generator().manual_seed(rows)
    weights = {}
    for rank in sorted({0, 1, 2, 5, min(rows, cols)}):
        rank = min(rank, rows, cols)
        factors = [
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rows, rank), (rank, cols))
        ]
        weights[f"rank-{rank}"] = factors[0] @ factors[1]
    weights["equal-rows"] = weights[f"rank-{min(rows, cols)}"][torch.arange(rows) // 3]
    weights["zero-rows"] = weights[f"rank-{min(rows, cols)}"] * (torch.arange(rows) % 2)[:, None]
    weights["zero-columns"] = weights[f"rank-{min(rows, cols)}"] * (torch.arange(cols) % 2)
    weights["one-number"] = torch.zeros(rows, cols, dtype=torch.float64)
    weights["one-number"][rows // 2, cols // 2] = 1
    weights["rows-of-all-sizes"] = weights["rank-1"] + weights[f"rank-{min(rows, cols)}"] * torch.logspace(
        0, -30, rows, dtype=torch.float64
    ).unsqueeze(1)
    return {name: weight / weight.abs().max().clamp_min(1e-30) for name, weight in weights.items()}


@pytest.mark.parametrize(
    "rows, cols, dtype, scales",
    [
        (40, 24, torch.float64, (1e-300, 1e300)),
        (40, 24, torch.float32, (1e-30, 1e30)),
        (24, 40, torch.float32, (1e-37, 3e38)),
        (50, 3, torch.float32, ()),
        (3, 50, torch.bfloat16, (1e-30, 3e38)),
        (24, 40, torch.float16, (1e-3, 65504.0)),
    ],
)
def test_awkward_weights(rows: int, cols: int, dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    """Factors are numbers, never worse than zeros, and exact where as many vectors as the rank may be combined."""
    exact = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    smaller = min(rows, cols)
    weights = awkward_weights(rows, cols)
    calls = [(name, weight, 1.0) for name, weight in weights.items()]
    calls += [(name, weights[name], scale) for name in ("rank-2", f"rank-{smaller}") for scale in scales]
    for name, weight, scale in calls:
        given = (weight * scale).to(dtype)
        expected = given.double() / scale
        norm = expected.norm().clamp_min(1e-300)
        rank = int(torch.linalg.matrix_rank(weight, rtol=1e-9))
        for basis_size, nnz in ((16, 4), (smaller, smaller), (24, 18), (2 * cols, cols)):
            what = f"{name} times {scale}, K {basis_size}, nnz {nnz}"
            factors = torchops.stf_factorize(given, basis_size, nnz, 1, 3)
            basis, values, indices = (f.double() if f.is_floating_point() else f for f in factors)
            projected, refined = torchops.stf_project(given, factors[0], nnz, 3)
            assert all(t.isfinite().all() for t in (basis, values, projected, refined)), what
            bound = exact if nnz >= rank else 1 + exact
            assert (dense(basis, values / scale, indices) - expected).norm() <= bound * norm, what
            # Of a given basis the right vectors are not always found.
            assert (projected.double() / scale - expected).norm() <= (20 * exact if bound == exact else bound) * norm, (
                what
            )


def test_factorization_of_equal_rows_and_of_more_vectors_than_columns() -> None:
    """Vectors that depend on each other make systems of equations singular."""
    weight = torch.randn(1, 5).repeat(9, 1)
    assert relative_error(weight, torchops.stf_factorize(weight, 4, 3)) < 1e-5
    weight = torch.randn(9, 5)
    assert relative_error(weight, torchops.stf_factorize(weight, 8, 6)) < 1e-4


def test_projection_comes_as_close_as_a_code_for_the_basis_can() -> None:
    """The factorization has had more tries at the code."""
    weight = planted(80, 32, basis_size=24, nnz=3, noise=0.1)
    factors = torchops.stf_factorize(weight, 24, 3)
    projected, refined = torchops.stf_project(weight, factors[0], 3, 0)
    assert torch.equal(refined, factors[0])
    assert (weight - projected).norm() / weight.norm() < 1.25 * relative_error(weight, factors)


def test_projection_follows_a_changed_weight() -> None:
    weight = planted(80, 32, basis_size=24, nnz=3, noise=0.1)
    basis = torchops.stf_factorize(weight, 24, 3)[0]
    changed = weight + 0.3 * planted(80, 32, 24, 3, 0.0, seed=5)
    errors = [(changed - torchops.stf_project(changed, basis, 3, steps)[0]).norm().item() for steps in (0, 1, 5)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("scale", [None, 1.0, 100.0])
def test_basis_vectors_have_length_1_whatever_the_inputs_are(scale: float | None) -> None:
    """An optimizer takes steps of one size for basis and values, so their sizes must not depend on a unit."""
    gram = None if scale is None else (inputs := scale * torch.randn(500, 48) * torch.logspace(0, -1, 48)).T @ inputs
    basis, values, _ = torchops.stf_factorize(torch.randn(96, 48), 24, 8, gram=gram)
    torch.testing.assert_close(basis.norm(dim=2), torch.ones(1, 24))
    assert 1 < values.abs().mean() < 5


def test_a_row_longer_than_the_largest_number_makes_atoms_longer() -> None:
    weight = torch.full((4, 64), 6e4, dtype=torch.float16)  # rows of length 4.8e5
    basis, values, indices = torchops.stf_factorize(weight, 2, 1)
    length = basis.double().norm(dim=2)
    torch.testing.assert_close(length, torch.full_like(length, 8), rtol=1e-3, atol=0)
    torch.testing.assert_close(dense(basis.double(), values.double(), indices), weight.double(), rtol=2e-3, atol=0)


def test_a_basis_of_zeros_comes_to_life() -> None:
    """Least squares leave a zero where it is: what the rows lack takes its place."""
    weight = torch.randn(20, 8)
    basis = torch.zeros(1, 6, 8)
    projected, refined = torchops.stf_project(weight, basis, 3, 0)
    assert projected.eq(0).all() and refined.eq(0).all()
    projected, refined = torchops.stf_project(weight, basis, 3, 4)
    assert refined.norm(dim=2).gt(0.99).all()
    assert (weight - projected).norm() < 0.7 * weight.norm()


def test_units_of_the_inputs_do_not_matter() -> None:
    inputs, weight = torch.randn(100, 12), torch.randn(20, 12)
    errors = []
    for unit in (1e-18, 1.0, 1e18):
        gram = (unit * inputs).T @ (unit * inputs)
        factors = torchops.stf_factorize(weight, 8, 3, gram=gram)
        errors.append(((weight - dense(*factors)) @ inputs.T).norm().item())
    assert max(errors) < 1.05 * min(errors), errors
