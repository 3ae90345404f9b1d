"""What is special to sparse_attention: equality with span_attention, orders of lists, blocks, positions, merging."""

from typing import Any

import pytest
import torch
from contract import FLOATS, Inputs, assert_same_bits, gradients, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchops

NAMES = ("query", "key", "value")


def qkv(*shape: int, dtype: torch.dtype = torch.float64) -> Inputs:
    return {name: random(*shape, dtype=dtype, device="cpu", seed=seed) for seed, name in enumerate(NAMES)}


def seen_keys(queries: int, keys: int, indices: Tensor, **options: Any) -> Tensor:
    """[Lq, Lk], how often the operator sees each key: equal scores, and values that say which key they come from."""
    zeros = torch.zeros(1, 1, max(queries, keys), 1, dtype=torch.float64)
    value = torch.eye(keys, dtype=torch.float64)[None, None]
    output, logsumexp = torchops.topk_attention_lse(
        zeros[:, :, :queries], zeros[:, :, :keys], value, indices, **options
    )
    return (output * logsumexp.exp()[..., None])[0, 0].round().long()


def all_keys(queries: int, keys: int) -> Tensor:
    return torch.arange(keys).expand(1, 1, queries, keys)


# ---- span_attention -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_all_keys_are_full_attention(is_causal: bool, dtype: torch.dtype) -> None:
    inputs = qkv(2, 3, 70, 16, dtype=dtype)
    expected = gradients(lambda **call: torchops.span_attention(**call, is_causal=is_causal), inputs, NAMES)
    for options, indices in (
        ({}, all_keys(70, 70)),
        ({"query_block": 70}, all_keys(1, 70)),
        ({"block_size": 16}, all_keys(70, 5)),
        ({"block_size": 70, "query_block": 9}, all_keys(8, 1)),
    ):
        indices = indices.expand(2, -1, -1, -1)
        actual = gradients(
            lambda options=options, indices=indices, **call: torchops.topk_attention(
                **call, indices=indices, is_causal=is_causal, **options
            ),
            inputs,
            NAMES,
        )
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_window_and_a_list_merge() -> None:
    """As in NSA: parts of the keys by their logsumexp, which has a gradient."""
    inputs = qkv(1, 2, 60, 8)
    window = {"left": 9, "right": 0, "is_causal": True}
    before = torch.arange(60)[:, None] - torch.arange(10, 60)
    lists = before.masked_fill(before < 0, -1).expand(1, 1, -1, -1)

    def merged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        one, one_lse = torchops.span_attention_lse(query, key, value, **window)
        other, other_lse = torchops.topk_attention_lse(query, key, value, lists)
        weight = torch.sigmoid(one_lse - other_lse.clamp(min=-1e30))[..., None]
        return one * weight + other * (1 - weight)

    expected = gradients(lambda **call: torchops.span_attention(**call, is_causal=True), inputs, NAMES)
    torch.testing.assert_close(gradients(merged, inputs, NAMES), expected)


# ---- lists ----------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "queries": draw(st.integers(1, 70)),
        "keys": draw(st.integers(1, 90)),
        "listed": draw(st.integers(0, 12)),
        "block_size": draw(st.one_of(st.integers(1, 9), st.just(2**62))),
        "query_block": draw(st.one_of(st.integers(1, 9), st.integers(60, 70))),
        "is_causal": draw(st.booleans()),
        "query_start": draw(st.one_of(st.none(), st.integers(-80, 80))),
        "key_start": draw(st.one_of(st.none(), st.integers(-80, 80), st.sampled_from([2**50, -(2**50)]))),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(deadline=None, max_examples=150)
