"""The choice of keys by scores: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from attention_cases import FLOATS, invalid_sides, positions_first
from contract import Inputs, Invalid, OpCase, Sample, integers, random
from torch import Tensor

from torchops.reference import sparse_attention as reference

HUGE = 2**62


def whole(*shape: int, dtype: torch.dtype, device: str, seed: int = 0, most: int = 3) -> Tensor:
    """Scores of whole numbers are exact, so that every level, device and dtype makes the same choice."""
    return integers(-most, most + 1, *shape, device=device, seed=seed).to(dtype)


def rows_of(
    batch: int, heads: tuple[int, int], queries: int, keys: int, dim: int, dtype: torch.dtype, device: str
) -> Inputs:
    return {
        "query": whole(batch, heads[0], queries, dim, dtype=dtype, device=device),
        "key": whole(batch, heads[1], keys, dim, dtype=dtype, device=device, seed=1),
    }


def weights_of(inputs: Inputs, dtype: torch.dtype | None = None) -> Tensor:
    query = inputs["query"]
    return whole(*query.shape[:3], dtype=dtype or query.dtype, device=query.device, seed=2, most=8) / 8


def padding(batch: int, keys: int, device: str) -> Tensor:
    """Hides the first keys of a row and some others."""
    bias = random(batch, keys, dtype=torch.float32, device=device)
    bias[:, 3::5] = -math.inf
    for row in range(batch):
        bias[row, : 4 * row] = -math.inf
    return bias


# (B, (Hq, Hkv), Lq, Lk, D), k, options. Kernels multiply 64 rows at a time, look at 64 scores together, and sample
# from 4096 on.
CHOICES: dict[str, tuple[tuple[int, tuple[int, int], int, int, int], int, dict[str, Any]]] = {
    "heads": ((2, (2, 2), 7, 9, 5), 4, {}),
    "causal": ((1, (4, 2), 150, 150, 16), 20, {"is_causal": True}),
    "relu": ((1, (2, 1), 20, 140, 3), 60, {"relu": True}),
    "one-token": ((2, (2, 1), 1, 1, 1), 1, {"is_causal": True}),
    "D256": ((1, (2, 1), 3, 70, 256), 17, {}),
    "decode": ((2, (4, 2), 1, 300, 40), 70, {"is_causal": True}),
    "few-queries": ((1, (8, 2), 9, 200, 24), 30, {"is_causal": True}),
    "more-queries": ((2, (1, 1), 9, 4, 5), 3, {"is_causal": True}),
    "sampled": ((1, (2, 1), 2, 4300, 16), 500, {}),
    "sampled-few": ((1, (1, 1), 2, 4200, 16), 7, {}),
    "sampled-most": ((1, (1, 1), 2, 4100, 16), 4090, {}),
    "sampled-causal": ((1, (1, 1), 12, 4200, 8), 300, {"is_causal": True, "relu": True}),
    "k-above-keys": ((1, (1, 1), 6, 6, 4), 11, {"is_causal": True}),
    "k-is-keys": ((1, (1, 1), 6, 64, 4), 64, {}),
    "k1": ((1, (2, 1), 9, 129, 16), 1, {"is_causal": True}),
    "blocks": ((2, (2, 1), 10, 10, 4), 2, {"block_size": 4}),
    "blocks-causal": ((1, (2, 2), 70, 140, 16), 5, {"block_size": 16, "is_causal": True}),
    "blocks-relu": ((1, (1, 1), 9, 300, 2), 20, {"block_size": 2, "relu": True}),
    "blocks-of-300": ((1, (1, 1), 4, 700, 8), 2, {"block_size": 300}),
    "blocks-sampled": ((1, (1, 1), 2, 9000, 8), 700, {"block_size": 2}),
    "huge-block": ((1, (1, 1), 6, 6, 4), 2, {"block_size": HUGE, "is_causal": True}),
    "query-blocks": ((2, (2, 1), 10, 11, 4), 5, {"query_block": 3, "is_causal": True}),
    "query-blocks-of-16": ((1, (4, 2), 70, 90, 16), 30, {"query_block": 16, "is_causal": True}),
    "query-block-of-100": ((1, (2, 1), 130, 130, 8), 40, {"query_block": 100, "is_causal": True}),
    "huge-query-block": ((1, (2, 1), 5, 6, 4), 3, {"query_block": HUGE}),
    "blocks-of-both": ((1, (2, 2), 130, 140, 16), 2, {"block_size": 64, "query_block": 64, "is_causal": True}),
    "k0": ((1, (2, 1), 3, 5, 4), 0, {}),
    "no-keys": ((2, (2, 1), 3, 0, 4), 2, {"is_causal": True}),
    "no-keys-blocks": ((2, (2, 1), 3, 0, 4), 2, {"block_size": 3}),
    "no-queries": ((2, (2, 1), 0, 5, 4), 2, {}),
    "no-heads": ((2, (0, 2), 3, 5, 4), 2, {}),
    "no-rows": ((0, (2, 1), 3, 5, 4), 2, {}),
}

# The same with weights.
INDEXERS: dict[str, tuple[tuple[int, tuple[int, int], int, int, int], int, dict[str, Any]]] = {
    "indexer": ((2, (8, 1), 70, 70, 12), 9, {"relu": True, "is_causal": True}),
    "indexer-of-64-heads": ((1, (64, 1), 3, 40, 16), 9, {"relu": True}),
    "indexer-of-100-heads": ((1, (100, 2), 3, 90, 4), 20, {"relu": True, "is_causal": True}),
    "indexer-sums": ((1, (6, 2), 20, 30, 8), 7, {}),
    "indexer-keys-of-heads": ((2, (5, 5), 9, 70, 8), 7, {"relu": True}),
    "indexer-decode": ((2, (4, 1), 1, 4200, 8), 100, {"relu": True, "is_causal": True}),
    "indexer-blocks": ((1, (3, 1), 20, 90, 8), 4, {"relu": True, "block_size": 8, "is_causal": True}),
    "indexer-query-blocks": ((1, (4, 2), 50, 60, 8), 9, {"relu": True, "query_block": 20, "is_causal": True}),
    "indexer-no-keys": ((1, (2, 1), 3, 0, 4), 2, {}),
}

# query_start and key_start of three rows, and their dtype.
STARTS: dict[str, tuple[list[int] | None, list[int] | None, torch.dtype]] = {
    "cache": ([5, -20, 300], [-3, 2, 0], torch.int64),
    "padding": ([0, -3, -9], [0, -3, -9], torch.int32),
    "far-queries": ([HUGE, -HUGE, 2**40], None, torch.int64),
    "far-keys": (None, [HUGE, -HUGE, 2**31 * 3 - 13], torch.int64),
}


def odd_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """What is no number, infinite, hidden or equal."""
    inputs = rows_of(3, (2, 1), 20, 90, 5, dtype, device) | {"k": 30, "is_causal": True}
    bias = padding(3, 90, device)
    yield Sample("hidden", inputs | {"key_bias": bias})
    yield Sample("hidden-blocks", inputs | {"key_bias": bias.double(), "block_size": 4})
    yield Sample("hidden-indexer", inputs | {"key_bias": bias, "weights": weights_of(inputs), "relu": True})
    yield Sample("all-hidden", inputs | {"key_bias": torch.full((3, 90), -math.inf, dtype=dtype, device=device)})
    odd_bias = bias.masked_fill(bias > 1, math.nan).masked_fill(bias < -1, math.inf)
    yield Sample("odd-bias", inputs | {"key_bias": odd_bias})
    query, key = inputs["query"].clone(), inputs["key"].clone()
    query[:, :, 3] = math.nan
    query[:, 1, 5:9] = math.inf
    key[:, :, 10:14, 2] = math.nan
    key[:, :, 30:33] = math.inf
    key[:, :, 40:44, 1] = -math.inf
    for name, options in (
        ("", {}),
        ("-relu", {"relu": True}),
        ("-blocks", {"block_size": 3}),
        ("-query-blocks", {"query_block": 6}),
        ("-indexer", {"weights": weights_of(inputs)}),
        ("-indexer-relu", {"weights": weights_of(inputs), "relu": True}),
    ):
        yield Sample(f"odd-numbers{name}", inputs | {"query": query, "key": key, "k": 85, **options})
    weights = weights_of(inputs)
    weights[:, :, 4], weights[:, 0, 7], weights[:, 1, 9] = math.nan, math.inf, -math.inf
    yield Sample("odd-weights", inputs | {"weights": weights})
    # Scores of -inf are the smallest, and are chosen before nothing is.
    lowest = {"query": torch.ones(1, 1, 2, 1, dtype=dtype, device=device), "k": 4}
    for name, keys in (("lowest", [1.0, -math.inf, math.nan, 3.0, -math.inf, -math.inf]), ("equal", [2.0] * 70)):
        rows = torch.tensor(keys, dtype=dtype, device=device)[:, None].expand(1, 1, -1, -1)
        yield Sample(name, lowest | {"key": rows})
        yield Sample(f"{name}-blocks", lowest | {"key": rows, "block_size": 2, "k": 2})
    # A plateau of zeros, as sums of ReLU have it.
    plateau = {"query": torch.ones(1, 1, 3, 2, dtype=dtype, device=device), "relu": True}
    for keys, k in ((300, 40), (4300, 700)):
        rows = whole(1, 1, keys, 2, dtype=dtype, device=device) - 2
        yield Sample(f"plateau-of-{keys}", plateau | {"key": rows, "k": k})
    # Scores that differ in the last bits of a dtype, or not at all.
    signs = integers(0, 3, 1, 1, 100, 1, device=device).sub(1).to(dtype)
    near = {"query": torch.ones(1, 1, 2, 1, dtype=dtype, device=device), "k": 40}
    yield Sample("near-equal-scores", near | {"key": 1 + torch.finfo(dtype).eps * signs})


def topk_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for index, (name, (shape, k, options)) in enumerate(CHOICES.items()):
        inputs = rows_of(*shape, dtype, device) | {"k": k, **options}
        if index % 2:
            inputs |= {row: positions_first(inputs[row]) for row in ("query", "key")}
        yield Sample(name, inputs)
    for index, (name, (shape, k, options)) in enumerate(INDEXERS.items()):
        inputs = rows_of(*shape, dtype, device) | {"k": k, **options}
        yield Sample(name, inputs | {"weights": weights_of(inputs, (None, torch.float32, torch.bfloat16)[index % 3])})
    for name, (query_start, key_start, integer) in STARTS.items():
        starts = {
            argument: torch.tensor(start, dtype=integer, device=device)
            for argument, start in (("query_start", query_start), ("key_start", key_start))
            if start is not None
        }
        inputs = rows_of(3, (2, 1), 12, 40, 4, dtype, device) | {"k": 6} | starts
        for options in ({}, {"block_size": 3}, {"query_block": 5}, {"block_size": 7, "query_block": 4}):
            for is_causal in (False, True):
                yield Sample(f"{name}-{options}-{is_causal}", inputs | {"is_causal": is_causal} | options)
        yield Sample(f"{name}-indexer", inputs | {"is_causal": True, "weights": weights_of(inputs), "relu": True})
    yield from odd_samples(dtype, device)


def topk_invalid(device: str) -> Iterator[Invalid]:
    good = rows_of(2, (4, 2), 5, 6, 8, torch.float32, device) | {"k": 4}
    query, key = good["query"], good["key"]
    for name, dims in (("query", "[B, Hq, Lq, D]"), ("key", "[B, Hkv, Lk, D]")):
        shape = list(good[name].shape[1:])
        yield Invalid(f"{name}-rank", good | {name: good[name][0]}, f"expected {name} of shape {dims}, got {shape}")
    yield Invalid("query-dtype", good | {"query": query.int()}, f"expected query of dtype {FLOATS}, got Int")
    yield Invalid("key-dtype", good | {"key": key.double()}, "expected key of query's dtype Float, got Double")
    for dim in (0, 257):
        wide = torch.zeros(2, 4, 5, dim, device=device)
        yield Invalid(f"D{dim}", good | {"query": wide}, f"expected query's last dimension in 1..256, got {dim}")
    yield Invalid(
        "key-batch",
        good | {"key": key[:1]},
        "expected key of shape [B, Hkv, Lk, D] = [2, 2, 6, 8], got [1, 2, 6, 8]",
    )
    yield Invalid("no-key-heads", good | {"key": key[:, :0]}, "expected key's number of heads >= 1, got 0")
    yield Invalid(
        "heads",
        good | {"query": query[:, :3]},
        "expected query's number of heads to be a multiple of key's = 2, got 3",
    )
    yield Invalid("k", good | {"k": -1}, "expected k in 0..1073741824, got -1")
    yield Invalid("block-size", good | {"block_size": 0}, "expected block_size >= 1, got 0")
    yield Invalid("query-block", good | {"query_block": 0}, f"expected query_block in 1..{HUGE}, got 0")
    weights = weights_of(good)
    yield Invalid(
        "weights-no-heads",
        good | {"query": query[:, :0], "weights": weights[:, :0]},
        "expected query's number of heads >= 1, got 0",
    )
    yield Invalid(
        "weights-rank",
        good | {"weights": weights[0]},
        "expected weights of shape [B, Hq, Lq], got [4, 5]",
    )
    yield Invalid(
        "weights-shape",
        good | {"weights": weights[:, :2]},
        "expected weights of shape [B, Hq, Lq] = [2, 4, 5], got [2, 2, 5]",
    )
    yield Invalid("weights-dtype", good | {"weights": weights.int()}, f"expected weights of dtype {FLOATS}, got Int")
    yield from invalid_sides(device, good)


def topk_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    inputs = {
        "query": random(2, 4, length, 24, dtype=dtype, device=device),
        "key": random(2, 2, length + 3, 24, dtype=dtype, device=device, seed=1),
    }
    return inputs | {
        "k": 9,
        "weights": random(2, 4, length, dtype=dtype, device=device),
        "relu": True,
        "is_causal": True,
        "query_block": 3,
        "key_bias": random(2, length + 3, dtype=dtype, device=device),
        "query_start": torch.tensor([3, 1], device=device),
        "key_start": torch.tensor([0, -2], dtype=torch.int32, device=device),
    }


def topk_autocast(device: str) -> tuple[Inputs, Inputs]:
    """What is multiplied is lowered, weights are not."""
    wide = topk_sized(torch.float32, device, 8)
    return wide, wide | {name: wide[name].bfloat16() for name in ("query", "key")}


def topk_large(device: str) -> Inputs:
    """Two tensors of 4 GB."""
    rows = {name: torch.empty(2**15 + 1, 1, 256, 256, dtype=torch.bfloat16, device=device) for name in ("query", "key")}
    return {name: tensor.normal_() for name, tensor in rows.items()} | {"k": 8, "is_causal": True}


CASES = [
    OpCase(
        "score_topk",
        topk_samples,
        topk_invalid,
        topk_sized,
        reference=reference.score_topk,
        autocast=topk_autocast,
        launches=1,
        large=topk_large,
    ),
]
