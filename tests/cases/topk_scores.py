"""Scores of listed keys: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator

import torch
from attention_cases import absent, none, only
from contract import Inputs, Invalid, OpCase, Sample, random
from torch import Tensor

import torchops
from torchops.reference import sparse_attention as reference

from .sparse_attention import (
    attention_inputs,
    invalid_attention,
    list_samples,
    place_samples,
    side_samples,
    small_inputs,
    topk_attention_large,
    unseen_samples,
)

OPTIONS = {"block_size": 1, "query_block": 1, "is_causal": False, "scale": None}
ARGUMENTS = ("query", "key", "indices", *OPTIONS, "query_start", "key_start")
DIFFERENTIABLE = ("query", "key")


def of_scores(inputs: Inputs) -> Inputs:
    """Without what goes to values, and what is added to scores."""
    return {name: value for name, value in inputs.items() if name in ARGUMENTS}


def topk_scores_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in (*list_samples(dtype, device), *place_samples(dtype, device), *unseen_samples(dtype, device)):
        # Blocks of 2^62 keys are as many columns.
        if sample.id not in ("huge-block", "unseeing-queries-sink"):
            yield Sample(sample.id, of_scores(sample.inputs))
    for sample in side_samples(dtype, device):
        if sample.id in ("large-scores", "near-equal-scores"):
            yield Sample(sample.id, of_scores(sample.inputs))

    # Ascending lists, which are gone through keys 256 at a time; and the same in another order.
    inputs = attention_inputs(
        1, 2, 1, 70, 900, 12, 1, dtype=dtype, device=device, list_heads=2, listed=300, is_causal=True
    )
    entries = inputs["indices"].sort().values
    start = torch.tensor([800], device=device)
    yield Sample("ascending", of_scores(inputs | {"indices": entries, "query_start": start}))
    yield Sample("descending", of_scores(inputs | {"indices": entries.flip(-1).int()}))
    # A block that the first key cuts short, one that the last key does, and one that has no key.
    inputs = attention_inputs(2, 2, 2, 6, 11, 8, 1, dtype=dtype, device=device, list_heads=1, listed=3, block_size=5)
    inputs["indices"] = torch.tensor([1, 3, 0], device=device).expand(2, 1, 6, 3)
    inputs["key_start"] = torch.tensor([7, 5], device=device)
    yield Sample("cut-blocks", of_scores(inputs))
    # Queries of a block, the first ones in front of all keys.
    inputs = attention_inputs(
        1, 2, 1, 71, 33, 8, 1, dtype=dtype, device=device, list_heads=1, listed=7, query_block=16, is_causal=True
    )
    inputs["query"][:, :, :38] = math.nan
    yield Sample("unseeing-queries-of-blocks", of_scores(inputs))
    # What is listed and is no number, or none that ends, reaches its own columns only.
    inputs = attention_inputs(1, 2, 1, 30, 40, 16, 1, dtype=dtype, device=device, list_heads=2, listed=9)
    inputs["key"][:, :, 7], inputs["key"][:, :, 9], inputs["query"][:, 1, 3] = math.nan, math.inf, -math.inf
    yield Sample("no-numbers", of_scores(inputs))


def invalid_scores(device: str, good: Inputs) -> Iterator[Invalid]:
    """What topk_attention refuses of the same arguments."""
    attention = small_inputs(device)
    for invalid in invalid_attention(device, attention):
        wrong = {name: value for name, value in invalid.inputs.items() if value is not attention.get(name)}
        wrong.pop("value", None)
        if wrong and set(wrong) <= set(ARGUMENTS):
            yield Invalid(invalid.id, good | wrong, invalid.message)
    most = 2**30
    yield Invalid("large-blocks", good | {"block_size": most + 1}, f"expected block_size in 1..{most}, got {most + 1}")
    yield Invalid(
        "columns",
        good | {"block_size": most // 2},
        f"expected indices's last dimension times block_size in 0..{most}, got {most // 2 * 3}",
    )


def topk_scores_invalid(device: str) -> Iterator[Invalid]:
    return invalid_scores(device, of_scores(small_inputs(device)))


def topk_scores_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    inputs = attention_inputs(
        2, 4, 2, length, length + 3, 24, 1, dtype=dtype, device=device, list_heads=2, listed=11, query_block=3
    )
    places = {
        "query_start": torch.tensor([3, 1], device=device),
        "key_start": torch.tensor([0, -2], dtype=torch.int32, device=device),
    }
    return of_scores(inputs) | places | {"block_size": 2, "is_causal": True, "scale": 0.3}


def topk_scores_large(device: str) -> Inputs:
    """Two tensors of 4 GB, and as many numbers as one has."""
    inputs = of_scores(topk_attention_large(device))
    return inputs | {"block_size": 32, "indices": inputs["indices"] // 32}


def topk_scores_autocast(device: str) -> tuple[Inputs, Inputs]:
    wide = topk_scores_sized(torch.float32, device, 8)
    return wide, wide | {name: wide[name].bfloat16() for name in DIFFERENTIABLE}


# ---- _topk_scores_backward ----------------------------------------------------------------------


def backward_inputs(inputs: Inputs, grad: Tensor | None = None) -> Inputs:
    """A gradient to columns that have no score is NaN."""
    if grad is None:
        scores = torchops.topk_scores(**inputs)
        grad = random(*scores.shape, dtype=scores.dtype, device=scores.device, seed=5)
        grad = grad.masked_fill(scores == -math.inf, math.nan)
    return {
        "grad": grad,
        **OPTIONS,
        **none("query_start", "key_start"),
        **inputs,
        "group_size": max(1, inputs["query"].shape[1] // inputs["key"].shape[1]),
        "num_keys": inputs["key"].shape[2],
        "output_mask": [True, True],
    }


def backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in topk_scores_samples(dtype, device):
        inputs = backward_inputs(sample.inputs)
        yield Sample(sample.id, inputs)
        if sample.id == "groups-list-per-head":
            yield Sample("to-query", inputs | only(DIFFERENTIABLE, "query") | none("query"))
            yield Sample("to-key", inputs | only(DIFFERENTIABLE, "key") | none("key"))
            yield Sample("to-none", inputs | only(DIFFERENTIABLE) | none("query", "key"))


def backward_invalid(device: str) -> Iterator[Invalid]:
    good = backward_inputs(of_scores(small_inputs(device)))
    yield from invalid_scores(device, good)
    grad = good["grad"]
    dims = "[B, Hq, Lq, k block_size]"
    yield Invalid("grad-rank", good | {"grad": grad[0]}, f"expected grad of shape {dims}, got [4, 5, 3]")
    yield Invalid(
        "grad-shape",
        good | {"grad": grad[..., 1:]},
        f"expected grad of shape {dims} = [2, 4, 5, 3], got [2, 4, 5, 2]",
    )
    yield Invalid("grad-dtype", good | {"grad": grad.double()}, "expected grad of dtype Float, got Double")
    yield Invalid("no-group", good | {"group_size": 0}, "expected group_size >= 1, got 0")
    heads = "expected grad's number of heads to be a multiple of group_size = 3, got 4"
    yield Invalid("part-of-a-group", good | {"group_size": 3}, heads)
    of_key = "to be key's"
    heads = f"expected grad's heads / group_size {of_key} number of heads = 2, got 4"
    yield Invalid("other-groups", good | {"group_size": 1}, heads)
    yield Invalid("other-keys", good | {"num_keys": 7}, f"expected num_keys {of_key} third dimension = 6, got 7")
    yield absent(good, "query", "key's gradient is asked for")
    yield absent(good, "key", "query's gradient is asked for")


def backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return backward_inputs(topk_scores_sized(dtype, device, length))


def backward_large(device: str) -> Inputs:
    inputs = topk_scores_large(device)
    return backward_inputs(inputs, torch.randn(*inputs["query"].shape, device=device))


CASES = [
    OpCase(
        "topk_scores",
        topk_scores_samples,
        topk_scores_invalid,
        topk_scores_sized,
        reference=reference.topk_scores,
        differentiable=DIFFERENTIABLE,
        backward="_topk_scores_backward",
        autocast=topk_scores_autocast,
        launches=1,
        large=topk_scores_large,
    ),
    OpCase(
        "_topk_scores_backward",
        backward_samples,
        backward_invalid,
        backward_sized,
        launches=3,
        large=backward_large,
    ),
]
