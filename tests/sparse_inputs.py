"""What tests of attention over lists fill its arguments with."""

from typing import Any

import torch
from contract import Inputs, random
from hypothesis import strategies as st
from torch import Tensor

NAMES = ("query", "key", "value")


def qkv(*shape: int, dtype: torch.dtype = torch.float64) -> Inputs:
    return {name: random(*shape, dtype=dtype, device="cpu", seed=seed) for seed, name in enumerate(NAMES)}


def all_keys(queries: int, keys: int) -> Tensor:
    return torch.arange(keys).expand(1, 1, queries, keys)


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
