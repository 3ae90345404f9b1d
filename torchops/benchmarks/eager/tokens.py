"""Merging and pruning of tokens as compositions of PyTorch's operators, written from the papers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def rows_at(input: Tensor, index: Tensor) -> Tensor:
    """input [B, N, C], index [B, R] -> [B, R, C]."""
    return input.gather(1, index.unsqueeze(-1).expand(-1, -1, input.shape[-1]))


# ---- ToMe (Bolya et al., Token Merging: Your ViT But Faster, 2023) ------------------------------


class TomeMatching(NamedTuple):
    """Indices count among the tokens at even positions (kept, merged) or odd ones (destination)."""

    kept: Tensor  # [B, sources - r]
    merged: Tensor  # [B, r]
    destination: Tensor  # [B, r]

    def positions(self, num_tokens: int) -> Tensor:
        """[B, N - r]: position of each token that :func:`tome_merge` returns."""
        odd = torch.arange(1, num_tokens, 2, device=self.kept.device)
        return torch.cat([2 * self.kept, odd.expand(len(self.kept), -1)], 1)


@torch.no_grad()
def tome_matching(metric: Tensor, r: int, class_token: bool) -> TomeMatching:
    unit = metric / metric.norm(dim=-1, keepdim=True)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if class_token:
        similarity[:, 0] = -math.inf
    best, destination = similarity.max(-1)
    order = best.argsort(-1, descending=True)
    merged, kept = order[:, :r], order[:, r:]
    if class_token:
        kept = kept.sort(-1).values  # the class token stays the first one
    return TomeMatching(kept, merged, destination.gather(1, merged))


def tome_sum(input: Tensor, matching: TomeMatching) -> Tensor:
    """[B, N, C] -> [B, N - r, C]: what stays of the even tokens, then the odd ones with what they got."""
    sources, destinations = input[:, ::2], input[:, 1::2]
    index = matching.destination.unsqueeze(-1).expand(-1, -1, input.shape[-1])
    destinations = destinations.scatter_reduce(1, index, rows_at(sources, matching.merged), "sum")
    return torch.cat([rows_at(sources, matching.kept), destinations], 1)


def tome_merge(tokens: Tensor, size: Tensor, matching: TomeMatching) -> tuple[Tensor, Tensor]:
    """tokens [B, N, C] and size [B, N, 1] -> their mean weighted by size [B, N - r, C], size [B, N - r, 1]."""
    merged = tome_sum(tokens * size, matching)
    merged_size = tome_sum(size, matching)
    return merged / merged_size, merged_size


# ---- along a given assignment -------------------------------------------------------------------


def scatter_reduce_merge(tokens: Tensor, assign: Tensor, num_groups: int, size: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, channels = tokens.shape
    index = assign.unsqueeze(-1).expand(-1, -1, channels)
    merged = tokens.new_zeros(batch, num_groups, channels).scatter_reduce(1, index, tokens * size.unsqueeze(-1), "sum")
    total = size.new_zeros(batch, num_groups).scatter_reduce(1, assign, size, "sum")
    return merged / total.unsqueeze(-1), total


def index_add_merge(tokens: Tensor, assign: Tensor, num_groups: int, size: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, channels = tokens.shape
    row = flat_rows(assign, num_groups)
    weighted = (tokens * size.unsqueeze(-1)).flatten(0, 1)
    merged = tokens.new_zeros(batch * num_groups, channels).index_add(0, row, weighted)
    total = size.new_zeros(batch * num_groups).index_add(0, row, size.flatten())
    return (merged / total.unsqueeze(-1)).unflatten(0, (batch, num_groups)), total.unflatten(0, (batch, num_groups))


def index_select_unmerge(merged: Tensor, assign: Tensor) -> Tensor:
    row = flat_rows(assign, merged.shape[1])
    return merged.flatten(0, 1).index_select(0, row).unflatten(0, assign.shape)


def flat_rows(assign: Tensor, num_groups: int) -> Tensor:
    """[B, N] -> [B * N]: index of each token's group in [B * M]."""
    return (assign + num_groups * torch.arange(len(assign), device=assign.device).unsqueeze(-1)).flatten()


# ---- EViT (Liang et al., EViT: Expediting Vision Transformers via Token Reorganizations, 2022) --


def evit_drop(tokens: Tensor, scores: Tensor, k: int, num_protected: int) -> Tensor:
    """[B, N, C] -> [B, P + k, C]: the protected tokens, then the k best by falling score."""
    kept = scores[:, num_protected:].topk(k).indices + num_protected
    return torch.cat([tokens[:, :num_protected], rows_at(tokens, kept)], 1)


def evit_fuse(tokens: Tensor, scores: Tensor, k: int, num_protected: int) -> Tensor:
    """As :func:`evit_drop`, and at the end the mean of the others weighted by their scores."""
    order = scores[:, num_protected:].argsort(-1, descending=True) + num_protected
    kept, others = order[:, :k], order[:, k:]
    weight = scores.gather(1, others).unsqueeze(1)
    weight = (weight / weight.sum(-1, keepdim=True)).to(tokens.dtype)
    return torch.cat([tokens[:, :num_protected], rows_at(tokens, kept), weight @ rows_at(tokens, others)], 1)
