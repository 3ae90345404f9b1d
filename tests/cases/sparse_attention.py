"""The sparse_attention family: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from attention_cases import (
    FLOATS,
    absent,
    inputs_of_backward,
    invalid_inputs,
    invalid_rows,
    only,
    positions_first,
    samples_of_gradients,
)
from contract import Inputs, Invalid, OpCase, Sample, integers, random
from torch import Tensor

from torchops._namespace import operators
from torchops.reference import sparse_attention as reference

HUGE = 2**62


def attention_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: str,
    list_heads: int,
    listed: int,
    **options: Any,
) -> Inputs:
    """Entries go from some below those that name keys to some above; many are listed twice."""
    num_lists = -(-queries // options.get("query_block", 1))
    num_names = -(-keys // options.get("block_size", 1))
    entries = integers(-2, num_names + 2, batch, list_heads, num_lists, listed, device=device)
    return {
        "query": random(batch, heads, queries, dim, dtype=dtype, device=device),
        "key": random(batch, kv_heads, keys, dim, dtype=dtype, device=device, seed=1),
        "value": random(batch, kv_heads, keys, value_dim, dtype=dtype, device=device, seed=2),
        "indices": entries,
        **options,
    }


# (B, Hq, Hkv, Lq, Lk, D, Dv), (Hi, k), options. Kernels work in tiles of 64 queries and go by 256 keys: lengths and
# lists around those.
LISTS: dict[str, tuple[tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "list-per-head": ((2, 2, 2, 7, 9, 5, 3), (2, 4), {}),
    "shared-list": ((2, 4, 2, 7, 9, 5, 8), (1, 5), {"is_causal": True}),
    "list-per-key-head": ((1, 4, 2, 66, 70, 16, 24), (2, 9), {"is_causal": True}),
    "groups-list-per-head": ((1, 4, 2, 66, 70, 24, 40), (4, 3), {"is_causal": True}),
    "one-token": ((2, 2, 1, 1, 1, 1, 1), (1, 2), {"is_causal": True}),
    "D256-Dv128": ((1, 2, 1, 3, 40, 256, 128), (2, 17), {}),
    "D192-Dv256": ((1, 1, 1, 5, 30, 192, 256), (1, 9), {"scale": 0.05}),
    "long-lists": ((1, 1, 1, 3, 700, 8, 8), (1, 600), {}),
    "few-of-many": ((1, 2, 1, 130, 300, 8, 8), (2, 2), {"is_causal": True}),
    "decode": ((2, 4, 2, 1, 300, 40, 24), (2, 70), {"is_causal": True}),
    "more-queries": ((2, 1, 1, 9, 4, 5, 5), (1, 4), {"is_causal": True}),
    "scale-0": ((1, 2, 1, 6, 6, 4, 4), (1, 3), {"scale": 0.0}),
    "scale-negative": ((1, 1, 1, 7, 6, 4, 4), (1, 3), {"scale": -0.5}),
    "blocks": ((2, 2, 1, 10, 10, 4, 4), (1, 2), {"block_size": 4}),
    "blocks-causal": ((1, 2, 1, 70, 140, 16, 12), (2, 5), {"block_size": 16, "is_causal": True}),
    "blocks-of-64": ((1, 2, 2, 20, 300, 24, 24), (2, 4), {"block_size": 64, "is_causal": True}),
    "blocks-of-300": ((1, 1, 1, 4, 700, 8, 8), (1, 3), {"block_size": 300}),
    "huge-block": ((1, 1, 1, 6, 6, 4, 4), (1, 2), {"block_size": HUGE, "is_causal": True}),
    "query-blocks": ((2, 2, 1, 10, 11, 4, 4), (2, 5), {"query_block": 3, "is_causal": True}),
    "query-blocks-of-16": ((1, 4, 2, 70, 90, 16, 24), (2, 30), {"query_block": 16, "is_causal": True}),
    "query-block-of-100": ((1, 2, 1, 130, 130, 8, 8), (1, 40), {"query_block": 100, "is_causal": True}),
    "huge-query-block": ((1, 2, 1, 5, 6, 4, 4), (2, 3), {"query_block": HUGE}),
    "blocks-of-both": (
        (1, 2, 2, 130, 140, 16, 16),
        (2, 2),
        {"block_size": 64, "query_block": 64, "is_causal": True},
    ),
    "short-blocks-of-both": ((2, 4, 2, 40, 50, 12, 20), (2, 3), {"block_size": 8, "query_block": 16}),
    "B0": ((0, 2, 2, 5, 5, 4, 4), (2, 3), {"is_causal": True}),
    "H0": ((2, 0, 2, 5, 5, 4, 4), (1, 3), {"is_causal": True}),
    "Lq0": ((2, 2, 1, 0, 5, 4, 4), (2, 3), {}),
    "Lk0": ((2, 2, 1, 5, 0, 4, 4), (2, 3), {}),
    "k0": ((2, 2, 1, 5, 5, 4, 4), (2, 0), {}),
}

# (B, Hq, Hkv, Lq, Lk, D, Dv), (Hi, k), query_start, key_start, their dtype, options.
PLACES: dict[
    str, tuple[tuple[int, ...], tuple[int, int], list[int] | None, list[int] | None, torch.dtype, dict[str, Any]]
] = {
    # Blocks are counted from the first token behind the padding, and what lies before it cannot be listed.
    "left-padding": (
        (3, 2, 2, 9, 9, 4, 7),
        (1, 3),
        [0, -3, -9],
        [0, -3, -9],
        torch.int64,
        {"block_size": 2, "is_causal": True},
    ),
    "left-padding-keys": ((3, 2, 2, 9, 9, 4, 4), (2, 5), [0, -3, -9], [0, -3, -9], torch.int64, {"is_causal": True}),
    "trimmed-cache": ((2, 2, 1, 3, 8, 4, 4), (1, 4), [9, 9], [2, 4], torch.int32, {"block_size": 4, "is_causal": True}),
    "static-cache": ((2, 2, 1, 3, 130, 4, 4), (2, 40), [20, 127], None, torch.int32, {"is_causal": True}),
    "out-of-reach": (
        (4, 1, 1, 5, 5, 4, 4),
        (1, 5),
        [100, -100, HUGE, -HUGE],
        None,
        torch.int64,
        {"is_causal": True},
    ),
    "far-keys": ((2, 1, 1, 5, 5, 4, 4), (1, 4), None, [HUGE, -HUGE], torch.int64, {"block_size": 3, "is_causal": True}),
}


def list_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for index, (name, (shape, (list_heads, listed), options)) in enumerate(LISTS.items()):
        inputs = attention_inputs(*shape, dtype=dtype, device=device, list_heads=list_heads, listed=listed, **options)
        if index % 2:
            rows = ("query", "key", "value")
            inputs |= {key: positions_first(inputs[key]) for key in rows} | {"indices": inputs["indices"].int()}
        yield Sample(name, inputs)


def place_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, (shape, (list_heads, listed), query_start, key_start, integer, options) in PLACES.items():
        inputs = attention_inputs(*shape, dtype=dtype, device=device, list_heads=list_heads, listed=listed, **options)
        for argument, start in (("query_start", query_start), ("key_start", key_start)):
            if start is not None:
                inputs[argument] = torch.tensor(start, dtype=integer, device=device)
        yield Sample(name, inputs)


def side_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """With biases and sinks, which may have any floating dtype."""
    side_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def key_bias(batch: int, keys: int, dtype: torch.dtype = side_dtype) -> Tensor:
        bias = random(batch, keys, dtype=dtype, device=device)
        bias[0, : keys // 2] = -math.inf
        return bias

    def pair_bias(inputs: Inputs, heads: int, dtype: torch.dtype = side_dtype) -> Tensor:
        batch, _, lists, listed = inputs["indices"].shape
        bias = random(batch, heads, lists, listed, dtype=dtype, device=device, seed=4)
        bias[..., 0] = -math.inf
        return bias

    def sink(heads: int, dtype: torch.dtype = side_dtype) -> Tensor:
        return random(heads, dtype=dtype, device=device, seed=3)

    inputs = attention_inputs(2, 2, 1, 5, 6, 4, 3, dtype=dtype, device=device, list_heads=2, listed=5)
    yield Sample("key-bias", inputs | {"key_bias": key_bias(2, 6)})
    yield Sample("bias-hides-all", inputs | {"key_bias": torch.full((2, 6), -math.inf, dtype=dtype, device=device)})
    yield Sample("pair-bias", inputs | {"pair_bias": pair_bias(inputs, 2)})
    yield Sample("sink", inputs | {"sink": sink(2)})
    inputs = attention_inputs(
        1, 4, 2, 70, 70, 8, 8, dtype=dtype, device=device, list_heads=2, listed=12, is_causal=True
    )
    yield Sample(
        "all-sides",
        inputs | {"key_bias": key_bias(1, 70, torch.bfloat16), "pair_bias": pair_bias(inputs, 4), "sink": sink(4)},
    )
    yield Sample("pair-bias-of-key-heads", inputs | {"pair_bias": pair_bias(inputs, 2, torch.bfloat16)})
    shared = inputs | {"indices": inputs["indices"][:, :1]}
    yield Sample("pair-bias-of-all-heads", shared | {"pair_bias": pair_bias(inputs, 1)})
    inputs = attention_inputs(
        2,
        2,
        1,
        37,
        50,
        8,
        8,
        dtype=dtype,
        device=device,
        list_heads=1,
        listed=4,
        block_size=8,
        query_block=16,
        is_causal=True,
    )
    yield Sample("pair-bias-of-blocks", inputs | {"pair_bias": pair_bias(inputs, 2), "sink": sink(2)})
    inputs = attention_inputs(2, 2, 1, 4, 0, 4, 4, dtype=dtype, device=device, list_heads=2, listed=2)
    yield Sample("sink-no-keys", inputs | {"sink": sink(2, torch.float16)})
    # Exact scores whose exponentials are infinite or 0, and which tie: the second feature does not count.
    score = 1024.0 if dtype == torch.float64 else 89.0
    signs = integers(0, 2, 1, 2, 9, 1, device=device).mul(2).sub(1).to(dtype)
    query = torch.cat([signs * (score / 2), signs * 0], dim=-1)
    key = torch.cat([signs.flip(2) * 2, random(1, 2, 9, 1, dtype=dtype, device=device)], dim=-1)
    # Values with which delta, a product with the rounded output, does not cancel.
    value = random(1, 2, 9, 3, dtype=dtype, device=device, seed=5)
    lists = integers(0, 9, 1, 2, 9, 6, device=device)
    large = {"query": query, "key": key, "value": value, "indices": lists, "scale": 1.0}
    yield Sample("large-scores", large)
    yield Sample("large-scores-sink", large | {"sink": torch.tensor([score, -score], dtype=dtype, device=device)})
    # The scores of a query differ in the last bits of a dtype, or not at all; other features tell keys apart.
    near = random(1, 2, 1, 4, dtype=dtype, device=device).expand(-1, -1, 9, -1)
    other = random(1, 2, 9, 4, dtype=dtype, device=device)
    key = torch.cat([near * (1 + torch.finfo(dtype).eps * signs), other], dim=-1)
    query = torch.cat([near, torch.zeros_like(other)], dim=-1)
    yield Sample("near-equal-scores", {"query": query, "key": key, "value": value, "indices": lists})


def unseen_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """What no list names, and what sees nothing, holds NaN and infinities."""

    def spoiled(tensor: Tensor, *positions: slice) -> Tensor:
        tensor = tensor.clone()
        for index, position in enumerate(positions):
            tensor[:, :, position] = (math.nan, math.inf, -math.inf)[index % 3]
        return tensor

    gone = (slice(3, 4), slice(20, 30), slice(66, 70))
    kept = torch.tensor([j for j in range(70) if not any(s.start <= j < s.stop for s in gone)], device=device)
    for name, options in (("keys", {}), ("query-blocks", {"query_block": 16})):
        inputs = attention_inputs(
            1, 2, 1, 67, 70, 12, 9, dtype=dtype, device=device, list_heads=2, listed=11, **options
        )
        entries = kept[inputs["indices"].clamp(0, len(kept) - 1)]
        entries[..., 4] = -1
        inputs["indices"] = entries
        yield Sample(
            f"unlisted-{name}", inputs | {argument: spoiled(inputs[argument], *gone) for argument in ("key", "value")}
        )
    # Blocks 0 and 2 of 5 keys are listed; of the second a causal query sees a part.
    inputs = attention_inputs(
        1, 2, 2, 13, 20, 6, 6, dtype=dtype, device=device, list_heads=1, listed=2, block_size=5, is_causal=True
    )
    inputs["indices"] = torch.tensor([2, 0], device=device).expand(1, 1, 13, 2)
    inputs["query_start"] = torch.tensor([0], device=device)
    behind = (slice(5, 10), slice(13, 15), slice(15, 20))
    yield Sample(
        "unlisted-blocks", inputs | {argument: spoiled(inputs[argument], *behind) for argument in ("key", "value")}
    )
    # Queries in front of all keys see nothing under causality, and one whose list names nothing.
    inputs = attention_inputs(1, 2, 1, 71, 33, 8, 8, dtype=dtype, device=device, list_heads=1, listed=7, is_causal=True)
    inputs["indices"][:, :, 50] = torch.tensor([-1, 33, 99, -5, 40, -1, -1], device=device)
    blind = inputs | {"query": spoiled(inputs["query"], slice(0, 37), slice(37, 38), slice(50, 51))}
    yield Sample("unseeing-queries", blind)
    yield Sample("unseeing-queries-sink", blind | {"sink": random(2, dtype=dtype, device=device)})


def extreme_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Biases and sinks at the ends of their range."""
    side_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lowest = torch.finfo(side_dtype).min
    inputs = attention_inputs(2, 2, 1, 5, 6, 4, 3, dtype=dtype, device=device, list_heads=2, listed=4)
    bias = torch.full((2, 6), lowest, dtype=side_dtype, device=device)
    yield Sample("lowest-bias", inputs | {"key_bias": bias})
    bias = bias.clone()
    bias[0, 2], bias[1, 4] = 0.75 * lowest, 0
    yield Sample("lowest-bias-of-most", inputs | {"key_bias": bias})
    pair_bias = torch.full((2, 2, 5, 4), lowest, dtype=side_dtype, device=device)
    pair_bias[..., 1] = 0.75 * lowest
    yield Sample("lowest-pair-bias", inputs | {"pair_bias": pair_bias})
    sink = torch.tensor([lowest, -math.inf], dtype=side_dtype, device=device)
    yield Sample("lowest-sink", inputs | {"sink": sink})


