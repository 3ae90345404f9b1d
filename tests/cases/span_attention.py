"""The span_attention family: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from attention_cases import inputs_of_backward, invalid_inputs, invalid_rows, none, positions_first
from contract import Inputs, Invalid, OpCase, Sample, integers, random
from torch import Tensor

from torchops._namespace import operators
from torchops.reference import span_attention as reference

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
    **options: Any,
) -> Inputs:
    return {
        "query": random(batch, heads, queries, dim, dtype=dtype, device=device),
        "key": random(batch, kv_heads, keys, dim, dtype=dtype, device=device, seed=1),
        "value": random(batch, kv_heads, keys, value_dim, dtype=dtype, device=device, seed=2),
        **options,
    }


# (B, Hq, Hkv, Lq, Lk, D, Dv), options. Kernels work in tiles of 64 or 128: lengths around those.
SPANS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "full": ((2, 2, 2, 7, 9, 5, 3), {}),
    "full-D128-64": ((1, 2, 1, 66, 130, 128, 64), {}),
    "one-token": ((2, 2, 1, 1, 1, 1, 1), {"is_causal": True}),
    "causal": ((1, 4, 2, 130, 130, 40, 40), {"is_causal": True}),
    "causal-decode-D256": ((2, 4, 1, 1, 65, 256, 256), {"is_causal": True}),
    "causal-fewer-queries": ((1, 2, 2, 63, 200, 16, 16), {"is_causal": True}),
    "causal-more-queries": ((2, 1, 1, 9, 4, 5, 5), {"is_causal": True}),  # the first queries see nothing
    "scale-0": ((1, 2, 1, 6, 6, 4, 4), {"scale": 0.0}),
    "scale-negative": ((1, 1, 1, 70, 65, 5, 5), {"scale": -0.5, "left": 30, "right": 2}),
    "window-causal": ((1, 2, 1, 200, 200, 16, 40), {"left": 69, "right": 0, "is_causal": True}),
    "window-D64": ((1, 1, 1, 130, 130, 64, 64), {"left": 3, "right": 5}),
    "window-right-only": ((1, 2, 2, 65, 63, 80, 16), {"right": 1}),
    "blocks": ((2, 2, 1, 10, 10, 4, 4), {"block_size": 4, "left": 0, "right": 0}),
    "blocks-causal-D80": (
        (1, 2, 1, 200, 200, 80, 80),
        {"block_size": 64, "left": 0, "right": 0, "is_causal": True},
    ),
    "blocks-and-left": (
        (1, 2, 1, 130, 140, 16, 16),
        {"block_size": 27, "left": 1, "right": 0, "is_causal": True},
    ),
    "band": ((1, 2, 2, 65, 65, 16, 1), {"block_size": 8, "left": 1, "right": 1}),
    "huge-block": ((1, 1, 1, 6, 6, 4, 4), {"block_size": HUGE, "left": HUGE, "right": 0, "is_causal": True}),
    "B0": ((0, 2, 2, 5, 5, 4, 4), {"is_causal": True}),
    "H0": ((2, 0, 2, 5, 5, 4, 4), {"is_causal": True}),
    "Lq0": ((2, 2, 1, 0, 5, 4, 4), {}),
    "Lk0": ((2, 2, 1, 5, 0, 4, 4), {"left": 1}),
}

# (B, Hq, Hkv, Lq, Lk, D, Dv), query_start, key_start, their dtype, options.
PLACES: dict[str, tuple[tuple[int, ...], list[int] | None, list[int] | None, torch.dtype, dict[str, Any]]] = {
    # The specification of a trimmed cache: token 9 of blocks of 4, whose two first keys are gone.
    "trimmed-cache": (
        (2, 2, 1, 1, 8, 4, 4),
        [9, 9],
        [2, 4],
        torch.int64,
        {"block_size": 4, "left": 0, "right": 0, "is_causal": True},
    ),
    # A head for each key head and one query: a tile of one row, and keys of more than one block.
    "decode-window": ((2, 3, 3, 1, 300, 40, 24), [250, 299], None, torch.int64, {"left": 170, "is_causal": True}),
    "static-cache": ((2, 2, 1, 3, 130, 4, 4), [20, 127], None, torch.int32, {"left": 15, "right": 0}),
    "left-padding": (
        (3, 2, 2, 9, 9, 4, 4),
        [0, -3, -9],
        [0, -3, -9],
        torch.int64,
        {"block_size": 2, "left": 1, "right": 0, "is_causal": True},
    ),
    "negative-blocks": ((2, 1, 1, 70, 70, 4, 4), [-101, 5], [-97, -3], torch.int32, {"block_size": 7, "left": 1}),
    "keys-out-of-reach": (
        (4, 1, 1, 5, 5, 4, 4),
        [100, -100, HUGE, -HUGE],
        None,
        torch.int64,
        {"left": 1, "right": 1},
    ),
    "far-keys": ((2, 1, 1, 5, 5, 4, 4), None, [HUGE, -HUGE], torch.int64, {"is_causal": True}),
    "far-together": (
        (2, 1, 1, 66, 66, 4, 4),
        [2**40 + 3, -(2**40)],
        [2**40, -(2**40)],
        torch.int64,
        {"block_size": 5, "left": 1, "right": 0, "is_causal": True},
    ),
}


def span_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for index, (name, (shape, options)) in enumerate(SPANS.items()):
        inputs = attention_inputs(*shape, dtype=dtype, device=device, **options)
        if index % 2:
            inputs = {key: positions_first(v) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        yield Sample(name, inputs)


def place_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, (shape, query_start, key_start, integer, options) in PLACES.items():
        inputs = attention_inputs(*shape, dtype=dtype, device=device, **options)
        for argument, start in (("query_start", query_start), ("key_start", key_start)):
            if start is not None:
                inputs[argument] = torch.tensor(start, dtype=integer, device=device)
        yield Sample(name, inputs)


def side_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """With key_bias and sink, which may have any floating dtype."""
    side_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def key_bias(batch: int, keys: int, dtype: torch.dtype = side_dtype) -> Tensor:
        bias = random(batch, keys, dtype=dtype, device=device)
        bias[0, : keys // 2] = -math.inf
        return bias

    def sink(heads: int, dtype: torch.dtype = side_dtype) -> Tensor:
        return random(heads, dtype=dtype, device=device, seed=3)

    inputs = attention_inputs(2, 2, 1, 5, 6, 4, 3, dtype=dtype, device=device)
    yield Sample("bias", inputs | {"key_bias": key_bias(2, 6)})
    yield Sample("bias-hides-all", inputs | {"key_bias": torch.full((2, 6), -math.inf, dtype=dtype, device=device)})
    yield Sample("sink", inputs | {"sink": sink(2), "left": 1, "right": 0})
    inputs = attention_inputs(1, 4, 2, 70, 70, 8, 8, dtype=dtype, device=device, is_causal=True)
    yield Sample("bias-causal", inputs | {"key_bias": key_bias(1, 70)})  # the first 35 queries see nothing
    yield Sample(
        "bias-sink-window",
        inputs | {"key_bias": key_bias(1, 70, torch.bfloat16), "sink": sink(4), "left": 20, "right": 0},
    )
    inputs = attention_inputs(2, 2, 2, 1, 70, 8, 8, dtype=dtype, device=device)
    yield Sample("bias-decode", inputs | {"key_bias": key_bias(2, 70)})
    inputs = attention_inputs(2, 2, 1, 4, 0, 4, 4, dtype=dtype, device=device)
    yield Sample("sink-no-keys", inputs | {"sink": sink(2, torch.float16)})
    # Exact scores whose exponentials are infinite or 0, and which tie: the second feature does not count.
    score = 1024.0 if dtype == torch.float64 else 89.0
    signs = integers(0, 2, 1, 2, 9, 1, device=device).mul(2).sub(1).to(dtype)
    query = torch.cat([signs * (score / 2), signs * 0], dim=-1)
    key = torch.cat([signs.flip(2) * 2, random(1, 2, 9, 1, dtype=dtype, device=device)], dim=-1)
    value = random(1, 2, 9, 3, dtype=dtype, device=device)
    large = {"query": query, "key": key, "value": value, "scale": 1.0}
    yield Sample("large-scores", large)
    yield Sample("large-scores-sink", large | {"sink": torch.tensor([score, -score], dtype=dtype, device=device)})


def unseen_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """What no query sees, and what sees no key, holds NaN and infinities. Lengths are odd: kernels may take pairs."""

    def spoiled(tensor: Tensor, *positions: slice) -> Tensor:
        tensor = tensor.clone()
        for index, position in enumerate(positions):
            tensor[:, :, position] = (math.nan, math.inf, -math.inf)[index % 3]
        return tensor

    def starts(**positions: int) -> Inputs:
        return {name: torch.tensor([position], device=device) for name, position in positions.items()}

    def inputs(heads: int, kv_heads: int, queries: int, keys: int, **options: Any) -> Inputs:
        return attention_inputs(1, heads, kv_heads, queries, keys, 12, 9, dtype=dtype, device=device, **options)

    # A static cache of which 67 of 131 slots are filled, with several queries and with one, of one head and of a group.
    for name, heads, queries in (("cache", 2, 70), ("cache-few-queries", 2, 3), ("cache-one-query", 1, 1)):
        cache = inputs(heads, 1, queries, 131, is_causal=True) | starts(query_start=67 - queries)
        behind = {argument: spoiled(cache[argument], slice(67, 68), slice(68, 131)) for argument in ("key", "value")}
        yield Sample(f"unseen-{name}", cache | behind)
    # Keys that have left the window: the first that is seen is the second of a pair.
    window = inputs(2, 2, 66, 131, left=9, right=0, is_causal=True) | starts(query_start=60)
    gone = (slice(0, 51), slice(126, 128), slice(128, 131))
    yield Sample(
        "unseen-window", window | {argument: spoiled(window[argument], *gone) for argument in ("key", "value")}
    )
    # All queries lie behind all keys that they could see.
    behind = inputs(1, 1, 65, 65, left=63, right=0, is_causal=True) | starts(query_start=1000, key_start=0)
    yield Sample("unseen-all", behind | {name: spoiled(behind[name], slice(0, 65)) for name in ("key", "value")})
    yield Sample("unseen-all-sink", behind | {"sink": random(1, dtype=dtype, device=device)})
    # Queries in front of all keys see nothing under causality.
    front = inputs(2, 1, 71, 33, is_causal=True)
    yield Sample("unseeing-queries", front | {"query": spoiled(front["query"], slice(0, 37), slice(37, 38))})


def extreme_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Biases and sinks at the ends of their range."""
    side_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lowest = torch.finfo(side_dtype).min
    inputs = attention_inputs(2, 2, 1, 5, 6, 4, 3, dtype=dtype, device=device)
    bias = torch.full((2, 6), lowest, dtype=side_dtype, device=device)
    yield Sample("lowest-bias", inputs | {"key_bias": bias})
    bias = bias.clone()
    bias[0, 2], bias[1, 4] = 0.75 * lowest, 0
    yield Sample("lowest-bias-of-most", inputs | {"key_bias": bias})
    sink = torch.tensor([lowest, -math.inf], dtype=side_dtype, device=device)
    yield Sample("lowest-sink", inputs | {"sink": sink})
    behind = {"query_start": torch.tensor([-9, 0], device=device), "is_causal": True}
    yield Sample("lowest-sink-alone", inputs | behind | {"sink": sink})


