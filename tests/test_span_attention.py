"""What is special to span_attention: equality with torch's attention, positions, merging, numbers, and counts."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import FLOATS, Inputs, gradients, random, to_double
from hypothesis import given, settings
from hypothesis import strategies as st
from own_process import unpoisoned
from span_inputs import HUGE, qkv, spans
from torch import Tensor

import torchops
from torchops.nn import visible_pairs
from torchops.reference import span_attention as reference


def seen_keys(queries: int, keys: int, **options: Any) -> Tensor:
    """bool [Lq, Lk], as the operator sees it: equal scores, and values that say which key they come from."""
    zeros = torch.zeros(1, 1, max(queries, keys), 1, dtype=torch.float64)
    value = torch.eye(keys, dtype=torch.float64)[None, None]
    return torchops.span_attention(zeros[:, :, :queries], zeros[:, :, :keys], value, **options)[0, 0] > 0


# ---- torch's own attention ------------------------------------------------------------------------


def attention_and_gradients(attention: Any, inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attention(*leaves, **options)
    return [output, *torch.autograd.grad(output.sin().sum(), leaves)]


@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_scaled_dot_product_attention(is_causal: bool) -> None:
    inputs = qkv(2, 3, 70, 16)
    expected = attention_and_gradients(F.scaled_dot_product_attention, inputs, is_causal=is_causal)
    actual = attention_and_gradients(torchops.span_attention, inputs, is_causal=is_causal)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_grouped_heads_equal_scaled_dot_product_attention() -> None:
    query, (key, value, _) = qkv(2, 4, 9, 8)[0], qkv(2, 2, 9, 8)
    expected = attention_and_gradients(F.scaled_dot_product_attention, (query, key, value), enable_gqa=True)
    torch.testing.assert_close(attention_and_gradients(torchops.span_attention, (query, key, value)), expected)


SPANS = [
    {"left": 20, "right": 0, "is_causal": True},
    {"left": 3, "right": 7},
    {"right": 2},
    {"block_size": 32, "left": 0, "right": 0},
    {"block_size": 16, "left": 1, "right": 0, "is_causal": True},
    {"block_size": 10, "left": 1, "right": 1},
]


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_equals_scaled_dot_product_attention_with_a_mask(span: dict[str, Any]) -> None:
    inputs = qkv(1, 2, 100, 8)
    position = torch.arange(100)
    block = position // span.get("block_size", 1)
    distance = block - block[:, None]
    mask = (distance >= -span.get("left", 100)) & (distance <= span.get("right", 100))
    if span.get("is_causal"):
        mask &= position <= position[:, None]
    assert 0 < mask.sum() < mask.numel()
    expected = attention_and_gradients(F.scaled_dot_product_attention, inputs, attn_mask=mask)
    torch.testing.assert_close(attention_and_gradients(torchops.span_attention, inputs, **span), expected)
    assert visible_pairs(100, **span) == mask.sum()


def test_causality_is_aligned_to_the_end_and_torch_aligns_it_to_the_start() -> None:
    query, key, value = qkv(1, 2, 9, 4)
    query = query[:, :, :3]
    aligned_to_start = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    aligned_to_end = F.scaled_dot_product_attention(query, key, value, torch.ones(3, 9).tril(6).bool())
    torch.testing.assert_close(torchops.span_attention(query, key, value, is_causal=True), aligned_to_end)
    start = torch.tensor([0])
    torch.testing.assert_close(
        torchops.span_attention(query, key, value, is_causal=True, query_start=start), aligned_to_start
    )
    assert (aligned_to_end - aligned_to_start).abs().max() > 0.1
    # With more queries than keys the first ones see nothing; torch's see the first key.
    output = torchops.span_attention(key, query, query, is_causal=True)
    assert output[:, :, :6].eq(0).all()
    torch.testing.assert_close(output[:, :, 6:], torchops.span_attention(key[:, :, 6:], query, query, is_causal=True))


def test_blocks_equal_attention_on_a_reshape() -> None:
    inputs = qkv(2, 3, 96, 8)

    def reshaped(*tensors: Tensor) -> Tensor:
        blocks = [tensor.unflatten(2, (-1, 24)).transpose(1, 2) for tensor in tensors]
        return F.scaled_dot_product_attention(*blocks, is_causal=True).transpose(1, 2).flatten(2, 3)

    span = {"block_size": 24, "left": 0, "right": 0, "is_causal": True}
    actual = attention_and_gradients(torchops.span_attention, inputs, **span)
    torch.testing.assert_close(actual, attention_and_gradients(reshaped, inputs))


# ---- positions ------------------------------------------------------------------------------------


def test_a_trimmed_cache_needs_its_start() -> None:
    """Blocks of 4, token 9, whose cache lost its first 2 keys: of the keys 2..9 it sees 8 and 9."""
    span = {"block_size": 4, "left": 0, "right": 0, "is_causal": True}
    query_start, key_start = torch.tensor([9]), torch.tensor([2])
    seen = seen_keys(1, 8, **span, query_start=query_start, key_start=key_start)
    assert seen.nonzero()[:, 1].tolist() == [6, 7]
    assert seen_keys(1, 8, **span).sum() == 4, "shapes alone would tell position 7"


@settings(deadline=None, max_examples=150)
@given(
    spans(),
    st.integers(1, 70),
    st.integers(1, 70),
    st.one_of(st.none(), st.integers(-80, 80)),
    st.one_of(st.none(), st.integers(-80, 80), st.sampled_from([2**50, -(2**50)])),
)
def test_sees_the_keys_of_the_rule(
    span: dict[str, Any], queries: int, keys: int, query_start: int | None, key_start: int | None
) -> None:
    expected = torch.zeros(queries, keys, dtype=torch.bool)
    p0, t0 = keys - queries if query_start is None else query_start, key_start or 0
    for i in range(queries):
        for j in range(keys):
            p, t, size = p0 + i, t0 + j, span["block_size"]
            expected[i, j] = (
                (span["left"] < 0 or p // size - span["left"] <= t // size)
                and (span["right"] < 0 or t // size <= p // size + span["right"])
                and (not span["is_causal"] or t <= p)
            )
    starts = {
        name: None if start is None else torch.tensor([start])
        for name, start in (("query_start", query_start), ("key_start", key_start))
    }
    assert torch.equal(seen_keys(queries, keys, **span, **starts), expected)


@settings(deadline=None, max_examples=50)
@given(spans(), st.integers(-(2**40), 2**40), st.integers(0, 30), st.integers(0, 30))
def test_moving_queries_and_keys_by_whole_blocks_changes_nothing(
    span: dict[str, Any], blocks: int, query_start: int, key_start: int
) -> None:
    query, key, value = qkv(1, 2, 70, 4, dtype=torch.float32)
    shift = blocks * span["block_size"] if span["block_size"] < HUGE else 0
    here = torchops.span_attention_lse(
        query, key, value, **span, query_start=torch.tensor([query_start]), key_start=torch.tensor([key_start])
    )
    there = torchops.span_attention_lse(
        query,
        key,
        value,
        **span,
        query_start=torch.tensor([query_start + shift]),
        key_start=torch.tensor([key_start + shift]),
    )
    torch.testing.assert_close(there, here)


@pytest.mark.parametrize("span", SPANS[:1] + SPANS[4:5] + [{"is_causal": True}], ids=str)
def test_decoding_with_a_cache_that_is_trimmed(span: dict[str, Any]) -> None:
    """Token by token, where every key that will not be seen any more leaves the cache."""
    query, key, value = qkv(2, 2, 80, 4)
    expected = torchops.span_attention(query, key, value, **span)
    reach = span.get("left", 80) * span.get("block_size", 1) + span.get("block_size", 1) - 1
    for token in range(80):
        first = max(token - reach, 0)
        output = torchops.span_attention(
            query[:, :, token : token + 1],
            key[:, :, first : token + 1],
            value[:, :, first : token + 1],
            **span,
            query_start=torch.full((2,), token),
            key_start=torch.full((2,), first),
        )
        torch.testing.assert_close(output, expected[:, :, token : token + 1])


def test_left_padding_is_a_row_that_starts_before_0() -> None:
    """Each row of a padded batch gives what it gives alone."""
    span = {"block_size": 4, "left": 1, "right": 0, "is_causal": True}
    query, key, value = qkv(3, 2, 11, 4)
    padding = torch.tensor([0, 5, 11])
    bias = torch.zeros(3, 11).masked_fill(torch.arange(11) < padding[:, None], -math.inf)
    output = torchops.span_attention(query, key, value, **span, key_bias=bias, query_start=-padding, key_start=-padding)
    for row, skipped in enumerate(padding.tolist()):
        alone = [tensor[row : row + 1, :, skipped:] for tensor in (query, key, value)]
        torch.testing.assert_close(output[row : row + 1, :, skipped:], torchops.span_attention(*alone, **span))
        assert output[row, :, :skipped].eq(0).all()


# ---- merging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [{}, *SPANS], ids=str)
@pytest.mark.parametrize("with_sink", [False, True])
def test_shards_of_a_ring_merge_to_the_whole(span: dict[str, Any], with_sink: bool) -> None:
    """4 shards of queries, each against 4 shards of keys, with gradients through logsumexp."""
    inputs = dict(zip(("query", "key", "value"), qkv(2, 2, 100, 4), strict=True))
    if with_sink:
        inputs["sink"] = torch.tensor([0.5, -1.0], dtype=torch.float64)
    names = list(inputs)

    def ring(query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None = None) -> Tensor:
        shards = []
        for i in range(0, 100, 25):
            parts = []
            for j in range(0, 100, 25):
                part = torchops.span_attention_lse(
                    query[:, :, i : i + 25],
                    key[:, :, j : j + 25],
                    value[:, :, j : j + 25],
                    **span,
                    sink=sink if j == 0 else None,
                    query_start=torch.tensor([i, i]),
                    key_start=torch.tensor([j, j]),
                )
                parts.append(part)
            shards.append(torchops.merge_attention(*map(list, zip(*parts, strict=True)))[0])
        return torch.cat(shards, dim=2)

    whole: Inputs = inputs | span
    torch.testing.assert_close(ring(**inputs), torchops.span_attention(**whole))
    expected = gradients(torchops.span_attention, whole, names)
    torch.testing.assert_close(gradients(ring, inputs, names), expected)


# ---- numbers ----------------------------------------------------------------------------------------

LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 63, 64, 65, 127, 128, 129, 150]))


@pytest.mark.numeric
@settings(deadline=None, max_examples=40)
@given(
    span=spans(),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    queries=LENGTHS,
    keys=LENGTHS,
    dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    bias=st.booleans(),
    sink=st.booleans(),
    start=st.one_of(st.none(), st.integers(-20, 150)),
)
def test_any_shape_and_span(
    span: dict[str, Any],
    heads: tuple[int, int],
    queries: int,
    keys: int,
    dim: int,
    value_dim: int,
    bias: bool,
    sink: bool,
    start: int | None,
) -> None:
    """Results and gradients, against the dense float64 reference."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        inputs: Inputs = span | {
            "query": random(2, heads[0], queries, dim, dtype=dtype, device="cpu"),
            "key": random(2, heads[1], keys, dim, dtype=dtype, device="cpu", seed=1),
            "value": random(2, heads[1], keys, value_dim, dtype=dtype, device="cpu", seed=2),
            "key_bias": random(2, keys, dtype=dtype, device="cpu") if bias else None,
            "sink": random(heads[0], dtype=dtype, device="cpu") if sink else None,
            "query_start": None if start is None else torch.tensor([start, start + 3]),
        }
        names = [name for name in ("query", "key", "value", "key_bias", "sink") if inputs[name] is not None]
        actual = [*torchops.span_attention_lse(**inputs), *gradients(torchops.span_attention_lse, inputs, names)]
        exact = to_double(inputs)
        expected = [*reference.span_attention_lse(**exact), *gradients(reference.span_attention_lse, exact, names)]
        # Relative to the largest of all: where contributions cancel, a gradient is nothing but their rounding.
        largest = max(other.nan_to_num(neginf=0).abs().max().item() for other in expected)
        for what, one, other in zip(["output", "logsumexp", *names], actual, expected, strict=True):
            error = (one.double() - other).nan_to_num().abs().max().item()
            assert error <= tolerance * largest and torch.equal(one == -math.inf, other == -math.inf), (what, error)
            assert not one.isnan().any(), what


