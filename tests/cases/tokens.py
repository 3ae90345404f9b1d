"""Tokens that are merged and unmerged: calls that the contract makes, and calls that must fail."""

from collections.abc import Iterator

import torch
from contract import Inputs, Invalid, OpCase, Sample, integers, random
from torch import Tensor

from torchops._namespace import operators
from torchops.reference import tokens as reference

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
