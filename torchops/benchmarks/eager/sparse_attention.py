"""Attention over lists of keys, and product quantization, by means of PyTorch's own operators."""

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


def scores_of_all(query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
    """[1, H, L, k]: of the scores for all keys those that are listed."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    entries = indices.long().expand(-1, query.shape[1], -1, -1)
    return scores.gather(-1, entries.clamp(min=0)).masked_fill(entries < 0, -torch.inf)


def scores_of_gathered(query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
    """[1, H, L, k]: products with rows of keys, of which there is a copy for every query that lists them."""
    heads = torch.arange(query.shape[1], device=query.device)[:, None, None] * key.shape[1] // query.shape[1]
    entries = indices[0].long().expand(query.shape[1], -1, -1)
    listed = key[0, heads, entries.clamp(min=0)]
    scores = (listed @ query[0, ..., None])[..., 0] * query.shape[-1] ** -0.5
    return scores.masked_fill(entries < 0, -torch.inf)[None]


def distances(input: Tensor, codebooks: Tensor) -> Tensor:
    """[M, R, E], sums of absolute differences of the parts of rows [..., D] to codewords [M, E, D / M]."""
    parts = input.reshape(-1, codebooks.shape[0], codebooks.shape[2]).transpose(0, 1)
    return torch.cdist(parts.contiguous(), codebooks, p=1)


def encode(input: Tensor, codebooks: Tensor) -> Tensor:
    return distances(input, codebooks).argmin(-1).T.to(torch.uint8).reshape(*input.shape[:-1], codebooks.shape[0])


def quantization_loss(input: Tensor, codebooks: Tensor) -> Tensor:
    parts = input.reshape(-1, codebooks.shape[0], codebooks.shape[2]).transpose(0, 1)
    distance = distances(input, codebooks)
    nearest = codebooks.gather(1, distance.argmin(-1)[..., None].expand(-1, -1, codebooks.shape[2]))
    mixed = torch.softmax(-distance.clamp(min=1e-5).log(), -1) @ codebooks
    return (mixed - nearest).square().mean() + (parts - nearest).square().mean()


def choose_by_codes(query_codes: Tensor, key_codes: Tensor, k: int, codewords: int) -> Tensor:
    """int32 [B, H, L, k], ascending: codes that agree are counted by a product of one-hot rows. Of keys with as many
    codes topk takes any, and -1 is not put where a query sees fewer."""
    query, key = (
        torch.nn.functional.one_hot(codes.long(), codewords).flatten(-2).float() for codes in (query_codes, key_codes)
    )
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return (query @ key.mT).masked_fill(~visible, -1).topk(k).indices.sort().values.int()


def choose_by_scores(query: Tensor, key: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """int32 [B, H, L, k], ascending, causal: topk of all scores, of equal ones any. With weights DSA's indexer,
    [B, 1, L, k]: heads are added up one by one, for the products of all of them may not fit in memory."""
    behind = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
    if weights is None:
        scores = query @ key.mT
    else:
        scores = query.new_zeros(query.shape[0], 1, query.shape[2], key.shape[2])
        for head in range(query.shape[1]):
            products = (query[:, head : head + 1] @ key.mT).relu_()
            scores += weights[:, head, None, :, None] * products
    return scores.masked_fill_(behind, -torch.inf).topk(k).indices.sort().values.int()