def test_a_nan_reaches_the_queries_that_see_it() -> None:
    query, key, value = qkv(1, 2, 600, 8, dtype=torch.float32)
    distance = torch.arange(600).sub(300).abs()
    for name in ("key", "value"):
        inputs = {"query": query, "key": key.clone(), "value": value.clone()}
        inputs[name][0, 0, 300, 3] = math.nan
        output = torchops.span_attention(**inputs, left=10, right=10)
        nans = output.isnan().any(-1)
        assert nans[0, 0, distance <= 10].all(), name
        assert not nans[0, 0, distance > 200].any(), name
        assert not nans[0, 1].any(), name
    query = query.clone()
    query[0, 0, 300, 3] = math.nan
    nans = torchops.span_attention(query, key, value).isnan().any(-1)
    assert torch.equal(nans[0], torch.stack([distance == 0, distance < 0]))
    bias = torch.zeros(1, 600)
    bias[0, 5] = math.nan
    assert torchops.span_attention(query, key, value, key_bias=bias).isnan().all()


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("queries", [1, 7])
def test_a_sink_that_is_no_number_makes_its_head_nan(dtype: torch.dtype, number: float, queries: int) -> None:
    query, key, value = qkv(1, 2, 7, 8, dtype=dtype)
    query = query[:, :, :queries]
    for keys in (7, 0):
        results = torchops.span_attention_lse(
            query, key[:, :, :keys], value[:, :, :keys], sink=torch.tensor([number, 0.5])
        )
        for result in results:
            assert result[:, 0].isnan().all() or (keys == 0 and result is results[0])
            assert not result[:, 1].isnan().any()


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4, -1e7, 1e9])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 70)], ids=str)
def test_a_single_visible_key_is_exact_at_any_score(
    dtype: torch.dtype, scale: float, shape: tuple[int, int, int]
) -> None:
    """Its value is the output, the gradient that comes back is the value's, and there is none to query and key."""
    heads, kv_heads, length = shape
    query = random(1, heads, length, 20, dtype=dtype, device="cpu").requires_grad_()
    key, value = (random(1, kv_heads, length, size, dtype=dtype, device="cpu").requires_grad_() for size in (20, 37))
    output = torchops.span_attention(query, key, value, left=0, right=0, scale=scale)
    assert torch.equal(output, value.repeat_interleave(heads // kv_heads, dim=1))
    grad = random(*output.shape, dtype=dtype, device="cpu", seed=9)
    grads = torch.autograd.grad(output, (query, key, value), grad)
    assert not grads[0].any() and not grads[1].any()
    expected = grad.double().unflatten(1, (kv_heads, -1)).sum(2)
    torch.testing.assert_close(grads[2], expected.to(dtype))


@pytest.mark.numeric
@pytest.mark.parametrize("size", [1e4, 1e7, 1e9])
def test_gradients_of_equal_keys_with_large_scores(size: float) -> None:
    """Three keys share a score that dwarfs the logarithm of their sum."""
    query = torch.full((1, 1, 2, 1), size, requires_grad=True)
    key, value = torch.ones(1, 1, 3, 1, requires_grad=True), torch.tensor([3.0, 6.0, 9.0]).view(1, 1, 3, 1)
    value.requires_grad_()
    output, logsumexp = torchops.span_attention_lse(query, key, value, scale=1.0)
    torch.testing.assert_close(output, torch.full_like(output, 6))
    grads = torch.autograd.grad((output.sum(), logsumexp.sum()), (query, key, value))
    torch.testing.assert_close(grads[0], torch.ones_like(query))
    torch.testing.assert_close(grads[2], torch.full_like(value, 2 / 3))
    torch.testing.assert_close(grads[1].flatten(), 2 * size * torch.tensor([-2 / 3, 1 / 3, 4 / 3]))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_gradient_to_what_sees_nothing_is_none(dtype: torch.dtype) -> None:
    """-inf less -inf makes one, where parts are merged."""
    inputs: Inputs = dict(zip(("query", "key", "value"), qkv(1, 2, 70, 8, dtype=dtype), strict=True))
    inputs |= {"key_bias": torch.zeros(1, 70).masked_fill(torch.arange(70) < 3, -math.inf), "is_causal": True}
    leaves = [inputs[name].requires_grad_() for name in ("query", "key", "value", "key_bias")]
    results = torchops.span_attention_lse(**inputs)
    grads = [torch.ones_like(result) for result in results]
    expected = torch.autograd.grad(results, leaves, grads, retain_graph=True)
    grads[1][..., :3] = math.nan
    for one, other in zip(torch.autograd.grad(results, leaves, grads), expected, strict=True):
        assert torch.equal(one, other)


def test_a_loss_on_logsumexp_alone_knows_no_values() -> None:
    inputs = span_inputs(torch.float64)
    inputs["value"] = torch.full_like(inputs["value"], math.inf).requires_grad_()
    names = ["query", "key", "key_bias", "sink"]

    def loss(attention: Any) -> list[Tensor | None]:
        leaves = [inputs[name].requires_grad_() for name in [*names, "value"]]
        logsumexp = attention(**inputs)[1]
        return list(torch.autograd.grad(logsumexp.sin().sum(), leaves, allow_unused=True))

    actual, expected = loss(torchops.span_attention_lse), loss(reference.span_attention_lse)
    assert actual.pop() is None and expected.pop() is None
    torch.testing.assert_close(actual, expected)


def span_inputs(dtype: torch.dtype) -> Inputs:
    inputs: Inputs = dict(zip(("query", "key", "value"), qkv(2, 2, 40, 16, dtype=dtype), strict=True))
    inputs["value"] = inputs["value"][..., :9]
    inputs |= {"key_bias": torch.randn(2, 40, dtype=dtype), "sink": torch.randn(2, dtype=dtype)}
    return inputs | {"query_start": torch.tensor([0, 1]), "key_start": torch.tensor([0, 2]), "left": 7}


# What a gradient is made of, beside the two numbers a query that probabilities are normalized with.
SCORE_PARTS = {"query", "key", "key_bias", "query_start", "key_start"}
SAVED = {
    "query": SCORE_PARTS | {"value", "output"},
    "key": SCORE_PARTS | {"value", "output"},
    "value": SCORE_PARTS,
    "key_bias": SCORE_PARTS | {"value", "output"},
    "sink": {"sink", "output"},
}


@pytest.mark.parametrize("names", [*((name,) for name in SAVED), ("value", "sink"), tuple(SAVED)], ids=str)
def test_saves_for_the_backward_what_its_gradients_are_made_of(names: tuple[str, ...]) -> None:
    inputs = span_inputs(torch.float32)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for name in names:
        inputs[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = torchops.span_attention(**inputs)
    needed = set().union(*(SAVED[name] for name in names))
    tensors = inputs | {"output": output}
    expected = sum(tensors[name].nbytes for name in needed) + 2 * output[..., 0].nbytes
    assert sum(tensor.nbytes for tensor in saved) == expected
    grads = torch.autograd.grad(output.sin().sum(), [inputs[name] for name in names])
    exact = to_double(inputs)
    leaves = [exact[name].requires_grad_() for name in names]
    for one, other in zip(
        grads, torch.autograd.grad(reference.span_attention(**exact).sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)


def test_logsumexp_counts_the_visible_keys() -> None:
    zeros = torch.zeros(1, 1, 300, 4, dtype=torch.float64)
    for span in [{}, {"is_causal": True}, *SPANS]:
        _, logsumexp = torchops.span_attention_lse(zeros, zeros, zeros, **span)
        assert logsumexp.exp().sum().item() == pytest.approx(visible_pairs(300, **span), rel=1e-12), span


def test_more_than_2_to_the_31_elements() -> None:
    """Offsets beyond 32 bits: rows of a batch that lie 2**31 numbers apart, of which only these are touched."""

    def far_apart(tensor: Tensor) -> Tensor:
        storage = torch.empty(2**31 + tensor[0].numel(), dtype=tensor.dtype)
        return storage.as_strided(tensor.shape, (2**31, *tensor.stride()[1:])).copy_(tensor)

    near = [tensor.bfloat16() for tensor in (*qkv(2, 2, 70, 8), torch.ones(2, 2, 70, 8))]
    results = []
    for *inputs, grad in (near, [far_apart(tensor) for tensor in near]):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = torchops.span_attention(*leaves, left=9)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


PEAK_MEMORY = """
import torch, torchops

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024

def attend(length):
    query, key, value = torch.randn(3, 1, 1, length, 8).requires_grad_().unbind()
    torchops.span_attention(query, key, value, left=15, right=0, is_causal=True).sum().backward()

attend(64)
before = peak()
attend(2**16)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_the_length() -> None:
    """65536 tokens: inputs, outputs and gradients take 20 MiB; a mask would take 4 GiB."""
    command = [sys.executable, "-c", PEAK_MEMORY]
    run = subprocess.run(command, env=unpoisoned(), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) < 128, f"{run.stdout.strip()} MiB"
