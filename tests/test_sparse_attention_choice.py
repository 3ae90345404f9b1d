"""What is special to pq_topk, score_topk and pq_attention: which keys are chosen, and that no list of them is kept."""

from typing import Any

import pytest
import torch
from contract import FLOATS, Inputs, assert_same_bits, gradients, random
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_inputs import NAMES, qkv
from torch import Tensor

import torchops

# ---- pq_topk ------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_chosen_keys_are_no_worse_than_others(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    queries, keys, subspaces, k = draw(1, 6), draw(1, 150), draw(1, 9), draw(1, 40)
    is_causal = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(0, 2**31))
    query_codes, key_codes = (
        torch.randint(3, (1, 1, count, subspaces), dtype=torch.uint8, generator=generator) for count in (queries, keys)
    )
    start = torch.tensor([draw(-5, keys + 5)])
    lists = torchops.pq_topk(query_codes, key_codes, k, is_causal=is_causal, query_start=start)[0, 0]
    for query, row in enumerate(lists):
        position = start.item() + query
        rank = [
            (-(query_codes[0, 0, query] == key_codes[0, 0, key]).sum().item(), abs(position - key), key)
            for key in range(keys)
            if not is_causal or key <= position
        ]
        expected = sorted(key for *_, key in sorted(rank)[:k])
        assert row.tolist() == expected + [-1] * (k - len(expected))


def test_windows_and_sinks_alone_are_span_attention() -> None:
    inputs = qkv(1, 2, 90, 16)
    codes = torch.zeros(1, 2, 90, 1, dtype=torch.uint8)
    indices = torchops.pq_topk(codes, codes + 1, 12, is_causal=True, local_keys=12)
    expected = torchops.span_attention(**inputs, left=11, right=0, is_causal=True)
    torch.testing.assert_close(torchops.topk_attention(**inputs, indices=indices), expected, rtol=1e-10, atol=1e-10)


# ---- score_topk ---------------------------------------------------------------------------------------


