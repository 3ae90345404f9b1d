"""The choice of keys by codes: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator

import torch
from attention_cases import invalid_sides, positions_first
from contract import Inputs, Invalid, OpCase, Sample, integers, random
from torch import Tensor

from torchops.reference import sparse_attention as reference


def codes(*shape: int, device: str, seed: int = 0, count: int = 4) -> Tensor:
    return integers(0, count, *shape, device=device, seed=seed).to(torch.uint8)


def both_codes(batch: int, heads: tuple[int, int], queries: int, keys: int, subspaces: int, device: str) -> Inputs:
    return {
        "query_codes": codes(batch, heads[0], queries, subspaces, device=device),
        "key_codes": codes(batch, heads[1], keys, subspaces, device=device, seed=1),
    }


def padding(batch: int, keys: int, device: str) -> Tensor:
    """Hides the first keys of a row and some others."""
    bias = random(batch, keys, dtype=torch.float32, device=device)
    bias[:, 3::5] = -math.inf
    for row in range(batch):
        bias[row, : 4 * row] = -math.inf
    bias[:, 4::9] = math.nan
    return bias


def topk_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    if dtype != torch.float32:
        return  # codes are uint8 whatever they were made of
    starts = {"query_start": [5, -20, 300], "key_start": [-3, 2, 0]}
    places = {name: torch.tensor(values, device=device) for name, values in starts.items()}
    # Counts of 64 keys are looked at together.
    for name, (batch, heads, queries, keys, subspaces), k, options in (
        ("causal", (1, (2, 1), 150, 150, 8), 20, {"is_causal": True}),
        ("all", (2, (2, 2), 5, 130, 8), 17, {}),
        ("forced", (1, (2, 1), 70, 70, 3), 12, {"is_causal": True, "sink_keys": 3, "local_keys": 6}),
        ("forced-all", (1, (1, 1), 9, 67, 3), 9, {"sink_keys": 2, "local_keys": 6}),
        ("forced-only", (1, (1, 1), 9, 20, 3), 5, {"is_causal": True, "sink_keys": 2, "local_keys": 3}),
        ("starts", (3, (1, 1), 12, 40, 4), 6, {"is_causal": True, "sink_keys": 2, "local_keys": 2} | places),
        ("starts-all", (3, (1, 1), 12, 40, 4), 6, {"sink_keys": 2, "local_keys": 2} | places),
        ("int32", (3, (1, 1), 2, 9, 2), 3, {name: place.int() for name, place in places.items()}),
        ("padding", (3, (4, 2), 20, 90, 5), 10, {"is_causal": True, "key_bias": padding(3, 90, device)}),
        (
            "padding-forced",
            (3, (1, 1), 8, 66, 5),
            10,
            {"sink_keys": 5, "local_keys": 5, "key_bias": padding(3, 66, device)},
        ),
        ("k-above-keys", (1, (1, 1), 6, 6, 4), 11, {"is_causal": True}),
        ("k-is-keys", (1, (1, 1), 6, 64, 4), 64, {}),
        ("k1", (1, (2, 1), 9, 129, 16), 1, {"is_causal": True}),
        ("k0", (1, (2, 1), 3, 5, 4), 0, {}),
        ("one-code", (1, (1, 1), 40, 200, 1), 9, {}),
        ("many-codes", (1, (1, 1), 3, 100, 253), 30, {}),
        ("odd-codes", (1, (1, 1), 7, 65, 13), 8, {"is_causal": True}),
        ("no-codes", (1, (1, 1), 3, 9, 0), 2, {}),
        ("no-keys", (2, (2, 1), 3, 0, 4), 2, {"is_causal": True}),
        ("no-queries", (2, (2, 1), 0, 5, 4), 2, {}),
        ("no-rows", (0, (2, 1), 3, 5, 4), 2, {}),
    ):
        yield Sample(name, both_codes(batch, heads, queries, keys, subspaces, device) | {"k": k} | options)
    far = both_codes(2, (1, 1), 4, 30, 2, device)
    for sign in (-1, 1):
        start = torch.tensor([sign * 2**60, -sign * 2**40], device=device)
        for causal in (False, True):
            options = {"k": 5, "is_causal": causal, "local_keys": 2, "query_start": start}
            yield Sample(f"far{'-' if sign < 0 else '+'}{causal}", far | options)
    everywhere = both_codes(1, (2, 1), 30, 80, 4, device) | {"k": 7, "is_causal": True}
    yield Sample("strided", everywhere | {"query_codes": positions_first(everywhere["query_codes"])})
    same = {"query_codes": codes(1, 1, 20, 4, device=device, count=1), "k": 7}
    yield Sample("ties", same | {"key_codes": codes(1, 1, 140, 4, device=device, count=1)})
    yield Sample("ties-far", same | {"key_codes": same["query_codes"], "query_start": torch.tensor([9], device=device)})


def topk_invalid(device: str) -> Iterator[Invalid]:
    good = both_codes(2, (4, 2), 5, 6, 3, device) | {"k": 4}
    query, key = good["query_codes"], good["key_codes"]
    for name, dims in (("query_codes", "[B, Hq, Lq, M]"), ("key_codes", "[B, Hkv, Lk, M]")):
        shape = list(good[name].shape[1:])
        yield Invalid(f"{name}-rank", good | {name: good[name][0]}, f"expected {name} of shape {dims}, got {shape}")
        yield Invalid(f"{name}-dtype", good | {name: good[name].int()}, f"expected {name} of dtype Byte, got Int")
    yield Invalid(
        "batch",
        good | {"key_codes": key[:1]},
        "expected key_codes of shape [B, Hkv, Lk, M] = [2, 2, 6, 3], got [1, 2, 6, 3]",
    )
    yield Invalid(
        "M",
        good | {"key_codes": key[..., 1:]},
        "expected key_codes of shape [B, Hkv, Lk, M] = [2, 2, 6, 3], got [2, 2, 6, 2]",
    )
    yield Invalid("no-key-heads", good | {"key_codes": key[:, :0]}, "expected key_codes's number of heads >= 1, got 0")
    yield Invalid(
        "heads",
        good | {"query_codes": query[:, :3]},
        "expected query_codes's number of heads to be a multiple of key_codes's = 2, got 3",
    )
    many = both_codes(1, (1, 1), 2, 3, 254, device)
    yield Invalid("M254", many | {"k": 1}, "expected query_codes's last dimension in 0..253, got 254")
    yield Invalid("k", good | {"k": -1}, "expected k in 0..1073741824, got -1")
    for name in ("sink_keys", "local_keys"):
        yield Invalid(name, good | {name: -1}, f"expected {name} >= 0, got -1")
    yield Invalid("forced", good | {"sink_keys": 2, "local_keys": 3}, "expected sink_keys + local_keys <= k = 4, got 5")
    yield from invalid_sides(device, good)


def topk_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    inputs = both_codes(2, (2, 1), length, length, 4, device)
    return inputs | {"k": 9, "is_causal": True, "sink_keys": 1, "local_keys": 2}


def topk_large(device: str) -> Inputs:
    return both_codes(2**15 + 1, (1, 1), 2**8, 2**8, 4, device) | {"k": 2**8, "is_causal": True}


CASES = [
    OpCase(
        "pq_topk",
        topk_samples,
        topk_invalid,
        topk_sized,
        reference=reference.pq_topk,
        launches=1,
        large=topk_large,
    ),
]
