"""Attention over keys that codes choose: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from attention_cases import (
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

from .code_choice import both_codes, padding


def attention_inputs(
    batch: int,
    heads: tuple[int, int],
    queries: int,
    keys: int,
    dims: tuple[int, int],
    subspaces: int,
    dtype: torch.dtype,
    device: str,
    **options: Any,
) -> Inputs:
    return {
        "query": random(batch, heads[0], queries, dims[0], dtype=dtype, device=device),
        "key": random(batch, heads[1], keys, dims[0], dtype=dtype, device=device, seed=1),
        "value": random(batch, heads[1], keys, dims[1], dtype=dtype, device=device, seed=2),
        **both_codes(batch, heads, queries, keys, subspaces, device),
        **options,
    }


# B, (Hq, Hkv), Lq, Lk, (D, Dv), M, options. On the CPU 4 queries choose at a time and 64 are a tile, and counts of 64
# keys are looked at together; on CUDA lists are made for as many queries as take no more memory than the tensors do.
SHAPES: dict[str, tuple[int, tuple[int, int], int, int, tuple[int, int], int, dict[str, Any]]] = {
    "causal": (1, (2, 1), 150, 150, (8, 12), 8, {"k": 20, "is_causal": True}),
    "all": (2, (2, 2), 5, 130, (16, 8), 8, {"k": 17}),
    "groups": (1, (4, 2), 67, 70, (24, 40), 4, {"k": 9, "is_causal": True, "scale": 0.3}),
    "forced": (1, (2, 1), 70, 70, (5, 3), 3, {"k": 12, "is_causal": True, "sink_keys": 3, "local_keys": 6}),
    "forced-all": (1, (1, 1), 9, 67, (4, 4), 3, {"k": 9, "sink_keys": 2, "local_keys": 6}),
    "decode": (2, (4, 2), 1, 300, (40, 24), 8, {"k": 70, "is_causal": True}),
    "D256-Dv128": (1, (2, 1), 3, 40, (256, 128), 4, {"k": 17}),
    # Tiles of one head of each group and of some of its queries.
    "lists-above-tensors": (1, (4, 2), 70, 70, (2, 1), 4, {"k": 40, "is_causal": True}),
    "lists-of-a-query": (2, (2, 2), 9, 300, (1, 1), 4, {"k": 290}),
    "k-above-keys": (1, (2, 1), 6, 6, (4, 4), 4, {"k": 11, "is_causal": True}),
    "k1": (1, (2, 1), 9, 129, (8, 8), 16, {"k": 1, "is_causal": True}),
    "k0": (1, (2, 1), 3, 5, (4, 4), 4, {"k": 0}),
    "no-codes": (1, (1, 1), 3, 9, (4, 4), 0, {"k": 2}),
    "many-codes": (1, (1, 1), 3, 80, (4, 4), 253, {"k": 30}),
    "no-keys": (2, (2, 1), 3, 0, (4, 4), 4, {"k": 2, "is_causal": True}),
    "no-queries": (2, (2, 1), 0, 5, (4, 4), 4, {"k": 2}),
    "no-heads": (2, (0, 1), 3, 5, (4, 4), 4, {"k": 2}),
    "no-rows": (0, (2, 1), 3, 5, (4, 4), 4, {"k": 2}),
}

# query_start and key_start.
PLACES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], torch.dtype]] = {
    "starts": ((5, -20, 300), (-3, 2, 0), torch.int64),
    "left-padding": ((0, -3, -9), (0, -3, -9), torch.int32),
    "far": ((2**60, -(2**60), 0), (0, -(2**40), 2**40), torch.int64),
}


def attention_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for index, (name, (*shape, options)) in enumerate(SHAPES.items()):
        inputs = attention_inputs(*shape, dtype=dtype, device=device, **options)
        if index % 2:
            rows = ("query", "key", "value", "query_codes")
            inputs |= {argument: positions_first(inputs[argument]) for argument in rows}
        yield Sample(name, inputs)
    for name, (query_start, key_start, integer) in PLACES.items():
        inputs = attention_inputs(3, (2, 1), 12, 40, (6, 4), 4, dtype=dtype, device=device, k=6, is_causal=True)
        places = {"query_start": query_start, "key_start": key_start}
        inputs |= {argument: torch.tensor(start, dtype=integer, device=device) for argument, start in places.items()}
        yield Sample(name, inputs | {"sink_keys": 2, "local_keys": 2})

    side_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = attention_inputs(2, (2, 1), 5, 9, (4, 3), 4, dtype=dtype, device=device, k=4)
    bias = random(2, 9, dtype=side_dtype, device=device)
    bias[0, :4] = -math.inf
    yield Sample("key-bias", inputs | {"key_bias": bias})
    yield Sample("bias-hides-all", inputs | {"key_bias": torch.full_like(bias, -math.inf)})
    yield Sample("sink", inputs | {"sink": random(2, dtype=side_dtype, device=device, seed=3)})
    lowest = torch.finfo(side_dtype).min
    yield Sample("lowest-bias", inputs | {"key_bias": torch.full_like(bias, lowest)})
    inputs = attention_inputs(1, (4, 2), 70, 70, (8, 8), 4, dtype=dtype, device=device, k=12, is_causal=True)
    bias = random(1, 70, dtype=torch.bfloat16, device=device)
    bias[:, 3::5] = -math.inf
    yield Sample("all-sides", inputs | {"key_bias": bias, "sink": random(4, dtype=side_dtype, device=device, seed=3)})
    inputs = attention_inputs(2, (2, 1), 4, 0, (4, 4), 4, dtype=dtype, device=device, k=2)
    yield Sample("sink-no-keys", inputs | {"sink": random(2, dtype=torch.float16, device=device, seed=3)})

    # What a bias hides is not chosen, and may hold anything.
    inputs = attention_inputs(2, (2, 1), 70, 66, (8, 6), 5, dtype=dtype, device=device, k=10, is_causal=True)
    bias = padding(2, 66, device).nan_to_num(nan=0.5, neginf=-math.inf).to(side_dtype)
    hidden = bias.isinf()[:, None, :, None]
    spoiled = {argument: inputs[argument].masked_fill(hidden, math.nan) for argument in ("key", "value")}
    yield Sample("hidden-keys", inputs | spoiled | {"key_bias": bias})


# The log-sum-exp comes from the kernels that pq_attention runs.
LSE_SAMPLES = {
    "causal",
    "groups",
    "forced",
    "lists-above-tensors",
    "k0",
    "no-keys",
    "no-queries",
    "no-rows",
    "starts",
    "bias-hides-all",
    "all-sides",
    "sink-no-keys",
    "hidden-keys",
}


def lse_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    return (sample for sample in attention_samples(dtype, device) if sample.id in LSE_SAMPLES)


def small_inputs(device: str) -> Inputs:
    return attention_inputs(2, (4, 2), 5, 6, (8, 3), 3, dtype=torch.float32, device=device, k=4)


def invalid_attention(device: str, good: Inputs) -> Iterator[Invalid]:
    yield from invalid_inputs(device, good)
    query, key = good["query_codes"], good["key_codes"]
    for name, dims in (("query_codes", "[B, Hq, Lq, M]"), ("key_codes", "[B, Hkv, Lk, M]")):
        shape = list(good[name].shape)
        yield Invalid(f"{name}-rank", good | {name: good[name][0]}, f"expected {name} of shape {dims}, got {shape[1:]}")
        yield Invalid(f"{name}-dtype", good | {name: good[name].int()}, f"expected {name} of dtype Byte, got Int")
        for what, other in (("batch", good[name][:1]), ("heads", good[name][:, :1]), ("rows", good[name][:, :, 1:])):
            yield Invalid(
                f"{name}-{what}",
                good | {name: other},
                f"expected {name} of shape {dims} = {shape}, got {list(other.shape)}",
            )
    yield Invalid(
        "M",
        good | {"key_codes": key[..., 1:]},
        "expected key_codes of shape [B, Hkv, Lk, M] = [2, 2, 6, 3], got [2, 2, 6, 2]",
    )
    many = {"query_codes": query[..., :1].repeat(1, 1, 1, 254), "key_codes": key[..., :1].repeat(1, 1, 1, 254)}
    yield Invalid("M254", good | many, "expected query_codes's last dimension in 0..253, got 254")
    yield Invalid("k", good | {"k": -1}, "expected k in 0..1073741824, got -1")
    for name in ("sink_keys", "local_keys"):
        yield Invalid(name, good | {name: -1}, f"expected {name} >= 0, got -1")
    yield Invalid("forced", good | {"sink_keys": 2, "local_keys": 3}, "expected sink_keys + local_keys <= k = 4, got 5")


def attention_invalid(device: str) -> Iterator[Invalid]:
    return invalid_attention(device, small_inputs(device))


def attention_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    inputs = attention_inputs(
        2, (4, 2), length, length + 3, (24, 20), 4, dtype=dtype, device=device, k=11, is_causal=True
    )
    bias = random(2, length + 3, dtype=dtype, device=device)
    bias[:, 3::7] = -math.inf
    return inputs | {
        "scale": 0.3,
        "sink_keys": 1,
        "local_keys": 2,
        "key_bias": bias,
        "sink": random(4, dtype=dtype, device=device),
        "query_start": torch.tensor([3, 1], device=device),
        "key_start": torch.tensor([0, -2], dtype=torch.int32, device=device),
    }


def attention_large(device: str) -> Inputs:
    """Four tensors of 4 GB."""
    shape = (2**15 + 1, 1, 256, 256)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name in ("query", "key", "value")}
    rows: dict[str, Tensor] = {name: tensor.normal_() for name, tensor in tensors.items()}
    codes = {
        name: integers(0, 4, *shape[:3], 4, device=device, seed=len(name)) for name in ("query_codes", "key_codes")
    }
    return rows | {name: code.to(torch.uint8) for name, code in codes.items()} | {"k": 8, "is_causal": True}


def attention_autocast(device: str) -> tuple[Inputs, Inputs]:
    """What is multiplied is lowered, what is added to scores is not."""
    wide = attention_sized(torch.float32, device, 8)
    return wide, wide | {name: wide[name].bfloat16() for name in ("query", "key", "value")}


# ---- _pq_attention_backward ---------------------------------------------------------------------

SIDES = ("key_bias", "sink")
DIFFERENTIABLE = ("query", "key", "value", *SIDES)


def backward_inputs(inputs: Inputs, grad_output: Tensor | None = None) -> Inputs:
    options = {"is_causal": False, "scale": None, "sink_keys": 0, "local_keys": 0}
    forward = operators._pq_attention_forward
    return inputs_of_backward(forward, inputs, SIDES, options, grad_output)


def backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in lse_samples(dtype, device):
        inputs = backward_inputs(sample.inputs)
        yield Sample(sample.id, inputs)
        if sample.id == "lists-above-tensors":
            for name in ("query", "key", "value"):
                yield Sample(f"tiles-to-{name}", inputs | only(DIFFERENTIABLE, name))
        if sample.id == "all-sides":
            yield from samples_of_gradients(inputs, DIFFERENTIABLE, ("query_codes", "key_codes"))


def backward_invalid(device: str) -> Iterator[Invalid]:
    good = backward_inputs(small_inputs(device))
    yield from invalid_attention(device, good)
    yield from invalid_rows(good, {name: only(DIFFERENTIABLE, name) for name in SIDES})
    for name in ("query_codes", "key_codes"):
        yield absent(good, name, "probabilities are made of it")


def backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return backward_inputs(attention_sized(dtype, device, length))


def backward_large(device: str) -> Inputs:
    inputs = attention_large(device)
    return backward_inputs(inputs, torch.randn_like(inputs["query"]))


# The backward is made of the output, which has been rounded: with few keys much of it cancels.
GRADIENT_TOLERANCE = {torch.float32: 2e-5}

CASES = [
    OpCase(
        "pq_attention",
        attention_samples,
        attention_invalid,
        attention_sized,
        reference=reference.pq_attention,
        differentiable=DIFFERENTIABLE,
        backward="_pq_attention_backward",
        gradient_tolerance=GRADIENT_TOLERANCE,
        unbatched=("sink",),
        autocast=attention_autocast,
        launches=2,
        large=attention_large,
    ),
    OpCase(
        "pq_attention_lse",
        lse_samples,
        attention_invalid,
        attention_sized,
        reference=reference.pq_attention_lse,
        differentiable=DIFFERENTIABLE,
        backward="_pq_attention_backward",
        gradient_tolerance=GRADIENT_TOLERANCE,
        unbatched=("sink",),
        autocast=attention_autocast,
        launches=2,
        large=attention_large,
    ),
    OpCase(
        "_pq_attention_forward",
        lse_samples,
        attention_invalid,
        attention_sized,
        launches=2,
        large=attention_large,
    ),
    OpCase(
        "_pq_attention_backward",
        backward_samples,
        backward_invalid,
        backward_sized,
        launches=6,
        large=backward_large,
    ),
]
