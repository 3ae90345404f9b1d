"""Attention over listed keys, in plain PyTorch: every listed key is gathered for every query."""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor

from ._softmax import softmax_with_sink


def positions(
    batch: int,
    num_queries: int,
    num_keys: int,
    query_start: Optional[Tensor],
    key_start: Optional[Tensor],
    device: torch.device,
) -> Tuple[Tensor, Tensor]:
    """int64 [B, Lq] and [B]: where each query, and where key 0 lies."""
    if query_start is None:
        query_start = torch.full((batch,), num_keys - num_queries, device=device)
    if key_start is None:
        key_start = torch.zeros(batch, dtype=torch.int64, device=device)
    limit = 2**57
    query = query_start.long().clamp(-limit, limit)[:, None] + torch.arange(num_queries, device=device)
    return query, key_start.long().clamp(-limit, limit)


def named(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    block_size: int,
    query_start: Optional[Tensor],
    key_start: Optional[Tensor],
) -> Tuple[Tensor, Tensor]:
    """int64 and bool [B, Hi, Nq, k]: the first key that an entry names, below 0 where its block begins in front of all
    keys, and whether it names one."""
    num_keys = key.shape[2]
    _, start = positions(query.shape[0], query.shape[2], num_keys, query_start, key_start, query.device)
    start = start[:, None, None, None]
    entries = indices.long()
    if block_size == 1:
        there = (entries >= 0) & (entries < num_keys)
        return entries.masked_fill(~there, 0), there
    last = (start + num_keys - 1).div(block_size, rounding_mode="floor")
    there = (entries >= 0) & (entries <= last)
    return entries.masked_fill(~there, 0) * block_size - start, there