@given(calls())
def test_sees_the_keys_of_the_rule(call: dict[str, Any]) -> None:
    queries, keys, block_size = call["queries"], call["keys"], call["block_size"]
    lists = -(-queries // call["query_block"])
    generator = torch.Generator().manual_seed(call["seed"])
    indices = torch.randint(-3, keys // min(block_size, keys) + 4, (1, 1, lists, call["listed"]), generator=generator)
    start = {name: None if call[name] is None else torch.tensor([call[name]]) for name in ("query_start", "key_start")}
    t0 = call["key_start"] or 0
    p0 = keys - queries if call["query_start"] is None else call["query_start"]
    expected = torch.zeros(queries, keys, dtype=torch.int64)
    for i in range(queries):
        for entry in indices[0, 0, i // call["query_block"]].tolist():
            for j in range(keys):
                named = entry == (j if block_size == 1 else (t0 + j) // block_size) and entry >= 0
                expected[i, j] += named and (not call["is_causal"] or t0 + j <= p0 + i)
    options = {name: call[name] for name in ("block_size", "query_block", "is_causal")}
    assert torch.equal(seen_keys(queries, keys, indices, **options, **start), expected)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", [{}, {"block_size": 8, "query_block": 16}, {"query_block": 4}], ids=str)
def test_the_order_of_a_list_does_not_show(dtype: torch.dtype, options: dict[str, int]) -> None:
    """Biases go with their entries; keys listed several times with several biases are no exception."""
    inputs = qkv(2, 4, 70, 24, dtype=dtype)
    inputs |= {name: inputs[name][:, :2] for name in ("key", "value")}
    lists, names = -(-70 // options.get("query_block", 1)), -(-70 // options.get("block_size", 1))
    indices = torch.randint(-1, names + 1, (2, 2, lists, 30), generator=torch.Generator().manual_seed(0))
    bias = random(2, 4, lists, 30, dtype=torch.float32, device="cpu")
    order = torch.rand(2, 2, lists, 30, generator=torch.Generator().manual_seed(1)).argsort(-1)
    for pair_bias in (None, bias):
        call = inputs | {"indices": indices, "pair_bias": pair_bias, "is_causal": True, **options}
        names_of_gradients = NAMES if pair_bias is None else (*NAMES, "pair_bias")
        expected = [torchops.topk_attention(**call), *gradients(torchops.topk_attention, call, names_of_gradients)]
        of_bias = order.repeat_interleave(2, dim=1)
        permuted = call | {"indices": indices.gather(-1, order).int()}
        if pair_bias is not None:
            permuted["pair_bias"] = pair_bias.gather(-1, of_bias)
        actual = [
            torchops.topk_attention(**permuted),
            *gradients(torchops.topk_attention, permuted, names_of_gradients),
        ]
        if pair_bias is not None:
            actual[-1] = torch.empty_like(actual[-1]).scatter(-1, of_bias, actual[-1])
        assert_same_bits(actual, expected, "permuted")


def test_a_key_listed_twice_counts_twice() -> None:
    indices = torch.tensor([4, 1, 4, -1, 4]).expand(1, 1, 3, 5)
    assert seen_keys(3, 6, indices).tolist() == [[0, 1, 0, 0, 3, 0]] * 3


def test_entries_that_name_no_key_are_skipped() -> None:
    for entry in (-1, -(2**40), 6, 2**31, 2**31 + 2, 2**40, 2**63 - 1, -(2**63)):
        indices = torch.tensor([entry, 2, entry]).expand(1, 1, 3, 3)
        assert seen_keys(3, 6, indices).tolist() == [[0, 0, 1, 0, 0, 0]] * 3, entry


def test_blocks_are_counted_from_the_first_token_behind_the_padding() -> None:
    """Two tokens of padding, blocks of 3: block 0 holds tokens 0 to 2, which are keys 2 to 4."""
    options = {"block_size": 3, "key_start": torch.tensor([-2])}
    for block, keys in ((0, [2, 3, 4]), (1, [5, 6, 7]), (2, [8]), (-1, []), (3, [])):
        seen = seen_keys(1, 9, torch.tensor([[[[block]]]]), **options)
        assert seen.nonzero()[:, 1].tolist() == keys


def test_heads_share_lists_as_they_share_keys() -> None:
    inputs = qkv(1, 4, 9, 8)
    inputs |= {name: inputs[name][:, :2] for name in ("key", "value")}
    indices = torch.randint(0, 9, (1, 4, 9, 3), generator=torch.Generator().manual_seed(0))
    for shared in (indices[:, :1], indices[:, :2], indices):
        actual = torchops.topk_attention(**inputs, indices=shared)
        repeated = shared.repeat_interleave(4 // shared.shape[1], dim=1)
        assert_same_bits([actual], [torchops.topk_attention(**inputs, indices=repeated)], str(shared.shape))


@pytest.mark.numeric
@pytest.mark.parametrize("scale", [0.3, -7e4, 1e8])
def test_a_single_key_has_gradients_of_exactly_zero_to_scores(scale: float) -> None:
    for dtype in FLOATS:
        inputs = qkv(1, 2, 30, 20, dtype=dtype)
        indices = torch.randint(0, 30, (1, 2, 30, 1), generator=torch.Generator().manual_seed(0))
        call = inputs | {"indices": indices, "scale": scale}
        to_query, to_key, _ = gradients(torchops.topk_attention, call, NAMES)
        assert to_query.eq(0).all() and to_key.eq(0).all()


@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 2), (3, 1)])
def test_a_pass_over_heads_and_two_passes_have_the_same_bits(batch: int, heads: int) -> None:
    """One thread does heads as a whole, several cut a head into queries and ranges of keys."""
    inputs = qkv(batch, heads, 300, 8, dtype=torch.float32)
    blocks = torch.randint(-1, 20, (batch, heads, 300, 9), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        for options in ({"block_size": 16}, {}):
            call = inputs | {"indices": blocks * (16 // options.get("block_size", 1)), "is_causal": True, **options}
            results = []
            for threads in (1, 2, 4, 7):
                torch.set_num_threads(threads)
                results.append(gradients(torchops.topk_attention, call, NAMES))
            for threads, result in zip((2, 4, 7), results[1:], strict=True):
                assert_same_bits(result, results[0], f"{threads} threads, {options}")
    finally:
        torch.set_num_threads(before)


# ---- topk_scores ----------------------------------------------------------------------------------


ROWS = ("query", "key")


def keys_of_columns(queries: int, keys: int, indices: Tensor, **options: Any) -> Tensor:
    """[B, Hi, Lq, columns], -1 for none: what scores say of keys that hold their numbers."""
    ones = torch.ones(*indices.shape[:2], queries, 1, dtype=torch.float64)
    numbers = torch.arange(keys, dtype=torch.float64)[:, None].expand(*indices.shape[:2], -1, -1)
    scores = torchops.topk_scores(ones, numbers, indices, scale=1, **options)
    return scores.masked_fill(scores == -torch.inf, -1).long()


@settings(deadline=None, max_examples=150)
@given(calls())
def test_columns_are_the_keys_of_the_rule(call: dict[str, Any]) -> None:
    queries, keys, block_size = call["queries"], call["keys"], min(call["block_size"], 100)
    lists = -(-queries // call["query_block"])
    generator = torch.Generator().manual_seed(call["seed"])
    indices = torch.randint(-3, keys // min(block_size, keys) + 4, (1, 1, lists, call["listed"]), generator=generator)
    start = {name: None if call[name] is None else torch.tensor([call[name]]) for name in ("query_start", "key_start")}
    t0 = call["key_start"] or 0
    p0 = keys - queries if call["query_start"] is None else call["query_start"]
    expected = torch.full((queries, call["listed"], block_size), -1)
    for i in range(queries):
        for place, entry in enumerate(indices[0, 0, i // call["query_block"]].tolist()):
            for offset in range(block_size):
                j = entry if block_size == 1 else entry * block_size + offset - t0
                if entry >= 0 and 0 <= j < keys and (not call["is_causal"] or t0 + j <= p0 + i):
                    expected[i, place, offset] = j
    options = {name: call[name] for name in ("query_block", "is_causal")}
    actual = keys_of_columns(queries, keys, indices, block_size=block_size, **options, **start)
    assert torch.equal(actual[0, 0], expected.flatten(1))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": 0.4},
        {"query_block": 7, "is_causal": True},
        {"block_size": 6, "query_block": 16, "is_causal": True, "key_start": torch.tensor([-3, 4])},
        {"block_size": 5, "query_start": torch.tensor([-20, 9]), "key_start": torch.tensor([2, 0]), "is_causal": True},
    ],
    ids=str,
)
def test_softmax_of_scores_is_the_distribution_of_topk_attention(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Keys that a list names twice, entries that name none and queries that see nothing among them."""
    inputs = qkv(2, 4, 70, 16, dtype=dtype)
    inputs |= {name: inputs[name][:, :2] for name in ("key", "value")}
    lists, names = -(-70 // options.get("query_block", 1)), -(-70 // options.get("block_size", 1))
    indices = torch.randint(-1, names + 1, (2, 2, lists, 13), generator=torch.Generator().manual_seed(0))
    places = {name: value for name, value in options.items() if name != "scale"}
    keys = keys_of_columns(70, 70, indices, **places).repeat_interleave(2, dim=1)

    def by_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torchops.topk_scores(query, key, indices, **options)
        weights = scores.softmax(-1).masked_fill((keys == -1).all(-1, keepdim=True), 0)
        chosen = value.repeat_interleave(2, dim=1)[:, :, None].expand(-1, -1, 70, -1, -1)
        chosen = chosen.gather(3, keys.clamp(min=0)[..., None].expand(-1, -1, -1, -1, 16))
        return (weights[..., None, :] @ chosen)[..., 0, :]

    attend = lambda **call: torchops.topk_attention(**call, indices=indices, **options)  # noqa: E731
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(by_scores(**inputs), attend(**inputs), rtol=tolerance, atol=tolerance)
    actual, expected = gradients(by_scores, inputs, NAMES), gradients(attend, inputs, NAMES)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"block_size": 16}, {"query_block": 16}], ids=str)
@pytest.mark.parametrize("ascending", [True, False])
def test_ranges_of_keys_have_the_same_bits(options: dict[str, int], ascending: bool) -> None:
    """One head, whose gradient to keys threads cut into ranges; lists of any order."""
    inputs = qkv(1, 1, 700, 8, dtype=torch.float32)
    lists, names = -(-700 // options.get("query_block", 1)), 700 // options.get("block_size", 1)
    indices = torch.randint(-1, names + 1, (1, 1, lists, 60), generator=torch.Generator().manual_seed(0))
    indices = indices.sort().values if ascending else indices
    call = {name: inputs[name] for name in ROWS} | {"indices": indices, "is_causal": True, **options}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append([torchops.topk_scores(**call), *gradients(torchops.topk_scores, call, ROWS)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0], "threads")


def test_gradients_to_columns_without_a_score_are_not_looked_at() -> None:
    inputs = {name: random(1, 2, 40, 8, dtype=torch.float32, device="cpu", seed=seed) for seed, name in enumerate(ROWS)}
    indices = torch.randint(-2, 42, (1, 1, 40, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for hidden in (0.0, torch.nan):
        call = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        scores = torchops.topk_scores(**call, indices=indices, is_causal=True)
        grad = random(*scores.shape, dtype=torch.float32, device="cpu").masked_fill(scores == -torch.inf, hidden)
        results.append(torch.autograd.grad(scores, list(call.values()), grad))
    assert_same_bits(results[1], results[0], "NaN")


def test_scores_keep_what_the_gradient_asked_for_is_made_of() -> None:
    inputs = {"query": random(1, 2, 40, 8, dtype=torch.float32, device="cpu"), "key": torch.randn(1, 1, 50, 8)}
    indices = all_keys(40, 50)[..., :6]
    for name, other in (("query", "key"), ("key", "query")):
        call = inputs | {name: inputs[name].clone().requires_grad_()}
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            torchops.topk_scores(**call, indices=indices)
        assert [tensor.shape for tensor in saved] == [inputs[other].shape, indices.shape]


# ---- what the backward keeps ------------------------------------------------------------------------


def test_saves_what_the_gradients_asked_for_are_made_of() -> None:
    inputs = qkv(1, 2, 40, 16, dtype=torch.float32)
    indices = all_keys(40, 40)[..., :8]
    kept: dict[str, set[int]] = {}
    for name in NAMES:
        call = inputs | {name: inputs[name].clone().requires_grad_()}
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            torchops.topk_attention(**call, indices=indices)
        kept[name] = {tensor.numel() for tensor in saved}
        rows = inputs["query"].numel()
        assert kept[name] <= {rows, indices.numel(), 2 * 2 * 40}
    assert len(kept["query"]) == 3


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