def topk_attention_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    yield from list_samples(dtype, device)
    yield from place_samples(dtype, device)
    yield from side_samples(dtype, device)
    yield from unseen_samples(dtype, device)
    yield from extreme_samples(dtype, device)


# The log-sum-exp comes from the kernels that topk_attention runs.
LSE_SAMPLES = {
    "list-per-head",
    "groups-list-per-head",
    "blocks-causal",
    "query-blocks-of-16",
    "blocks-of-both",
    "B0",
    "Lk0",
    "k0",
    "left-padding",
    "bias-hides-all",
    "all-sides",
    "pair-bias-of-blocks",
    "sink-no-keys",
    "large-scores-sink",
    "unlisted-keys",
    "unseeing-queries-sink",
    "lowest-pair-bias",
}


def lse_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    return (sample for sample in topk_attention_samples(dtype, device) if sample.id in LSE_SAMPLES)


def invalid_attention(device: str, good: Inputs) -> Iterator[Invalid]:
    yield from invalid_inputs(device, good)
    yield Invalid("block-size", good | {"block_size": 0}, "expected block_size >= 1, got 0")
    indices = good["indices"]
    yield Invalid(
        "indices-rank", good | {"indices": indices[0]}, "expected indices of shape [B, Hi, Nq, k], got [2, 5, 3]"
    )
    yield Invalid(
        "indices-dtype", good | {"indices": indices.short()}, "expected indices of dtype Long or Int, got Short"
    )
    yield Invalid(
        "list-heads",
        good | {"indices": indices[:, :1].expand(-1, 3, -1, -1)},
        "expected indices's number of heads to be 1, key's = 2 or query's = 4, got 3",
    )
    yield Invalid(
        "lists",
        good | {"indices": indices[:, :, :4]},
        "expected indices of shape [B, Hi, Nq, k] = [2, 2, 5, 3], got [2, 2, 4, 3]",
    )
    yield Invalid(
        "lists-of-blocks",
        good | {"query_block": 2},
        "expected indices of shape [B, Hi, Nq, k] = [2, 2, 3, 3], got [2, 2, 5, 3]",
    )
    yield Invalid("query-block", good | {"query_block": 0}, f"expected query_block in 1..{HUGE}, got 0")
    pair_bias = torch.zeros(2, 2, 5, 3, device=device)
    dims = "[B, Hi or Hq, Nq, k]"
    yield Invalid("pair-rank", good | {"pair_bias": pair_bias[0]}, f"expected pair_bias of shape {dims}, got [2, 5, 3]")
    yield Invalid(
        "pair-heads",
        good | {"pair_bias": pair_bias[:, :1]},
        "expected pair_bias's number of heads to be indices's = 2 or query's = 4, got 1",
    )
    yield Invalid(
        "pair-shape",
        good | {"pair_bias": pair_bias[..., 1:]},
        f"expected pair_bias of shape {dims} = [2, 2, 5, 3], got [2, 2, 5, 2]",
    )
    yield Invalid("pair-dtype", good | {"pair_bias": pair_bias.int()}, f"expected pair_bias of dtype {FLOATS}, got Int")


