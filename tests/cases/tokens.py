"""The tokens family: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator
from functools import cache

import torch
from contract import Inputs, Invalid, OpCase, Sample, integers, random
from torch import Tensor

from torchops._namespace import operators
from torchops.reference import tokens as reference


def mask(*shape: int, device: str, num_protected: int = 0, share: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    padding = torch.rand(shape, generator=generator) < share
    padding[:, :num_protected] = False
    return padding.to(device)


# More than 2**31 numbers, 4 GB, whose last row is far from the first.
LARGE_BATCH = 2**15 + 1


def large_rows(*shape: int, device: str) -> Tensor:
    return torch.empty(LARGE_BATCH, *shape, dtype=torch.bfloat16, device=device).normal_()


def near_equal(*shape: int, noise: float, dtype: torch.dtype, device: str) -> Tensor:
    """Tokens as merging finds them: alike, so that what matters is a difference of similar numbers."""
    base = random(1, 1, shape[-1], dtype=torch.float64, device=device)
    return (base + noise * random(*shape, dtype=torch.float64, device=device)).to(dtype)


# One more token, or group, than kernels count. Rows of no channels, or no rows at all, take no memory.
TOO_MANY = 2**31
BOUND = f"the largest 32-bit integer = {TOO_MANY - 1}, got {TOO_MANY}"


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


# ---- merge_tokens -------------------------------------------------------------------------------

MERGE_SHAPES = [
    (2, 7, 5, 4),
    (3, 20, 33, 6),
    (1, 50, 130, 50),
    (2, 40, 17, 1),  # one group of everything
    (2, 9, 8, 30),  # more groups than tokens
    (1, 1, 1, 1),
    (0, 5, 4, 3),
    (2, 0, 4, 3),
    (2, 5, 0, 3),
    (2, 5, 4, 0),  # every token dropped
]


def merge_inputs(batch: int, tokens: int, channels: int, groups: int, dtype: torch.dtype, device: str) -> Inputs:
    return {
        "input": random(batch, tokens, channels, dtype=dtype, device=device),
        "assign": integers(-1, groups, batch, tokens, device=device),
        "num_groups": groups,
    }


def merge_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    side_dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for index, (batch, tokens, channels, groups) in enumerate(MERGE_SHAPES):
        inputs = merge_inputs(batch, tokens, channels, groups, dtype, device)
        # Weights may have any floating dtype.
        side_dtype = torch.float64 if dtype == torch.float64 else side_dtypes[index % 4]
        weight = random(batch, tokens, dtype=side_dtype, device=device).abs() + 0.5
        shape = f"B{batch}-N{tokens}-C{channels}-M{groups}"
        yield Sample(shape, inputs)
        yield Sample(f"{shape}-weight", inputs | {"weight": weight})
        yield Sample(f"{shape}-sum", inputs | {"normalize": False})
        yield Sample(f"{shape}-weight-sum", inputs | {"weight": weight, "normalize": False})
    zero_total = merge_inputs(2, 6, 5, 3, dtype, device)
    zero_total["assign"] = torch.tensor([[0, 0, 1, 1, 2, -1]] * 2, device=device)
    weight = torch.tensor([[1, -1, 0, 0, 0, 1], [2, -2, 0, 3, 3, 1]], dtype=dtype, device=device)
    yield Sample("zero-total", zero_total | {"weight": weight})
    # What merges is alike: gradients to the weights are differences of similar numbers.
    for noise in (0.02, 0.005):
        similar = merge_inputs(2, 9, 40, 3, dtype, device)
        similar["input"] = near_equal(2, 9, 40, noise=noise, dtype=dtype, device=device)
        weight = random(2, 9, dtype=torch.float64, device=device).abs() + 0.5
        yield Sample(f"near-equal-{noise}", similar | {"weight": weight})
    # More members than one chain of additions has, all alike: roundings add up.
    long_group = {"input": torch.full((1, 5000, 3), 1.1, dtype=dtype, device=device), "num_groups": 1}
    long_group["assign"] = torch.zeros(1, 5000, dtype=torch.int64, device=device)
    yield Sample("long-group", long_group)


def merge_invalid(device: str) -> Iterator[Invalid]:
    good = merge_inputs(2, 5, 4, 3, torch.float32, device)
    assign = good["assign"]
    weight = torch.ones(2, 5, device=device)
    yield Invalid("rank", good | {"input": good["input"][0]}, "expected input of shape [B, N, C], got [5, 4]")
    yield Invalid(
        "dtype",
        good | {"input": good["input"].to(torch.complex64)},
        "expected input of dtype Double, Float, BFloat16 or Half, got ComplexFloat",
    )
    yield Invalid(
        "assign-shape", good | {"assign": assign[:, :4]}, "expected assign of shape [B, N] = [2, 5], got [2, 4]"
    )
    yield Invalid("assign-batch", good | {"assign": assign[:1]}, "expected assign of shape [B, N] = [2, 5], got [1, 5]")
    yield Invalid("assign-rank", good | {"assign": assign[0]}, "expected assign of shape [B, N], got [5]")
    yield Invalid("assign-dtype", good | {"assign": assign.int()}, "expected assign of dtype Long, got Int")
    yield Invalid("negative-groups", good | {"num_groups": -1}, "expected num_groups >= 0, got -1")
    too_many = {"input": torch.empty(2, TOO_MANY, 0, device=device), "assign": assign[:, :1].expand(2, TOO_MANY)}
    yield Invalid("too-many-tokens", good | too_many, f"expected N <= {BOUND}")
    yield Invalid(
        "huge-groups",
        good | {"num_groups": 2**62},
        f"expected num_groups <= the largest 32-bit integer = 2147483647, got {2**62}",
    )
    yield Invalid(
        "weight-shape", good | {"weight": weight[:, 1:]}, "expected weight of shape [B, N] = [2, 5], got [2, 4]"
    )
    yield Invalid(
        "weight-dtype",
        good | {"weight": weight.long()},
        "expected weight of dtype Double, Float, BFloat16 or Half, got Long",
    )
    for value in (3, -2, 2**40):
        bad = assign.clone()
        bad[1, 2] = value
        yield Invalid(
            f"assign-{value}",
            good | {"assign": bad},
            f"expected assign values in -1..2, got {value} at [1, 2]",
            data_dependent=True,
        )


def merge_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    weight = random(3, length, dtype=torch.float32, device=device).abs() + 0.5
    return merge_inputs(3, length, 150, length // 4, dtype, device) | {"weight": weight}


def large_assignment(device: str) -> Tensor:
    return torch.randint(-1, 8, (LARGE_BATCH, 16), device=device)


def merge_large(device: str) -> Inputs:
    weight = torch.rand(LARGE_BATCH, 16, device=device) + 0.5
    rows = large_rows(16, 4096, device=device)
    return {"input": rows, "assign": large_assignment(device), "num_groups": 8, "weight": weight}


# ---- _merge_tokens_backward ---------------------------------------------------------------------


def merge_backward_inputs(inputs: Inputs) -> Inputs:
    merged, total = operators.merge_tokens(**inputs)
    return {
        "grad_merged": torch.ones_like(merged),
        "grad_total": torch.ones_like(total),
        "input": inputs["input"],
        "assign": inputs["assign"],
        "weight": inputs.get("weight"),
        "total": total,
        "normalize": inputs.get("normalize", True),
        "output_mask": [True, inputs.get("weight") is not None],
    }


def merge_backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in merge_samples(dtype, device):
        inputs = merge_backward_inputs(sample.inputs)
        yield Sample(sample.id, inputs)
        if inputs["weight"] is not None:
            yield Sample(f"{sample.id}-to-weight", inputs | {"output_mask": [False, True]})
            without_rows = {"input": None, "output_mask": [True, False]}
            yield Sample(f"{sample.id}-to-input", inputs | without_rows)
            yield Sample(f"{sample.id}-of-merged", inputs | {"grad_total": None})
            of_total = {"grad_merged": None, "input": None, "total": None, "output_mask": [False, True]}
            yield Sample(f"{sample.id}-of-total", inputs | of_total)
            yield Sample(f"{sample.id}-to-ones", inputs | {"weight": None})


def merge_backward_invalid(device: str) -> Iterator[Invalid]:
    weight = torch.ones(2, 5, device=device)
    good = merge_backward_inputs(merge_inputs(2, 5, 4, 3, torch.float32, device) | {"weight": weight})
    yield Invalid(
        "grad-rank",
        good | {"grad_merged": good["grad_merged"][0]},
        "expected grad_merged of shape [B, M, C], got [3, 4]",
    )
    yield Invalid("total-dtype", good | {"total": good["total"].double()}, "expected total of dtype Float, got Double")
    yield Invalid(
        "grad-total-shape",
        good | {"grad_total": good["grad_total"][:, :2]},
        "expected grad_total of shape [B, M] = [2, 3], got [2, 2]",
    )
    yield Invalid(
        "no-input",
        good | {"input": None},
        "expected input to be a tensor because the gradient to weight is asked for, got None",
    )
    yield Invalid(
        "no-total", good | {"total": None}, "expected total to be a tensor because rows were normalised, got None"
    )
    yield Invalid(
        "no-gradient",
        good | {"grad_merged": None, "grad_total": None},
        "expected grad_total to be a tensor because grad_merged is None, got None",
    )
    yield Invalid(
        "total-alone",
        good | {"grad_merged": None, "grad_total": good["grad_total"][0]},
        "expected grad_total of shape [B, M], got [3]",
    )
    yield Invalid(
        "input-dtype",
        good | {"input": good["input"].double()},
        "expected input of grad_merged's dtype Float, got Double",
    )
    bad = good["assign"].clone()
    bad[0, 4] = 3
    yield Invalid(
        "assign-value", good | {"assign": bad}, "expected assign values in -1..2, got 3 at [0, 4]", data_dependent=True
    )


def merge_backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return merge_backward_inputs(merge_sized(dtype, device, length))


def merge_backward_large(device: str) -> Inputs:
    return merge_backward_inputs(merge_large(device))


# ---- unmerge_tokens -----------------------------------------------------------------------------


def unmerge_inputs(batch: int, tokens: int, channels: int, groups: int, dtype: torch.dtype, device: str) -> Inputs:
    return {
        "merged": random(batch, groups, channels, dtype=dtype, device=device),
        "assign": integers(-1, groups, batch, tokens, device=device),
    }


def unmerge_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for batch, tokens, channels, groups in MERGE_SHAPES:
        inputs = unmerge_inputs(batch, tokens, channels, groups, dtype, device)
        residual = random(batch, tokens, channels, dtype=dtype, device=device)
        shape = f"B{batch}-N{tokens}-C{channels}-M{groups}"
        yield Sample(shape, inputs)
        yield Sample(f"{shape}-residual", inputs | {"residual": residual})


def unmerge_invalid(device: str) -> Iterator[Invalid]:
    good = unmerge_inputs(2, 5, 4, 3, torch.float32, device)
    residual = torch.zeros(2, 5, 4, device=device)
    yield Invalid("rank", good | {"merged": good["merged"][0]}, "expected merged of shape [B, M, C], got [3, 4]")
    yield Invalid(
        "dtype",
        good | {"merged": good["merged"].int()},
        "expected merged of dtype Double, Float, BFloat16 or Half, got Int",
    )
    yield Invalid(
        "assign-batch", good | {"assign": good["assign"][:1]}, "expected assign of shape [B, N] = [2, 5], got [1, 5]"
    )
    yield Invalid("assign-rank", good | {"assign": good["assign"][0]}, "expected assign of shape [B, N], got [5]")
    yield Invalid("assign-dtype", good | {"assign": good["assign"].bool()}, "expected assign of dtype Long, got Bool")
    yield Invalid(
        "too-many-groups", good | {"merged": torch.empty(2, TOO_MANY, 0, device=device)}, f"expected M <= {BOUND}"
    )
    yield Invalid(
        "too-many-tokens", good | {"assign": good["assign"][:, :1].expand(2, TOO_MANY)}, f"expected N <= {BOUND}"
    )
    yield Invalid(
        "residual-shape",
        good | {"residual": residual[:, :3]},
        "expected residual of shape [B, N, C] = [2, 5, 4], got [2, 3, 4]",
    )
    yield Invalid(
        "residual-dtype",
        good | {"residual": residual.double()},
        "expected residual of merged's dtype Float, got Double",
    )
    bad = good["assign"].clone()
    bad[1, 4] = 3
    yield Invalid(
        "assign-value", good | {"assign": bad}, "expected assign values in -1..2, got 3 at [1, 4]", data_dependent=True
    )


def unmerge_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    residual = random(3, length, 150, dtype=dtype, device=device)
    return unmerge_inputs(3, length, 150, length // 4, dtype, device) | {"residual": residual}


def unmerge_large(device: str) -> Inputs:
    return {
        "merged": large_rows(8, 4096, device=device),
        "assign": large_assignment(device),
        "residual": large_rows(16, 4096, device=device),
    }


def unmerge_autocast(device: str) -> tuple[Inputs, Inputs]:
    """A lowered block's result meets a wider residual stream: both take the wider dtype."""
    wide = unmerge_inputs(2, 5, 4, 3, torch.float32, device)
    wide["residual"] = random(2, 5, 4, dtype=torch.float32, device=device)
    lowered = wide["merged"].bfloat16()
    return wide | {"merged": lowered}, wide | {"merged": lowered.float()}


