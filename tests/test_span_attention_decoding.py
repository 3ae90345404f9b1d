"""span_attention of few queries, whose keys are cut into pieces."""

import math
from typing import Any

import pytest
import torch
from contract import FLOATS, Inputs, random, to_double
from hypothesis import given, settings
from hypothesis import strategies as st
from span_inputs import qkv, spans
from torch import Tensor

import torchops
from torchops.reference import span_attention as reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(1, 1, 1), (8, 1, 1), (3, 3, 5), (16, 1, 4)])
def test_decoding_has_the_same_bits_for_any_number_of_threads(
    heads: int, kv_heads: int, queries: int, dtype: torch.dtype
) -> None:
    query = random(1, heads, queries, 24, dtype=dtype, device="cpu")
    key, value = (random(1, kv_heads, 5000, 24, dtype=dtype, device="cpu", seed=seed) for seed in (1, 2))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(torchops.span_attention_lse(query, key, value, is_causal=True))
    finally:
        torch.set_num_threads(threads)
    for output, logsumexp in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(logsumexp, results[0][1])


@pytest.mark.parametrize("position", [0, 700, 1299])
def test_what_is_no_number_in_one_piece_reaches_the_result(position: int) -> None:
    query, (key, value, _) = qkv(1, 8, 1, 8, dtype=torch.float32)[0], qkv(1, 1, 1300, 8, dtype=torch.float32)

    def spoiled(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[0, 0, position, 3] = math.nan
        return tensor

    output, logsumexp = torchops.span_attention_lse(query, spoiled(key), value)
    assert output.isnan().all()
    assert logsumexp.isnan().all()
    output, logsumexp = torchops.span_attention_lse(query, key, spoiled(value))
    assert output[..., 3].isnan().all()
    assert output[..., :3].isfinite().all()
    assert logsumexp.isfinite().all()
    for score in (math.nan, math.inf):
        bias = torch.zeros(1, 1300)
        bias[0, position] = score
        output, logsumexp = torchops.span_attention_lse(query, key, value, key_bias=bias)
        assert output.isnan().all()
        assert logsumexp.isnan().all()


@pytest.mark.numeric
@settings(deadline=None, max_examples=25)
@given(
    span=spans(),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (32, 1)]),
    queries=st.integers(1, 9),
    keys=st.sampled_from([511, 512, 513, 1024, 1151, 1153, 2000]),
    dims=st.sampled_from([(1, 1), (8, 24), (17, 40), (64, 33)]),
    start=st.one_of(st.none(), st.integers(-20, 2100)),
)
def test_decoding_of_any_shape_and_span(
    span: dict[str, Any], heads: tuple[int, int], queries: int, keys: int, dims: tuple[int, int], start: int | None
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        inputs: Inputs = span | {
            "query": random(2, heads[0], queries, dims[0], dtype=dtype, device="cpu"),
            "key": random(2, heads[1], keys, dims[0], dtype=dtype, device="cpu", seed=1),
            "value": random(2, heads[1], keys, dims[1], dtype=dtype, device="cpu", seed=2),
            "sink": random(heads[0], dtype=dtype, device="cpu"),
            "query_start": None if start is None else torch.tensor([start, start + 3]),
        }
        actual = torchops.span_attention_lse(**inputs)
        expected = reference.span_attention_lse(**to_double(inputs))
        for one, other in zip(actual, expected, strict=True):
            error = (one.double() - other).abs().max().item()
            assert error <= tolerance * max(1.0, other.abs().max().item())