def small_inputs(device: str) -> Inputs:
    return attention_inputs(2, 4, 2, 5, 6, 8, 3, dtype=torch.float32, device=device, list_heads=2, listed=3)


def topk_attention_invalid(device: str) -> Iterator[Invalid]:
    return invalid_attention(device, small_inputs(device))


def topk_attention_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    inputs = attention_inputs(
        2, 4, 2, length, length + 3, 24, 20, dtype=dtype, device=device, list_heads=2, listed=11, query_block=3
    )
    return inputs | {
        "is_causal": True,
        "scale": 0.3,
        "key_bias": random(2, length + 3, dtype=dtype, device=device),
        "pair_bias": random(*inputs["indices"].shape, dtype=dtype, device=device),
        "sink": random(4, dtype=dtype, device=device),
        "query_start": torch.tensor([3, 1], device=device),
        "key_start": torch.tensor([0, -2], dtype=torch.int32, device=device),
    }


def topk_attention_large(device: str) -> Inputs:
    """Four tensors of 4 GB."""
    shape = (2**15 + 1, 1, 256, 256)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name in ("query", "key", "value")}
    entries = integers(0, 256, shape[0], 1, 256, 8, device=device)
    return {name: tensor.normal_() for name, tensor in tensors.items()} | {"indices": entries, "is_causal": True}