# (B, Hq, Hkv, Lq, Lk, D, Dv), options. The keys that few queries see are cut into pieces of 512 and more on the CPU, of
# 128 and more on CUDA.
DECODING: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "decode-two-pieces": ((1, 1, 1, 1, 1024, 8, 8), {}),
    "decode-one-key-more": ((1, 2, 1, 1, 1025, 8, 8), {"is_causal": True}),
    "decode-odd-group": ((1, 3, 1, 1, 1301, 13, 7), {}),
    "decode-group-of-8": ((2, 8, 1, 1, 1100, 16, 24), {"is_causal": True}),
    "decode-several-queries": ((1, 2, 2, 7, 1100, 6, 5), {"is_causal": True}),
    "decode-window-in-a-piece": ((1, 2, 2, 2, 1300, 8, 9), {"left": 200, "right": 0, "is_causal": True}),
    "decode-blocks": ((1, 4, 2, 3, 1300, 4, 4), {"block_size": 600, "left": 1, "right": 0}),
}


def decode_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Few queries and keys of several pieces."""
    side_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name, (shape, options) in DECODING.items():
        yield Sample(name, attention_inputs(*shape, dtype=dtype, device=device, **options))
    inputs = attention_inputs(1, 2, 1, 1, 1300, 8, 8, dtype=dtype, device=device)
    # Columns by which the sum for a sink, a product with the rounded output, does not cancel.
    sink = {"sink": random(2, dtype=side_dtype, device=device, seed=3), "value": inputs["value"].roll(2, -1)}
    bias = random(1, 1300, dtype=side_dtype, device=device)
    for name, begin, end in (("first", 0, 600), ("middle", 500, 1100), ("last", 700, 1300), ("every", 0, 1300)):
        hidden = bias.clone()
        hidden[:, begin:end] = -math.inf
        yield Sample(f"decode-{name}-piece-hidden", inputs | {"key_bias": hidden})
        yield Sample(f"decode-{name}-piece-hidden-sink", inputs | {"key_bias": hidden} | sink)
    # A static cache of which the first 700 slots are filled; what lies behind holds no numbers.
    filled = {"query_start": torch.tensor([699], device=device), "is_causal": True}
    behind = {name: inputs[name].clone() for name in ("key", "value")}
    for tensor in behind.values():
        tensor[:, :, 700:] = math.nan
    yield Sample("decode-unseen", inputs | behind | filled)
    # Scores whose exponentials are infinite or 0, the largest in the last piece; products would be rounded.
    large = torch.full((1, 1300), -1024.0 if dtype == torch.float64 else -89.0, dtype=side_dtype, device=device)
    large[:, 1200:] *= -1
    yield Sample("decode-large-scores", inputs | {"query": torch.zeros_like(inputs["query"]), "key_bias": large + bias})


def span_attention_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    yield from span_samples(dtype, device)
    yield from place_samples(dtype, device)
    yield from side_samples(dtype, device)
    yield from unseen_samples(dtype, device)
    yield from extreme_samples(dtype, device)
    yield from decode_samples(dtype, device)


# The log-sum-exp comes from the kernels that span_attention runs.
LSE_SAMPLES = {
    "full",
    "one-token",
    "causal",
    "causal-more-queries",
    "blocks-and-left",
    "B0",
    "Lk0",
    "left-padding",
    "bias-hides-all",
    "bias-sink-window",
    "sink-no-keys",
    "large-scores-sink",
    "unseen-cache",
    "unseen-cache-one-query",
    "unseen-all",
    "unseen-all-sink",
    "lowest-bias",
    "lowest-sink-alone",
    "decode-odd-group",
    "decode-several-queries",
    "decode-first-piece-hidden",
    "decode-every-piece-hidden-sink",
    "decode-unseen",
}


def lse_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    return (sample for sample in span_attention_samples(dtype, device) if sample.id in LSE_SAMPLES)


def invalid_attention(device: str, good: Inputs) -> Iterator[Invalid]:
    yield from invalid_inputs(device, good)
    yield Invalid("block-size", good | {"block_size": 0}, "expected block_size >= 1, got 0")
    yield Invalid("left", good | {"left": -2}, "expected left >= -1, got -2")
    yield Invalid("right", good | {"right": -HUGE}, f"expected right >= -1, got {-HUGE}")


def span_attention_invalid(device: str) -> Iterator[Invalid]:
    return invalid_attention(device, attention_inputs(2, 4, 2, 5, 6, 8, 3, dtype=torch.float32, device=device))


def span_attention_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    inputs = attention_inputs(2, 4, 2, length, length + 3, 24, 20, dtype=dtype, device=device)
    return inputs | {
        "block_size": 3,
        "left": 6,
        "right": 0,
        "is_causal": True,
        "scale": 0.3,
        "key_bias": random(2, length + 3, dtype=dtype, device=device),
        "sink": random(4, dtype=dtype, device=device),
        "query_start": torch.tensor([3, 1], device=device),
        "key_start": torch.tensor([0, -2], dtype=torch.int32, device=device),
    }


def span_attention_large(device: str) -> Inputs:
    """Four tensors of 4 GB."""
    shape = (2**15 + 1, 1, 256, 256)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name in ("query", "key", "value")}
    return {name: tensor.normal_() for name, tensor in tensors.items()} | {"left": 60, "is_causal": True}


def span_attention_autocast(device: str) -> tuple[Inputs, Inputs]:
    """What is multiplied is lowered, what is added to scores is not."""
    wide = span_attention_sized(torch.float32, device, 8)
    return wide, wide | {name: wide[name].bfloat16() for name in ("query", "key", "value")}


# ---- _span_attention_backward -------------------------------------------------------------------


def backward_inputs(inputs: Inputs, grad_output: Tensor | None = None) -> Inputs:
    options = {"block_size": 1, "left": -1, "right": -1, "is_causal": False, "scale": None}
    forward = operators._span_attention_forward
    return inputs_of_backward(forward, inputs, ("key_bias", "sink"), options, grad_output)


def backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in lse_samples(dtype, device):
        inputs = backward_inputs(sample.inputs)
        yield Sample(sample.id, inputs)
        if sample.id == "bias-sink-window":
            yield Sample("to-query", inputs | {"output_mask": [True, False, False, False, False]})
            yield Sample("to-key", inputs | {"output_mask": [False, True, False, False, False]})
            yield Sample("to-bias", inputs | {"output_mask": [False, False, False, True, False]})
            yield Sample(
                "to-value", inputs | {"output_mask": [False, False, True, False, False]} | none("value", "output")
            )
            sink_only = none("query", "key", "value", "key_bias") | {"output_mask": [False, False, False, False, True]}
            yield Sample("to-sink", inputs | sink_only)
            yield Sample("without-lse", inputs | none("grad_logsumexp"))
            without_value = none("grad_output", "value", "output") | {"output_mask": [True, True, False, True, True]}
            yield Sample("without-output", inputs | without_value)
            yield Sample("without-any", inputs | without_value | none("grad_logsumexp"))


def backward_invalid(device: str) -> Iterator[Invalid]:
    forward = attention_inputs(2, 4, 2, 5, 6, 8, 3, dtype=torch.float32, device=device)
    good = backward_inputs(forward)
    yield from invalid_attention(device, good)
    masks = {
        name: {"output_mask": [other == index for other in range(5)]} for index, name in ((3, "key_bias"), (4, "sink"))
    }
    yield from invalid_rows(good, masks)


def backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return backward_inputs(span_attention_sized(dtype, device, length))


def backward_large(device: str) -> Inputs:
    inputs = span_attention_large(device)
    return backward_inputs(inputs, torch.randn_like(inputs["query"]))


DIFFERENTIABLE = ("query", "key", "value", "key_bias", "sink")

# The backward takes exponentials of scores less their log-sum-exp, which has been rounded.
GRADIENT_TOLERANCE = {torch.float32: 2e-5}

CASES = [
    OpCase(
        "span_attention",
        span_attention_samples,
        span_attention_invalid,
        span_attention_sized,
        reference=reference.span_attention,
        differentiable=DIFFERENTIABLE,
        backward="_span_attention_backward",
        gradient_tolerance=GRADIENT_TOLERANCE,
        unbatched=("sink",),
        autocast=span_attention_autocast,
        launches=1,
        large=span_attention_large,
    ),
    OpCase(
        "span_attention_lse",
        lse_samples,
        span_attention_invalid,
        span_attention_sized,
        reference=reference.span_attention_lse,
        differentiable=DIFFERENTIABLE,
        backward="_span_attention_backward",
        gradient_tolerance=GRADIENT_TOLERANCE,
        unbatched=("sink",),
        autocast=span_attention_autocast,
        launches=1,
        large=span_attention_large,
    ),
    OpCase(
        "_span_attention_forward",
        lse_samples,
        span_attention_invalid,
        span_attention_sized,
        launches=1,
        large=span_attention_large,
    ),
    OpCase(
        "_span_attention_backward",
        backward_samples,
        backward_invalid,
        backward_sized,
        launches=5,
        large=backward_large,
    ),
]
