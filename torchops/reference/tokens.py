"""Pruning, merging and routing of tokens, in plain PyTorch."""

from typing import Optional, Tuple

import torch
from torch import Tensor

SIMILARITY_STEPS = 2**16


def cosine_similarity(metric: Tensor) -> Tensor:
    """[B, N, K] -> [B, N, N], rounded to multiples of 2**-16; a NaN becomes -inf."""
    metric = metric.double()
    # Squares of the largest or smallest numbers leave float64's range: scale before taking the norm.
    # The column of zeros is for K = 0, which has no largest magnitude.
    magnitude = torch.nn.functional.pad(metric.abs(), (0, 1)).amax(-1, keepdim=True)
    metric = metric / torch.where(magnitude == 0, 1.0, magnitude)
    norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
    unit = metric / torch.where(norm == 0, 1.0, norm)
    similarity = (unit @ unit.transpose(-1, -2) * SIMILARITY_STEPS).round() / SIMILARITY_STEPS
    return similarity.nan_to_num(nan=-torch.inf)


def bipartite_pairs(
    metric: Tensor, r: int, num_protected: int = 0, padding_mask: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    num_rows, num_tokens, _ = metric.shape
    r = min(r, (num_tokens - num_protected) // 2)
    similarity = cosine_similarity(metric)
    rows = []
    for row in range(num_rows):
        padding = set(torch.nonzero(padding_mask[row]).flatten().tolist()) if padding_mask is not None else set()
        candidates = [i for i in range(num_protected, num_tokens) if i not in padding]
        sources = [i for i in candidates if i % 2 == 0]
        destinations = [i for i in candidates if i % 2 == 1]
        # max and sorted keep the first of equals, which is the one at the lowest position.
        matches = [(i, max(destinations, key=lambda j: similarity[row, i, j].item())) for i in sources if destinations]
        matches.sort(key=lambda match: -similarity[row, match[0], match[1]].item())
        dropped = [(i, -1) for i in sorted(padding, reverse=True)]
        rows.append((matches[:r] + dropped)[:r])
    pairs = torch.tensor(rows, dtype=torch.int64, device=metric.device).reshape(num_rows, r, 2)
    return pairs[..., 0], pairs[..., 1]


def bipartite_assignment(
    metric: Tensor, r: int, num_protected: int = 0, padding_mask: Optional[Tensor] = None
) -> Tensor:
    sources, destinations = bipartite_pairs(metric, r, num_protected, padding_mask)
    stays = torch.ones(metric.shape[:2], dtype=torch.int64, device=metric.device).scatter(1, sources, 0)
    assign = stays.cumsum(1) - 1
    joined = torch.where(destinations < 0, -1, assign.gather(1, destinations.clamp(min=0)))
    return assign.scatter(1, sources, joined)


def num_groups(num_tokens: int, r: int, num_protected: int = 0) -> int:
    return num_tokens - min(r, (num_tokens - num_protected) // 2)


def topk_assignment(
    scores: Tensor, k: int, num_protected: int = 0, fuse: bool = False, padding_mask: Optional[Tensor] = None
) -> Tensor:
    num_rows, num_tokens = scores.shape
    k = min(k, num_tokens - num_protected)
    padding = torch.zeros_like(scores, dtype=torch.bool) if padding_mask is None else padding_mask
    assign = torch.where(padding | (not fuse), -1, num_protected + k)
    for row in range(num_rows):

        def rank(i: int, row: int = row) -> Tuple[int, float, int]:
            score = scores[row, i].item()
            tier = 2 if padding[row, i] else 1 if score != score else 0
            return (tier, -score if tier == 0 else 0.0, i)

        best = sorted(range(num_protected, num_tokens), key=rank)[:k]
        for group, i in enumerate([*range(num_protected), *sorted(best)]):
            assign[row, i] = group
    return assign


def merge_tokens(
    input: Tensor, assign: Tensor, num_groups: int, weight: Optional[Tensor] = None, normalize: bool = True
) -> Tuple[Tensor, Tensor]:
    accumulation_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    member = membership(assign, num_groups).to(accumulation_dtype)
    if weight is not None:
        member = member * weight.to(accumulation_dtype).unsqueeze(-1)
    total = member.sum(1)
    merged = member.transpose(1, 2) @ input.to(accumulation_dtype)
    if normalize:
        merged = merged / torch.where(total == 0, 1.0, total).unsqueeze(-1)
    return merged.to(input.dtype), total


def unmerge_tokens(merged: Tensor, assign: Tensor, residual: Optional[Tensor] = None) -> Tensor:
    output = membership(assign, merged.shape[1]).to(merged.dtype) @ merged
    return output if residual is None else output + residual


def membership(assign: Tensor, num_groups: int) -> Tensor:
    """bool [B, N, M]: whether token i belongs to group m."""
    return assign.unsqueeze(-1) == torch.arange(num_groups, device=assign.device)