def topk_attention_autocast(device: str) -> tuple[Inputs, Inputs]:
    """What is multiplied is lowered, what is added to scores is not."""
    wide = topk_attention_sized(torch.float32, device, 8)
    return wide, wide | {name: wide[name].bfloat16() for name in ("query", "key", "value")}


# ---- _topk_attention_backward -------------------------------------------------------------------

SIDES = ("key_bias", "sink", "pair_bias")


def backward_inputs(inputs: Inputs, grad_output: Tensor | None = None) -> Inputs:
    options = {"block_size": 1, "query_block": 1, "is_causal": False, "scale": None}
    forward = operators._topk_attention_forward
    return inputs_of_backward(forward, inputs, SIDES, options, grad_output)


def backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in lse_samples(dtype, device):
        inputs = backward_inputs(sample.inputs)
        yield Sample(sample.id, inputs)
        if sample.id == "all-sides":
            yield from samples_of_gradients(inputs, DIFFERENTIABLE, ("indices",))


def backward_invalid(device: str) -> Iterator[Invalid]:
    good = backward_inputs(small_inputs(device))
    yield from invalid_attention(device, good)
    yield from invalid_rows(good, {name: only(DIFFERENTIABLE, name) for name in SIDES})
    yield absent(good, "indices", "probabilities are made of it")


def backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return backward_inputs(topk_attention_sized(dtype, device, length))


def backward_large(device: str) -> Inputs:
    inputs = topk_attention_large(device)
    return backward_inputs(inputs, torch.randn_like(inputs["query"]))


DIFFERENTIABLE = ("query", "key", "value", *SIDES)

# The backward is made of the output, which has been rounded: with few keys much of it cancels.
GRADIENT_TOLERANCE = {torch.float32: 2e-5}

CASES = [
    OpCase(
        "topk_attention",
        topk_attention_samples,
        topk_attention_invalid,
        topk_attention_sized,
        reference=reference.topk_attention,
        differentiable=DIFFERENTIABLE,
        backward="_topk_attention_backward",
        gradient_tolerance=GRADIENT_TOLERANCE,
        unbatched=("sink",),
        autocast=topk_attention_autocast,
        launches=2,
        large=topk_attention_large,
    ),
    OpCase(
        "topk_attention_lse",
        lse_samples,
        topk_attention_invalid,
        topk_attention_sized,
        reference=reference.topk_attention_lse,
        differentiable=DIFFERENTIABLE,
        backward="_topk_attention_backward",
        gradient_tolerance=GRADIENT_TOLERANCE,
        unbatched=("sink",),
        autocast=topk_attention_autocast,
        launches=2,
        large=topk_attention_large,
    ),
    OpCase(
        "_topk_attention_forward",
        lse_samples,
        topk_attention_invalid,
        topk_attention_sized,
        launches=2,
        large=topk_attention_large,
    ),
    OpCase(
        "_topk_attention_backward",
        backward_samples,
        backward_invalid,
        backward_sized,
        launches=6,
        large=backward_large,
    ),
]