@pytest.mark.numeric
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_chosen_scores_are_no_smaller_than_others(data: st.DataObject) -> None:
    """But for rounding, which is all that may differ from a choice by scores in float64."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    heads, queries, keys, k = draw(1, 5), draw(1, 70), draw(1, 300), draw(1, 80)
    keys *= data.draw(st.sampled_from([1, 1, 1, 20]))  # many keys are sampled first
    block_size, query_block = draw(1, 5), draw(1, 9)
    is_causal, relu, adds_heads = (data.draw(st.booleans()) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(0, 2**31))
    shapes = ((1, heads, queries, 9), (1, 1, keys, 9), (1, heads, queries))
    query, key, weights = (torch.randn(shape, generator=generator) for shape in shapes)
    options = {"relu": relu, "block_size": block_size, "query_block": query_block, "is_causal": is_causal}
    lists = torchops.score_topk(query, key, k, weights if adds_heads else None, **options)[0].long()

    scores = query[0].double() @ key[0].double().mT
    scores = scores.relu() if relu else scores
    if adds_heads:
        scores = (weights[0, ..., None].double() * scores).sum(0, keepdim=True)
    if is_causal:
        hidden = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
        scores = scores.masked_fill(hidden, -torch.inf)
    missing = (-queries % query_block, -keys % block_size)
    padded = torch.nn.functional.pad(scores, (0, missing[1], 0, missing[0]), value=-torch.inf)
    scores = padded.unflatten(2, (-1, block_size)).unflatten(1, (-1, query_block)).amax((2, 4))
    assert lists.shape == (*scores.shape[:2], k)
    visible = scores > -torch.inf
    named = lists >= 0
    assert torch.equal(named.sum(-1), visible.sum(-1).clamp(max=k))
    chosen = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool)
    chosen.scatter_(-1, lists.masked_fill(~named, scores.shape[2]), True)
    chosen = chosen[..., :-1]
    assert torch.equal(chosen.sum(-1), named.sum(-1)) and not (chosen & ~visible).any()
    ascending = lists.masked_fill(~named, 2**40)
    assert torch.equal(ascending, ascending.sort(-1).values)
    smallest = scores.masked_fill(~chosen, torch.inf).amin(-1)
    largest = scores.masked_fill(chosen, -torch.inf).amax(-1)
    assert (smallest >= largest - 1e-4).all()


@pytest.mark.numeric
@pytest.mark.parametrize("key_start", [None, torch.tensor([-7]), torch.tensor([5])], ids=str)
def test_all_blocks_that_are_chosen_are_full_attention(key_start: Tensor | None) -> None:
    """Blocks have the names that topk_attention has for them; padding in front is in none."""
    inputs = qkv(1, 2, 90, 16)
    call = {"is_causal": True, "key_start": key_start}
    if key_start is not None:
        call["query_start"] = key_start
    for block_size, query_block in ((1, 1), (8, 1), (1, 7), (8, 16)):
        blocks = {"block_size": block_size, "query_block": query_block}
        indices = torchops.score_topk(inputs["query"], inputs["key"], 100, **blocks, **call)
        actual = torchops.topk_attention(**inputs, indices=indices, **blocks, **call)
        bias = torch.zeros(1, 90)
        if block_size > 1 and key_start is not None:
            bias[:, : max(-key_start.item(), 0)] = -torch.inf
        expected = torchops.span_attention(**inputs, key_bias=bias, **call)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.numeric
def test_scores_that_vanish_are_equal() -> None:
    """-0 is as large as 0: sums of products that are too small for a float32 may be either."""
    key = torch.tensor([-1e-30, 1e-30, 0.0, -1e-30, -1.0])[:, None].expand(1, 1, -1, -1)
    assert torchops.score_topk(torch.full((1, 1, 1, 1), 1e-30), key, 2).tolist() == [[[[0, 1]]]]


# ---- pq_attention -------------------------------------------------------------------------------------

CHOICE = ("query_codes", "key_codes", "k", "sink_keys", "local_keys")


def in_two_steps(**call: Any) -> Tensor:
    """pq_topk, then topk_attention."""
    codes = {name: call.pop(name) for name in CHOICE}
    sides = {name: call[name] for name in ("is_causal", "key_bias", "query_start", "key_start")}
    return torchops.topk_attention(**call, indices=torchops.pq_topk(**codes, **sides))


def chosen_inputs(heads: tuple[int, int], queries: int, keys: int, dim: int, dtype: torch.dtype) -> Inputs:
    shapes = {"query": (heads[0], queries), "key": (heads[1], keys), "value": (heads[1], keys)}
    rows = {
        name: random(2, *shape, dim, dtype=dtype, device="cpu", seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    codes = {
        f"{name}_codes": torch.randint(4, (2, *shapes[name], 4), dtype=torch.uint8, generator=torch.Generator())
        for name in ("query", "key")
    }
    options = {"sink_keys": 0, "local_keys": 0, "is_causal": False, "key_bias": None, "query_start": None}
    return rows | codes | options | {"key_start": None}


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pq_attention_has_the_same_bits_as_choice_and_attention(dtype: torch.dtype) -> None:
    """Also where CUDA makes lists for a tile of queries at a time, whose sums a key carries on."""
    for heads, queries, keys, dim, options in (
        ((4, 2), 70, 75, 24, {"k": 9, "is_causal": True, "sink_keys": 2, "local_keys": 5}),
        ((2, 1), 40, 60, 2, {"k": 40}),  # several tiles of CUDA
        ((2, 2), 9, 130, 1, {"k": 200, "is_causal": True}),  # the same, and more than there are keys
    ):
        inputs = chosen_inputs(heads, queries, keys, dim, dtype) | options
        bias = random(2, keys, dtype=torch.float32, device="cpu", seed=4)
        bias[:, 3::7] = -torch.inf
        sides = {"key_bias": bias, "sink": random(heads[0], dtype=dtype, device="cpu", seed=5)}
        sides |= {"query_start": torch.tensor([keys - queries, 40]), "key_start": torch.tensor([0, -3])}
        for call, names in ((inputs, NAMES), (inputs | sides, (*NAMES, "key_bias", "sink"))):
            expected = [in_two_steps(**call), *gradients(in_two_steps, call, names)]
            actual = [torchops.pq_attention(**call), *gradients(torchops.pq_attention, call, names)]
            assert_same_bits(actual, expected, f"{heads}, {options}, {names}")


def test_pq_attention_keeps_codes_in_place_of_lists() -> None:
    call = chosen_inputs((2, 1), 300, 300, 8, torch.float32) | {"k": 100, "is_causal": True}
    call |= {name: call[name].requires_grad_() for name in NAMES}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = torchops.pq_attention(**call)
    largest = max(tensor.numel() * tensor.element_size() for tensor in (*saved, output))
    assert largest == call["query"].numel() * 4
    assert sum(tensor.dtype == torch.uint8 for tensor in saved) == 2


def test_pq_attention_allocates_no_lists() -> None:
    """Of what torch allocates in either direction nothing is as large as they are, nor is all of it together."""
    call = chosen_inputs((2, 1), 200, 200, 2, torch.float32) | {"k": 120, "is_causal": True}
    call |= {name: call[name].requires_grad_() for name in NAMES}
    lists = 4 * call["query"].numel() // 2 * 120
    for attend, stores_them in ((torchops.pq_attention, False), (in_two_steps, True)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            attend(**call).sum().backward()
        allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
        assert (allocated > lists) == stores_them, (attend, allocated, lists)