def seen(
    query: Tensor,
    key: Tensor,
    keys: Tensor,
    inside: Tensor,
    query_block: int,
    is_causal: bool,
    query_start: Optional[Tensor],
    key_start: Optional[Tensor],
) -> Tuple[Tensor, Tensor]:
    """From keys of lists [B, Hi, Nq, k, keys of a block], and whether there are such, those of queries [B, Hi, Lq, k,
    keys of a block], and whether they see them."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    position, start = positions(batch, num_queries, num_keys, query_start, key_start, query.device)
    of_query = torch.arange(num_queries, device=query.device) // query_block
    keys, inside = keys[:, :, of_query], inside[:, :, of_query]
    if is_causal:
        inside = inside & (keys + start[:, None, None, None, None] <= position[:, None, :, None, None])
    return keys.masked_fill(~inside, 0), inside


def listed(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    block_size: int = 1,
    query_block: int = 1,
    is_causal: bool = False,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """int64 and bool [B, Hi, Lq, k, keys of a block]: the keys that entries name, and whether a query sees them."""
    num_keys = key.shape[2]
    first, there = named(query, key, indices, block_size, query_start, key_start)
    keys = first.clamp(min=0)[..., None] + torch.arange(min(block_size, num_keys), device=query.device)
    inside = there[..., None] & (keys < (first + block_size).clamp(max=num_keys)[..., None])
    return seen(query, key, keys, inside, query_block, is_causal, query_start, key_start)


def gathered(rows: Tensor, keys: Tensor, inside: Tensor) -> Tensor:
    """[B, H, Lk, D] -> [B, H, Lq, k, D]: the rows of listed keys; zeros for the others, which may hold anything."""
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))  # so that there is one, also without keys
    flat = keys.flatten(2)[..., None].expand(-1, -1, -1, rows.shape[3])
    return rows.gather(2, flat).unflatten(2, keys.shape[2:]).masked_fill(~inside[..., None], 0)


def topk_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    block_size: int = 1,
    query_block: int = 1,
    is_causal: bool = False,
    scale: Optional[float] = None,
    key_bias: Optional[Tensor] = None,
    pair_bias: Optional[Tensor] = None,
    sink: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    num_heads, num_queries = query.shape[1], query.shape[2]
    keys, inside = listed(query, key, indices, block_size, query_block, is_causal, query_start, key_start)
    repeats = num_heads // indices.shape[1] if indices.shape[1] else 0
    keys, inside = (t.repeat_interleave(repeats, dim=1).flatten(3) for t in (keys, inside))
    # A query that sees nothing may hold anything.
    query = query.masked_fill(~inside.any(-1, keepdim=True), 0)
    group_size = num_heads // key.shape[1]
    key = gathered(key.repeat_interleave(group_size, dim=1), keys, inside)
    value = gathered(value.repeat_interleave(group_size, dim=1), keys, inside)
    scores = (key @ query[..., None])[..., 0] * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if key_bias is not None:
        scores = scores + gathered(key_bias[:, None, :, None].expand(-1, num_heads, -1, -1), keys, inside)[..., 0]
    if pair_bias is not None:
        of_query = torch.arange(num_queries, device=query.device) // query_block
        of_head = torch.arange(num_heads, device=query.device) // max(num_heads // max(pair_bias.shape[1], 1), 1)
        bias = pair_bias.to(scores.dtype)[:, of_head][:, :, of_query]
        bias = bias.repeat_interleave(scores.shape[-1] // max(bias.shape[-1], 1), dim=-1)
        scores = scores + bias.masked_fill(~inside, 0)
    scores = scores.masked_fill(~inside, -torch.inf)
    probabilities, logsumexp = softmax_with_sink(scores, sink)
    return (probabilities[..., None, :] @ value)[..., 0, :], logsumexp


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    block_size: int = 1,
    query_block: int = 1,
    is_causal: bool = False,
    scale: Optional[float] = None,
    key_bias: Optional[Tensor] = None,
    pair_bias: Optional[Tensor] = None,
    sink: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tensor:
    return topk_attention_lse(
        query,
        key,
        value,
        indices,
        block_size,
        query_block,
        is_causal,
        scale,
        key_bias,
        pair_bias,
        sink,
        query_start,
        key_start,
    )[0]


def topk_scores(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    block_size: int = 1,
    query_block: int = 1,
    is_causal: bool = False,
    scale: Optional[float] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tensor:
    num_heads, num_keys = query.shape[1], key.shape[2]
    first, there = named(query, key, indices, block_size, query_start, key_start)
    keys = first[..., None] + torch.arange(block_size, device=query.device)
    inside = there[..., None] & (keys >= 0) & (keys < num_keys)
    keys, inside = seen(query, key, keys, inside, query_block, is_causal, query_start, key_start)
    repeats = num_heads // indices.shape[1] if indices.shape[1] else 0
    keys, inside = (t.repeat_interleave(repeats, dim=1).flatten(3) for t in (keys, inside))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query = query.to(dtype).masked_fill(~inside.any(-1, keepdim=True), 0)  # one that sees nothing may hold anything
    key = gathered(key.to(dtype).repeat_interleave(num_heads // key.shape[1], dim=1), keys, inside)
    scores = (key @ query[..., None])[..., 0] * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return scores.masked_fill(~inside, -torch.inf)


def pq_encode(input: Tensor, codebooks: Tensor) -> Tensor:
    num_subspaces, num_codewords, subspace = codebooks.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    parts = input.to(dtype).reshape(*input.shape[:-1], num_subspaces, 1, subspace)
    distance = parts.new_zeros(*input.shape[:-1], num_subspaces, num_codewords)
    for channel in range(subspace):  # in this order, which decides between codewords that are nearly as near
        distance = distance + (parts[..., channel] - codebooks[..., channel].to(dtype)).abs()
    distance = distance.nan_to_num(nan=torch.inf, posinf=torch.inf)
    code = torch.arange(num_codewords, device=input.device).expand_as(distance)
    nearest = distance == distance.amin(-1, keepdim=True)
    return code.masked_fill(~nearest, num_codewords).amin(-1).to(torch.uint8)


def pq_topk(
    query_codes: Tensor,
    key_codes: Tensor,
    k: int,
    is_causal: bool = False,
    sink_keys: int = 0,
    local_keys: int = 0,
    key_bias: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tensor:
    batch, num_heads, num_queries, num_subspaces = query_codes.shape
    num_kv_heads, num_keys = key_codes.shape[1], key_codes.shape[2]
    position, start = positions(batch, num_queries, num_keys, query_start, key_start, query_codes.device)
    keys = torch.arange(num_keys, device=query_codes.device)
    position, key_position = position[..., None], start[:, None, None] + keys

    pairs = query_codes[..., None, :] == key_codes.repeat_interleave(num_heads // num_kv_heads, dim=1)[..., None, :, :]
    before = local_keys - 1 if is_causal else local_keys // 2
    away = key_position - position
    taken = ((key_position >= 0) & (key_position < sink_keys)) | ((away >= -before) & (away < local_keys - before))
    score = pairs.sum(-1).masked_fill(taken[:, None], num_subspaces + 1)

    # Distances in keys tell as much as those in positions, which may be too large to be added to a score.
    place = (position - key_position[..., :1]).clamp(-1, num_keys)
    nearness = 2 * (keys - place).abs() + (keys > place).long()
    order = score * 2**32 - nearness[:, None]
    hidden = torch.zeros_like(order, dtype=torch.bool)
    if is_causal:
        hidden = hidden | (away > 0)[:, None]
    if key_bias is not None:
        hidden = hidden | (key_bias == -torch.inf)[:, None, None]
    order = torch.nn.functional.pad(order.masked_fill(hidden, -(2**62)), (0, k), value=-(2**62))
    best = order.topk(k, dim=-1)
    chosen = best.indices.masked_fill(best.values == -(2**62), num_keys).sort(-1).values
    return chosen.masked_fill(chosen == num_keys, -1).int()


def score_topk(
    query: Tensor,
    key: Tensor,
    k: int,
    weights: Optional[Tensor] = None,
    relu: bool = False,
    block_size: int = 1,
    query_block: int = 1,
    is_causal: bool = False,
    key_bias: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tensor:
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    position, start = positions(batch, num_queries, num_keys, query_start, key_start, query.device)
    key_position = start[:, None] + torch.arange(num_keys, device=query.device)
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)
    if relu:
        scores = scores.relu()
    if weights is not None:
        scores = (weights.to(scores.dtype)[..., None] * scores).sum(1, keepdim=True)
    hidden = scores.isnan()
    if is_causal:
        hidden = hidden | (key_position[:, None] > position[..., None])[:, None]
    if key_bias is not None:
        hidden = hidden | (key_bias == -torch.inf)[:, None, None]
    # Integers in the order of the scores, -0 like 0, and the lowest for what no list may name.
    bits = (scores.double() + 0.0).view(torch.int64)
    lowest = torch.iinfo(torch.int64).min
    order = torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits).masked_fill(hidden, lowest)

    lists = -(-num_queries // query_block)
    of_list = torch.arange(num_queries, device=query.device) // query_block
    largest = order.new_full((batch, order.shape[1], lists, num_keys), lowest)
    order = largest.scatter_reduce(2, of_list[:, None].expand_as(order), order, "amax")
    names = torch.arange(num_keys, device=query.device).expand(batch, -1)
    if block_size > 1:
        # Blocks that a key lies in come one after the other: counted from the first one of their row.
        block = key_position.div(block_size, rounding_mode="floor")
        first = block[:, :1] if num_keys else block.new_zeros(batch, 1)
        largest = torch.full_like(order, lowest)
        order = largest.scatter_reduce(3, (block - first)[:, None, None].expand_as(order), order, "amax")
        names = first + names
        order = order.masked_fill(((names < 0) | (names >= 2**31))[:, None, None], lowest)
    best = order.sort(dim=-1, descending=True, stable=True)
    chosen = names[:, None, None].expand_as(order).gather(-1, best.indices)
    chosen = chosen.masked_fill(best.values == lowest, 2**31)[..., :k]
    chosen = torch.nn.functional.pad(chosen, (0, k - chosen.shape[-1]), value=2**31).sort(-1).values
    return chosen.masked_fill(chosen == 2**31, -1).int()


def pq_loss(input: Tensor, codebooks: Tensor) -> Tensor:
    num_subspaces, _, subspace = codebooks.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    parts = input.to(dtype).reshape(*input.shape[:-1], num_subspaces, subspace)
    codewords = codebooks.to(dtype)
    distance = (parts[..., None, :] - codewords).abs().sum(-1)
    weight = torch.softmax(-distance.clamp(min=1e-5).log(), -1)
    mixed = torch.einsum("...me,mes->...ms", weight, codewords)
    nearest = codewords[torch.arange(num_subspaces, device=input.device), pq_encode(input, codebooks).long()]
    return torch.nn.functional.mse_loss(mixed, nearest) + torch.nn.functional.mse_loss(parts, nearest)


def pq_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_codes: Tensor,
    key_codes: Tensor,
    k: int,
    is_causal: bool = False,
    scale: Optional[float] = None,
    sink_keys: int = 0,
    local_keys: int = 0,
    key_bias: Optional[Tensor] = None,
    sink: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    indices = pq_topk(query_codes, key_codes, k, is_causal, sink_keys, local_keys, key_bias, query_start, key_start)
    return topk_attention_lse(
        query,
        key,
        value,
        indices,
        is_causal=is_causal,
        scale=scale,
        key_bias=key_bias,
        sink=sink,
        query_start=query_start,
        key_start=key_start,
    )


def pq_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_codes: Tensor,
    key_codes: Tensor,
    k: int,
    is_causal: bool = False,
    scale: Optional[float] = None,
    sink_keys: int = 0,
    local_keys: int = 0,
    key_bias: Optional[Tensor] = None,
    sink: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
) -> Tensor:
    return pq_attention_lse(
        query,
        key,
        value,
        query_codes,
        key_codes,
        k,
        is_causal,
        scale,
        sink_keys,
        local_keys,
        key_bias,
        sink,
        query_start,
        key_start,
    )[0]
