"""Pruning, merging and routing of tokens, in plain PyTorch."""

from typing import Optional, Tuple

import torch
from torch import Tensor

SIMILARITY_STEPS = 2**16


def power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent), exponent)


def binary_exponent(number: Tensor) -> Tensor:
    """That of a number in [0.5, 1), as torch.frexp has it, which does not leave for ONNX."""
    exponent = number.log2().floor()  # it may be off by one
    exponent = exponent + (number >= power_of_two(exponent + 1)).double() - (number < power_of_two(exponent)).double()
    return exponent + 1


def integer_rows(metric: Tensor) -> Tuple[Tensor, Tensor]:
    """[B, N, K] -> integers [B, N, K] in float64, whose sums of products are exact in any order, and the inverse of
    each row's length [B, N] in float32: 0 for a row of zeros, NaN for one with a NaN or an infinity in it.

    Rows are scaled by a power of two, so that their length is just below 2**15, and rounded.
    """
    metric = metric.double()
    # The column of zeros is for K = 0, which has no largest magnitude.
    largest = torch.nn.functional.pad(metric.abs(), (0, 1)).amax(-1, keepdim=True)
    finite = largest.isfinite()
    metric = torch.where(finite, metric, 0.0)
    # An even power of two brings the largest magnitude to 2**8 or a little less; in two steps, for it can be out of
    # range. The length that the rounded numbers are sure to stay below, times 2, decides on the rest.
    shift = 8 - binary_exponent(torch.where(finite & (largest > 0), largest, 1.0))
    factor = power_of_two((shift - shift % 2) / 2)
    scaled = (metric * factor * factor).float().double()
    rounded = scaled.abs().round()
    bound = 4 * (rounded * (rounded + 1)).sum(-1, keepdim=True) + metric.shape[-1]
    scales = power_of_two(torch.arange(9, -16, -1, dtype=torch.float64, device=metric.device))
    fits = bound * scales.square() <= (2.0**16 - 2) ** 2
    scale = torch.where(fits, scales, 0.0).amax(-1, keepdim=True)
    integers = (scaled * scale).round()
    squares = integers.square().sum(-1)
    inverse = torch.where(squares == 0, 0.0, 1 / squares.clamp(min=1).sqrt())
    return integers, torch.where(finite.squeeze(-1), inverse, torch.nan).float()


def cosine_similarity(metric: Tensor) -> Tensor:
    """[B, N, K] -> [B, N, N], rounded to multiples of 2**-16; a NaN becomes -inf."""
    integers, inverse = integer_rows(metric)
    product = (integers @ integers.transpose(-1, -2)).float()
    similarity = product * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    return ((similarity * SIMILARITY_STEPS).round() / SIMILARITY_STEPS).nan_to_num(nan=-torch.inf)


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
    batch, _, channels = input.shape
    weight = torch.ones_like(assign, dtype=accumulation_dtype) if weight is None else weight.to(accumulation_dtype)
    # Dropped tokens take no part, whatever is in them.
    kept = assign >= 0
    group = assign.clamp(min=0)
    weight = torch.where(kept, weight, 0.0)
    rows = torch.where(kept.unsqueeze(-1), input.to(accumulation_dtype), 0.0)
    total = weight.new_zeros(batch, max(num_groups, 1)).scatter_add(1, group, weight)
    merged = rows.new_zeros(batch, max(num_groups, 1), channels)
    merged = merged.scatter_add(1, group.unsqueeze(-1).expand_as(rows), weight.unsqueeze(-1) * rows)
    if normalize:
        merged = merged / torch.where(total == 0, 1.0, total).unsqueeze(-1)
    return merged[:, :num_groups].to(input.dtype), total[:, :num_groups]


def unmerge_tokens(merged: Tensor, assign: Tensor, residual: Optional[Tensor] = None) -> Tensor:
    dropped = merged.new_zeros(merged.shape[0], 1, merged.shape[2])
    group = torch.where(assign < 0, merged.shape[1], assign)
    rows = group.unsqueeze(-1).expand(-1, -1, merged.shape[2])
    output = torch.cat([merged, dropped], 1).gather(1, rows)
    return output if residual is None else output + residual
