"""What tests of span_attention fill its arguments with."""

from typing import Any

import torch
from contract import random
from hypothesis import strategies as st
from torch import Tensor

HUGE = 2**62


def qkv(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(random(*shape, dtype=dtype, device="cpu", seed=seed) for seed in range(3))


@st.composite
def spans(draw: st.DrawFn) -> dict[str, Any]:
    size = st.one_of(st.integers(1, 8), st.just(HUGE))
    reach = st.one_of(st.integers(-1, 6), st.just(HUGE))
    return {
        "block_size": draw(size),
        "left": draw(reach),
        "right": draw(reach),
        "is_causal": draw(st.booleans()),
    }
