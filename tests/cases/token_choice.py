"""Which tokens are merged, and which are kept: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator
from functools import cache

import torch
from contract import Inputs, Invalid, OpCase, Sample, integers, random
from torch import Tensor

from torchops.reference import tokens as reference

from .tokens import BOUND, TOO_MANY, large_rows, near_equal


def mask(*shape: int, device: str, num_protected: int = 0, share: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    padding = torch.rand(shape, generator=generator) < share
    padding[:, :num_protected] = False
    return padding.to(device)


# ---- bipartite_assignment, bipartite_pairs ------------------------------------------------------


@cache
def rows_at_a_step(dtype: torch.dtype, device: str) -> Tensor:
    """Rows as long as those are whose integers just halve: what decides is the smallest part of the bound on their
    length (csrc/tokens/best_destination.h). Bounds on both sides, and a shift of 1 and of -1."""
    size, step, peak = 1024, 65534.0**2 / 2**10, 100
    noise = near_equal(1, 60, size, noise=0.04, dtype=torch.float64, device=device)[0]
    batches = []
    for side in (0.5, -0.5):
        low, high = torch.zeros(60, 1, dtype=torch.float64, device=device), 60.0
        rows = noise
        for _ in range(40):
            middle = (low + high) / 2
            rows = (noise * middle).clamp(-peak, peak)
            rows[:, 0] = peak
            rounded = rows.to(dtype).double().abs().round()
            too_long = 4 * (rounded * (rounded + 1)).sum(1, keepdim=True) + size > step + side * size
            low, high = torch.where(too_long, low, middle), torch.where(too_long, middle, high)
        batches += [rows, 4 * rows]
    return torch.stack(batches).to(dtype)


def bipartite_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for batch, tokens, features, r, protected in [
        (2, 197, 64, 16, 1),
        (3, 14, 5, 4, 0),
        (1, 33, 70, 7, 2),  # odd N, an even prefix, more features than one chain
        (2, 9, 3, 100, 3),  # r clamped
        (2, 300, 7, 60, 1),  # several panels of destinations
        (1, 24, 1, 5, 0),
        (1, 12, 3001, 3, 0),  # many features
        (2, 8, 4, 0, 1),
        (2, 1, 4, 3, 0),
        (2, 2, 4, 3, 1),
        (2, 3, 4, 3, 3),
        (0, 6, 4, 2, 0),
        (2, 0, 4, 2, 0),
        (2, 6, 0, 2, 0),  # no features: all similarities are 0
    ]:
        metric = random(batch, tokens, features, dtype=dtype, device=device)
        inputs = {"metric": metric, "r": r, "num_protected": protected}
        shape = f"B{batch}-N{tokens}-K{features}-r{r}-p{protected}"
        yield Sample(shape, inputs)
        if tokens > 2 and batch and features:
            padding = mask(batch, tokens, device=device, num_protected=protected)
            yield Sample(f"{shape}-padded", inputs | {"padding_mask": padding})
    yield Sample(
        "mostly-padding",
        {
            "metric": random(4, 12, 6, dtype=dtype, device=device),
            "r": 5,
            "padding_mask": mask(4, 12, device=device, share=0.85),
        },
    )
    # Signs over 4 or 16 features: norms are powers of two, similarities exact, and most of them tie.
    for features in (4, 16):
        signs = random(3, 40, features, dtype=dtype, device=device).sign()
        yield Sample(f"ties-K{features}", {"metric": signs, "r": 11, "num_protected": 1})
    # A flat background: all tokens equal, so position decides everything.
    flat = random(1, 1, 48, dtype=dtype, device=device).expand(2, 30, 48).clone()
    yield Sample("flat", {"metric": flat, "r": 6, "num_protected": 1})
    # Dense similarities: many are as far apart as the step they are rounded to.
    for features in (64, 99):
        metric = near_equal(4, 120, features, noise=0.03, dtype=dtype, device=device)
        yield Sample(f"near-equal-K{features}", {"metric": metric, "r": 16, "num_protected": 1})
    yield Sample("at-a-step", {"metric": rows_at_a_step(dtype, device), "r": 10})
    # Rows of one large feature among small ones, of both signs, and magnitudes of any kind side by side.
    peaks = 1e-3 * random(2, 40, 9, dtype=torch.float64, device=device)
    peaks[:, ::3, 4] = 1
    peaks[:, 1::3, 4] = -1
    yield Sample("peaks", {"metric": peaks.to(dtype), "r": 12})
    spread = random(2, 40, 9, dtype=torch.float64, device=device)
    spread *= torch.exp2(4 * random(2, 40, 9, dtype=torch.float64, device=device, seed=1))
    yield Sample("spread", {"metric": spread.to(dtype), "r": 12})
    odd_rows = random(2, 16, 8, dtype=dtype, device=device)
    odd_rows[:, 3] = 0
    odd_rows[:, 6] = 0
    odd_rows[0, 5, 2] = math.nan
    odd_rows[0, 8, 1] = math.nan
    odd_rows[1, 7, 0] = math.inf
    yield Sample("zeros-nan-inf", {"metric": odd_rows, "r": 8})
    yield Sample("all-nan", {"metric": torch.full_like(odd_rows, math.nan), "r": 3})
    # A NaN is less similar than opposites are, and so is what stands behind the last of 23 destinations in vectors.
    opposites = torch.ones(2, 46, 4, dtype=dtype, device=device)
    opposites[:, 1::2] = -1
    opposites[:, 15, 0] = 1
    opposites[0, 0] = math.nan
    opposites[1, 1] = math.nan
    yield Sample("nan-and-opposites", {"metric": opposites, "r": 1})
    # Squares of these overflow or vanish in the dtype they are computed in.
    extreme = 0.5 * torch.finfo(dtype).max ** 0.999
    rows = random(2, 16, 8, dtype=torch.float64, device=device).sign()
    yield Sample("huge", {"metric": (rows * extreme).to(dtype), "r": 5})
    yield Sample("tiny", {"metric": (rows * torch.finfo(dtype).tiny).to(dtype), "r": 5})
    # The same similarities whatever the magnitude, the largest and the smallest included.
    scales = torch.tensor([torch.finfo(dtype).max / 8, 1, torch.finfo(dtype).tiny * 4], dtype=torch.float64)
    rows = random(3, 30, 8, dtype=torch.float64, device=device).clamp(-4, 4) * scales.to(device)[:, None, None]
    yield Sample("scales", {"metric": rows.to(dtype), "r": 9})


def bipartite_invalid(device: str) -> Iterator[Invalid]:
    metric = random(2, 8, 4, dtype=torch.float32, device=device)
    padding = torch.zeros(2, 8, dtype=torch.bool, device=device)
    yield Invalid("rank", {"metric": metric[0], "r": 1}, "expected metric of shape [B, N, K], got [8, 4]")
    yield Invalid(
        "dtype",
        {"metric": metric.long(), "r": 1},
        "expected metric of dtype Double, Float, BFloat16 or Half, got Long",
    )
    yield Invalid("negative-r", {"metric": metric, "r": -1}, "expected r >= 0, got -1")
    yield Invalid(
        "too-many-tokens", {"metric": torch.empty(0, TOO_MANY, 1, device=device), "r": 1}, f"expected N <= {BOUND}"
    )
    yield Invalid(
        "negative-prefix", {"metric": metric, "r": 1, "num_protected": -2}, "expected num_protected >= 0, got -2"
    )
    yield Invalid(
        "prefix-over-N", {"metric": metric, "r": 1, "num_protected": 9}, "expected num_protected <= N = 8, got 9"
    )
    yield Invalid(
        "mask-shape",
        {"metric": metric, "r": 1, "padding_mask": padding[:, :7]},
        "expected padding_mask of shape [B, N] = [2, 8], got [2, 7]",
    )
    yield Invalid(
        "mask-dtype",
        {"metric": metric, "r": 1, "padding_mask": padding.long()},
        "expected padding_mask of dtype Bool, got Long",
    )
    padded_prefix = padding.clone()
    padded_prefix[1, 0] = True
    yield Invalid(
        "padded-prefix",
        {"metric": metric, "r": 1, "num_protected": 1, "padding_mask": padded_prefix},
        "expected padding_mask to be False for the first 1 tokens, which are protected, got True at [1, 0]",
        data_dependent=True,
    )


def bipartite_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return {"metric": random(2, length, 48, dtype=dtype, device=device), "r": length // 4, "num_protected": 1}


def bipartite_large(device: str) -> Inputs:
    return {"metric": large_rows(16, 4096, device=device), "r": 4, "num_protected": 1}


# ---- topk_assignment ----------------------------------------------------------------------------


def topk_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for batch, tokens, k, protected in [
        (2, 197, 60, 1),
        (3, 9, 4, 2),
        (2, 7, 100, 0),
        (2, 7, 0, 1),
        (1, 1, 1, 0),
        (2, 4, 2, 4),
        (2, 3, 0, 0),
        (0, 5, 2, 0),
        (2, 0, 3, 0),
    ]:
        scores = random(batch, tokens, dtype=dtype, device=device)
        for fuse in (False, True):
            inputs = {"scores": scores, "k": k, "num_protected": protected, "fuse": fuse}
            shape = f"B{batch}-N{tokens}-k{k}-p{protected}{'-fuse' if fuse else ''}"
            yield Sample(shape, inputs)
            padding = mask(batch, tokens, device=device, num_protected=protected)
            yield Sample(f"{shape}-padded", inputs | {"padding_mask": padding})
    ties = integers(-2, 3, 3, 30, device=device).to(dtype)
    ties[0, 4] = -0.0
    ties[1, 5:9] = math.nan
    ties[2, 3] = math.inf
    ties[2, 4] = -math.inf
    for k in (7, 28):
        yield Sample(f"ties-nan-inf-k{k}", {"scores": ties, "k": k, "fuse": True})
    # Of either zero the first is kept.
    zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0]], dtype=dtype, device=device)
    for k in (1, 2):
        yield Sample(f"zeros-k{k}", {"scores": zeros, "k": k})
    # Neighbouring numbers of the dtype are not equal.
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(device)
    neighbours = (1 + torch.finfo(dtype).eps * order.to(torch.float64)).to(dtype)
    yield Sample("neighbours", {"scores": neighbours[None], "k": 20})
    # A NaN still ranks above padding, wherever the two stand.
    nan_behind_padding = torch.full((1, 6), math.nan, dtype=dtype, device=device)
    padding = torch.tensor([[True, True, False, False, True, False]], device=device)
    yield Sample("nan-behind-padding", {"scores": nan_behind_padding, "k": 4, "padding_mask": padding})


def topk_invalid(device: str) -> Iterator[Invalid]:
    scores = random(2, 8, dtype=torch.float32, device=device)
    padding = torch.zeros(2, 8, dtype=torch.bool, device=device)
    yield Invalid("rank", {"scores": scores[0], "k": 1}, "expected scores of shape [B, N], got [8]")
    yield Invalid(
        "dtype", {"scores": scores.int(), "k": 1}, "expected scores of dtype Double, Float, BFloat16 or Half, got Int"
    )
    yield Invalid("negative-k", {"scores": scores, "k": -3}, "expected k >= 0, got -3")
    yield Invalid(
        "too-many-tokens", {"scores": torch.empty(0, TOO_MANY, device=device), "k": 1}, f"expected N <= {BOUND}"
    )
    yield Invalid(
        "prefix-over-N", {"scores": scores, "k": 1, "num_protected": 9}, "expected num_protected <= N = 8, got 9"
    )
    yield Invalid(
        "mask-shape",
        {"scores": scores, "k": 1, "padding_mask": padding[:1]},
        "expected padding_mask of shape [B, N] = [2, 8], got [1, 8]",
    )
    yield Invalid(
        "mask-dtype",
        {"scores": scores, "k": 1, "padding_mask": padding.float()},
        "expected padding_mask of dtype Bool, got Float",
    )
    yield Invalid(
        "padded-prefix",
        {"scores": scores, "k": 1, "num_protected": 2, "padding_mask": ~padding},
        "expected padding_mask to be False for the first 2 tokens, which are protected, got True at [0, 0]",
        data_dependent=True,
    )


def topk_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return {"scores": random(37, length, dtype=dtype, device=device), "k": length // 3, "fuse": True}


def topk_large(device: str) -> Inputs:
    return {"scores": large_rows(2**16, device=device), "k": 1000, "fuse": True}


CASES = [
    OpCase(
        "bipartite_assignment",
        bipartite_samples,
        bipartite_invalid,
        bipartite_sized,
        reference=reference.bipartite_assignment,
        launches=2,
        large=bipartite_large,
    ),
    OpCase(
        "bipartite_pairs",
        bipartite_samples,
        bipartite_invalid,
        bipartite_sized,
        reference=reference.bipartite_pairs,
        launches=2,
        large=bipartite_large,
    ),
    OpCase(
        "topk_assignment",
        topk_samples,
        topk_invalid,
        topk_sized,
        reference=reference.topk_assignment,
        launches=1,
        large=topk_large,
    ),
]
