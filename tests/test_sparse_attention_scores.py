"""What is special to topk_scores: which key a column stands for, its softmax, threads, and what the backward keeps."""

from typing import Any

import pytest
import torch
from contract import FLOATS, assert_same_bits, gradients, random
from hypothesis import given, settings
from sparse_inputs import NAMES, all_keys, calls, qkv
from torch import Tensor

import torchops

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