# ---- _unmerge_tokens_backward -------------------------------------------------------------------


def unmerge_backward_inputs(
    batch: int, tokens: int, channels: int, groups: int, dtype: torch.dtype, device: str
) -> Inputs:
    return {
        "grad": random(batch, tokens, channels, dtype=dtype, device=device),
        "assign": integers(-1, groups, batch, tokens, device=device),
        "num_groups": groups,
    }


def unmerge_backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for batch, tokens, channels, groups in MERGE_SHAPES:
        inputs = unmerge_backward_inputs(batch, tokens, channels, groups, dtype, device)
        yield Sample(f"B{batch}-N{tokens}-C{channels}-M{groups}", inputs)


def unmerge_backward_invalid(device: str) -> Iterator[Invalid]:
    good = unmerge_backward_inputs(2, 5, 4, 3, torch.float32, device)
    yield Invalid("rank", good | {"grad": good["grad"][0]}, "expected grad of shape [B, N, C], got [5, 4]")
    yield Invalid(
        "assign-shape", good | {"assign": good["assign"][:, 1:]}, "expected assign of shape [B, N] = [2, 5], got [2, 4]"
    )
    yield Invalid("negative-groups", good | {"num_groups": -1}, "expected num_groups >= 0, got -1")
    bad = good["assign"].clone()
    bad[0, 0] = -5
    yield Invalid(
        "assign-value", good | {"assign": bad}, "expected assign values in -1..2, got -5 at [0, 0]", data_dependent=True
    )


