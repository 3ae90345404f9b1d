"""Attention over lists of keys by means of PyTorch's own attention."""

import torch
from torch import Tensor


def choose(tokens: int, heads: int, listed: int, block: int, query_block: int, device: torch.device) -> Tensor:
    """int32 [1, H, Nq, k], ascending, -1 behind: names chosen at random among those that the last query of a block of
    queries sees, as causal selectors choose."""
    lists, names = -(-tokens // query_block), -(-tokens // block)
    last = (torch.arange(1, lists + 1) * query_block).clamp(max=tokens) - 1
    hidden = torch.arange(names) * block > last[:, None]
    generator = torch.Generator().manual_seed(7)
    chosen = []
    for _ in range(heads):
        scores, entries = torch.rand(lists, names, generator=generator).masked_fill(hidden, -1).topk(listed)
        ascending = entries.masked_fill(scores < 0, names).sort().values
        chosen.append(ascending.masked_fill(ascending == names, -1))
    return torch.stack(chosen)[None].int().to(device)


def mask_of(indices: Tensor, tokens: int, block: int, query_block: int) -> Tensor:
    """bool [1, H, L, L], True where a query sees a key: what transformers makes of the lists of DSA models."""
    names = -(-tokens // block)
    entries = indices.long().masked_fill(indices < 0, names)
    named = torch.zeros(*indices.shape[:3], names + 1, dtype=torch.bool, device=indices.device)
    named = named.scatter_(-1, entries, True)[..., :names]
    named = named.repeat_interleave(block, -1)[..., :tokens].repeat_interleave(query_block, 2)[:, :, :tokens]
    return named & torch.ones(tokens, tokens, dtype=torch.bool, device=indices.device).tril()
