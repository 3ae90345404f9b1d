"""What is special to topk_attention: equality with span_attention, orders of lists, blocks, positions, merging."""

from typing import Any

import pytest
import torch
from contract import FLOATS, assert_same_bits, gradients, random
from hypothesis import given, settings
from sparse_inputs import NAMES, all_keys, calls, qkv
from torch import Tensor

import torchops


def seen_keys(queries: int, keys: int, indices: Tensor, **options: Any) -> Tensor:
    """[Lq, Lk], how often the operator sees each key: equal scores, and values that say which key they come from."""
    zeros = torch.zeros(1, 1, max(queries, keys), 1, dtype=torch.float64)
    value = torch.eye(keys, dtype=torch.float64)[None, None]
    output, logsumexp = torchops.topk_attention_lse(
        zeros[:, :, :queries], zeros[:, :, :keys], value, indices, **options
    )
    return (output * logsumexp.exp()[..., None])[0, 0].round().long()


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
        return torchops.merge_attention([one, other], [one_lse, other_lse])[0]

    expected = gradients(lambda **call: torchops.span_attention(**call, is_causal=True), inputs, NAMES)
    torch.testing.assert_close(gradients(merged, inputs, NAMES), expected)


# ---- lists ----------------------------------------------------------------------------------------


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
