"""Attention over a span of keys, in plain PyTorch: every score is computed, and most are masked."""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor

from ._softmax import softmax_with_sink


def visible(
    query: Tensor,
    key: Tensor,
    block_size: int = 1,
    left: int = -1,
    right: int = -1,
    is_causal: bool = False,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tensor:
    """bool [B, Lq, Lk]: whether a query sees a key."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    if query_start is None:
        query_start = torch.full((batch,), num_keys - num_queries, device=query.device)
    if key_start is None:
        key_start = torch.zeros(batch, dtype=torch.int64, device=query.device)
    position = query_start.long()[:, None, None] + torch.arange(num_queries, device=query.device)[:, None]
    other = key_start.long()[:, None, None] + torch.arange(num_keys, device=query.device)
    blocks = other.div(block_size, rounding_mode="floor") - position.div(block_size, rounding_mode="floor")
    keep = torch.ones_like(blocks, dtype=torch.bool)
    if left >= 0:
        keep = keep & (blocks >= -left)
    if right >= 0:
        keep = keep & (blocks <= right)
    if is_causal:
        keep = keep & (other <= position)
    return keep


def span_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int = 1,
    left: int = -1,
    right: int = -1,
    is_causal: bool = False,
    scale: Optional[float] = None,
    key_bias: Optional[Tensor] = None,
    sink: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    keep = visible(query, key, block_size, left, right, is_causal, query_start, key_start)
    # What no query sees, and what sees no key, may hold anything: 0 times NaN would be NaN.
    seen, sees = keep.any(1)[:, None, :, None], keep.any(2)[:, None, :, None]
    query, key, value = query.masked_fill(~sees, 0), key.masked_fill(~seen, 0), value.masked_fill(~seen, 0)
    group_size = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group_size, dim=1)
    value = value.repeat_interleave(group_size, dim=1)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if key_bias is not None:
        scores = scores + key_bias[:, None, None, :]
    scores = scores.masked_fill(~keep[:, None], -torch.inf)
    probabilities, logsumexp = softmax_with_sink(scores, sink)
    return probabilities @ value, logsumexp


def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int = 1,
    left: int = -1,
    right: int = -1,
    is_causal: bool = False,
    scale: Optional[float] = None,
    key_bias: Optional[Tensor] = None,
    sink: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tensor:
    return span_attention_lse(
        query, key, value, block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start
    )[0]