def unmerge_backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return unmerge_backward_inputs(3, length, 150, length // 4, dtype, device)


def unmerge_backward_large(device: str) -> Inputs:
    return {"grad": large_rows(16, 4096, device=device), "assign": large_assignment(device), "num_groups": 8}


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
    OpCase(
        "merge_tokens",
        merge_samples,
        merge_invalid,
        merge_sized,
        reference=reference.merge_tokens,
        differentiable=("input", "weight"),
        backward="_merge_tokens_backward",
        launches=2,
        large=merge_large,
    ),
    OpCase(
        "_merge_tokens_backward",
        merge_backward_samples,
        merge_backward_invalid,
        merge_backward_sized,
        launches=3,
        large=merge_backward_large,
    ),
    OpCase(
        "unmerge_tokens",
        unmerge_samples,
        unmerge_invalid,
        unmerge_sized,
        reference=reference.unmerge_tokens,
        differentiable=("merged", "residual"),
        backward="_unmerge_tokens_backward",
        autocast=unmerge_autocast,
        launches=1,
        large=unmerge_large,
    ),
    OpCase(
        "_unmerge_tokens_backward",
        unmerge_backward_samples,
        unmerge_backward_invalid,
        unmerge_backward_sized,
        launches=2,
        large=unmerge_backward_large,
    ),
]
