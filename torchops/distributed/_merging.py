"""Partial results of attention, over parts of the keys, put together to the whole."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..ops.merge_attention import merge_weights


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulated_zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=accumulate_dtype(like.dtype))


class PartialAttention:
    """The output over the keys seen so far, and its softmax's denominator as the operators' normalizer has it: the
    largest score of a query and the sum of exp(score - largest). A logsumexp would have lost that sum where scores are
    large. The sink is seen before all keys.

    What comes to a query first stays as it is, bit for bit.

    Args:
        query: [B, Hq, Lq, D].
        sink: [Hq].
    """

    def __init__(self, query: Tensor, value_dim: int, sink: Optional[Tensor]) -> None:
        rows, dtype = query.shape[:3], accumulate_dtype(query.dtype)
        self.output = query.new_zeros(*rows, value_dim, dtype=dtype)
        self.largest = query.new_full(rows, -torch.inf, dtype=dtype)
        self.total = query.new_zeros(rows, dtype=dtype)
        if sink is not None:
            self.largest.copy_(sink[:, None])
            self.total.copy_(self.largest > -torch.inf)

    def add(self, first: int, output: Tensor, normalizer: Tensor) -> None:
        """Merges what queries from ``first`` on got from some keys: output [B, Hq, n, Dv], normalizer [B, Hq, n, 2]."""
        rows = slice(first, first + output.shape[2])
        largest, inverse = normalizer.unbind(-1)
        saw_nothing = inverse == 0
        largest, total = largest.masked_fill(saw_nothing, -torch.inf), inverse.reciprocal().masked_fill(saw_nothing, 0)
        (kept, added), reference, sum = merge_weights(
            [self.largest[:, :, rows], largest], [self.total[:, :, rows], total]
        )
        self.output[:, :, rows] *= kept[..., None]
        self.output[:, :, rows] += output * added[..., None]
        self.largest[:, :, rows] = reference
        self.total[:, :, rows] = sum

    def result(self, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        """The output in the dtype, and the normalizer [B, Hq, Lq, 2]."""
        saw_nothing = self.total == 0
        largest = self.largest.masked_fill(saw_nothing, torch.inf)
        inverse = self.total.reciprocal().masked_fill(saw_nothing, 0)
        return self.output.to(dtype), torch.stack([largest, inverse], -1)
