"""Token merging, pruning and routing as modules: compositions of making and following assignments."""

import math
from typing import List, Optional, Tuple, Union

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.tokens import (
    bipartite_assignment,
    bipartite_pairs,
    merge_tokens,
    num_groups,
    topk_assignment,
    unmerge_tokens,
)

__all__ = [
    "MixtureOfDepths",
    "PyraModulation",
    "TokenMerger",
    "TokenPruner",
    "group_padding_mask",
    "merge_schedule",
    "mixture_of_depths_schedule",
    "proportional_attention_bias",
]

# torch.fx traces with proxies, of which Python can tell neither a number nor whether an optional tensor is
# there. So what depends on those is a function, and a call of it in the graph.
torch.fx.wrap("num_groups")


def check_not_negative(module: str, name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{module}: expected {name} >= 0, got {value}")


def proportional_attention_bias(size: Tensor) -> Tensor:
    """log(size), what ToMe adds to the attention scores of each key: a token that stands for n tokens
    weighs as much as n equal ones. A token of size 0 (padding) gets -inf, which hides it.

    For scaled_dot_product_attention it is ``attn_mask=bias[:, None, None].to(query.dtype)``.

    Args:
        size: [B, N], as :class:`TokenMerger` returns it.

    Returns:
        [B, N] in size's dtype.

    >>> torchops.nn.proportional_attention_bias(torch.tensor([[1.0, 0.0]]))
    tensor([[0., -inf]])
    """
    return size.log()


def group_padding_mask(assign: Tensor, num_groups: int, padding_mask: Tensor) -> Tensor:
    """Which groups have no token except padding: the padding mask after :func:`torchops.merge_tokens`.

    Args:
        assign: int64 [B, N], values in -1..M-1.
        num_groups: the number of groups, M.
        padding_mask: bool [B, N], True for padding.

    Returns:
        bool [B, M], True for groups of padding and for empty ones.

    Raises:
        ValueError: as :func:`torchops.merge_tokens`.

    >>> padding = torch.tensor([[False, False, True, True]])
    >>> assign = torchops.topk_assignment(torch.rand(1, 4), k=3, padding_mask=padding)
    >>> torchops.nn.group_padding_mask(assign, 3, padding)
    tensor([[False, False,  True]])
    """
    weight = padding_mask.logical_not().to(torch.float32)
    return merge_tokens(weight.unsqueeze(-1)[:, :, :0], assign, num_groups, weight)[1] == 0


@torch.fx.wrap
def metric_and_size(
    input: Tensor, metric: Optional[Tensor], size: Optional[Tensor], padding_mask: Optional[Tensor]
) -> Tuple[Tensor, Optional[Tensor]]:
    """What stands where a merger is given none."""
    if metric is None:
        metric = input
    if size is None and padding_mask is not None:
        size = padding_mask.logical_not().to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    return metric.detach(), size


class TokenMerger(nn.Module):
    """Removes r tokens by merging each into its most similar counterpart (ToMe).

    Args:
        r: number of tokens to remove per call; clamped to half of the unprotected tokens, 0 for none.
        num_protected: the first tokens of every row that never merge (class and register tokens).
        modulation: PYRA's modulation of the sources before they merge, or None.

    Raises:
        ValueError: a negative number.

    Shapes: forward(input [B, N, C], metric [B, N, K], size [B, N], padding_mask [B, N]) returns merged
    [B, M, C], size [B, M] in float32 (float64 for float64 input) and assign [B, N], with
    M = :func:`torchops.num_groups` (N, r, num_protected).

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023; PYRA: Xiong et al., 2024.

    >>> merger = torchops.nn.TokenMerger(r=16, num_protected=1)
    >>> merged, size, assign = merger(torch.randn(2, 197, 8))
    >>> merged.shape, size.shape, size.sum(1)
    (torch.Size([2, 181, 8]), torch.Size([2, 181]), tensor([197., 197.]))
    """

    def __init__(self, r: int, num_protected: int = 0, modulation: Optional["PyraModulation"] = None) -> None:
        super().__init__()
        check_not_negative("TokenMerger", "r", r)
        check_not_negative("TokenMerger", "num_protected", num_protected)
        self.r = r
        self.num_protected = num_protected
        self.modulation = modulation

    def forward(
        self,
        input: Tensor,
        metric: Optional[Tensor] = None,
        size: Optional[Tensor] = None,
        padding_mask: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Merges.

        Args:
            input: the tokens, [B, N, C].
            metric: what similarity is measured on, [B, N, K]; None for the tokens themselves.
            size: how many tokens each one stands for, from the merger before; None for 1 each, and 0
                for padding.
            padding_mask: bool [B, N], True for padding. Behind the first merger it is ``size == 0``.

        Raises:
            ValueError: as :func:`torchops.bipartite_assignment` and :func:`torchops.merge_tokens`.
        """
        metric, size = metric_and_size(input, metric, size, padding_mask)
        if self.modulation is not None:
            sources, destinations = bipartite_pairs(metric, self.r, self.num_protected, padding_mask)
            input = self.modulation(input, sources, destinations)
        assign = bipartite_assignment(metric, self.r, self.num_protected, padding_mask)
        groups = num_groups(input.shape[1], self.r, self.num_protected)
        merged, merged_size = merge_tokens(input, assign, groups, size)
        return merged, merged_size, assign

    def extra_repr(self) -> str:
        return f"r={self.r}, num_protected={self.num_protected}"


@torch.fx.wrap
def first_entries(a: Tensor, num_pairs: int) -> Tensor:
    if num_pairs > a.shape[0]:
        raise ValueError(
            f"PyraModulation: expected sources of shape [B, R] with R <= r = {a.shape[0]}, got R = {num_pairs}"
        )
    return a[:num_pairs]


class PyraModulation(nn.Module):
    r"""PYRA's parallel yielding re-activation: a learned modulation of the sources before they merge.

    With s and d [B, R, C] the source and destination tokens of the R pairs, in descending similarity:

    .. math::

        p = \text{LayerNorm}(s + d) \qquad
        w_1 = 2\,\sigma(a^T p) \qquad
        w_2 = 2\,\sigma(p\,b^T) - 1 \qquad
        s' = s + s \odot w_1 \odot w_2

    w_1 is [B, 1, C] and w_2 [B, R, 1]. b starts at zero, so the module starts as the identity. Pairs without a
    destination (dropped padding) are unchanged, and their values reach no other token.

    Args:
        dim: the number of channels, C.
        r: number of pairs that a is made for; calls with fewer pairs use its first entries.

    Raises:
        ValueError: a negative r; in the forward pass, more than r pairs.

    Source: Xiong et al., PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task
    Adaptation, 2024.
    """

    def __init__(self, dim: int, r: int) -> None:
        super().__init__()
        check_not_negative("PyraModulation", "r", r)
        self.norm = nn.LayerNorm(dim)
        self.a = nn.Parameter(torch.empty(r))
        self.b = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r = self.a.shape[0]
        nn.init.normal_(self.a, std=r**-0.5 if r > 0 else 1.0)
        nn.init.zeros_(self.b)

    def forward(self, input: Tensor, sources: Tensor, destinations: Tensor) -> Tensor:
        """input [B, N, C], sources and destinations int64 [B, R] of
        :func:`torchops.bipartite_pairs` -> [B, N, C]."""
        index = sources.unsqueeze(-1).expand(-1, -1, input.shape[2])
        source = input.gather(1, index)
        destination = input.gather(1, destinations.clamp(min=0).unsqueeze(-1).expand_as(index))
        has_pair = (destinations >= 0).unsqueeze(-1)
        # Chosen, not multiplied by 0, and before the norm: padding may hold NaN, forward and backward.
        nothing = torch.zeros_like(source)
        pairs = self.norm(torch.where(has_pair, source + destination, nothing))
        pairs = torch.where(has_pair, pairs, torch.zeros_like(pairs))
        w1 = 2 * torch.sigmoid(torch.einsum("r,brc->bc", first_entries(self.a, sources.shape[1]), pairs)).unsqueeze(1)
        w2 = 2 * torch.sigmoid(torch.einsum("brc,c->br", pairs, self.b)).unsqueeze(-1) - 1
        modulated = source + torch.where(has_pair, source, nothing) * w1 * w2
        return input.scatter(1, index, modulated.to(input.dtype))


@torch.fx.wrap
def num_kept(num_tokens: int, num_protected: int, keep_share: float, keep_count: int) -> int:
    """k of a pruner. With num_protected over N the operator, which is given 0, says so."""
    unprotected = max(num_tokens - num_protected, 0)
    if keep_count >= 0:
        return min(keep_count, unprotected)
    return math.ceil(keep_share * unprotected - 1e-6)


@torch.fx.wrap
def with_fused_group(num_groups: int, num_tokens: int) -> int:
    """One more than num_groups, each of one token, unless that leaves no token to fuse."""
    return min(num_groups + 1, num_tokens)


class TokenPruner(nn.Module):
    """Keeps the tokens of highest score; the others are dropped (FastV, BUS, EViTPose) or fused into
    one token that is their average weighted by score (EViT).

    Args:
        keep: how many tokens to keep besides the protected ones: a number, all of them if there are
            fewer; or a share of them between 0 and 1, rounded up. A product less than 1e-6 above a whole
            number is that number: 0.07 of 100 are 7, although 0.07 * 100 is 7.000000000000001.
        fuse: fuse the others into one last token instead of dropping them. Scores are its weights, so
            they should not be negative. Where all tokens are kept there is no such token.
        num_protected: the first tokens of every row, always kept.
        normalize: whether the fused token is the weighted mean; False gives the weighted sum.

    Raises:
        ValueError: a negative number or a share outside of 0..1; in the forward pass, as
            :func:`torchops.topk_assignment` and :func:`torchops.merge_tokens`.

    Shapes: forward(input [B, N, C], scores [B, N], padding_mask [B, N]) returns the kept tokens
    [B, M, C] and assign [B, N], with M = num_protected + k (+ 1 with fuse, where k tokens are not all).
    Padding is kept where a row has fewer than k tokens, and the last token of a row that had nothing
    but padding to fuse is zeros: ``group_padding_mask(assign, M, padding_mask)`` is True for both.

    Source: Liang et al., EViT: Expediting Vision Transformers via Token Reorganizations, 2022.

    >>> pruner = torchops.nn.TokenPruner(keep=0.7, fuse=True, num_protected=1)
    >>> kept, assign = pruner(torch.randn(2, 197, 8), torch.rand(2, 197))
    >>> kept.shape
    torch.Size([2, 140, 8])
    """

    def __init__(
        self, keep: Union[int, float], fuse: bool = False, num_protected: int = 0, normalize: bool = True
    ) -> None:
        super().__init__()
        if not keep >= 0 or (isinstance(keep, float) and keep > 1):
            raise ValueError(f"TokenPruner: expected keep to be a number of tokens or a share in 0..1, got {keep}")
        check_not_negative("TokenPruner", "num_protected", num_protected)
        self.keep_share = float(keep) if isinstance(keep, float) else -1.0
        self.keep_count = -1 if isinstance(keep, float) else int(keep)
        self.fuse = fuse
        self.num_protected = num_protected
        self.normalize = normalize

    def forward(self, input: Tensor, scores: Tensor, padding_mask: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        k = num_kept(input.shape[1], self.num_protected, self.keep_share, self.keep_count)
        assign = topk_assignment(scores, k, self.num_protected, self.fuse, padding_mask)
        groups = self.num_protected + k
        if not self.fuse:
            return merge_tokens(input, assign, groups)[0], assign
        weight = torch.where(assign == groups, scores, torch.ones_like(scores))
        groups = with_fused_group(groups, input.shape[1])
        return merge_tokens(input, assign, groups, weight, self.normalize)[0], assign

    def extra_repr(self) -> str:
        keep = self.keep_count if self.keep_count >= 0 else self.keep_share
        return f"keep={keep}, fuse={self.fuse}, num_protected={self.num_protected}, normalize={self.normalize}"


@torch.fx.wrap
def num_selected(num_tokens: int, num_protected: int, ratio: float) -> int:
    """k of a mixture of depths. With num_protected over N the operator, which is given 0, says so."""
    return math.floor(ratio * max(num_tokens - num_protected, 0) + 1e-6)


class MixtureOfDepths(nn.Module):
    """Runs a block on a share of the tokens only: those that a learned router scores highest.

    out_i = x_i + w_i f(x)_i with w_i = 0.2 tanh(z_i) + 1 for the selected tokens, out_i = x_i for the
    others; z is the router's score and f the block, which returns its update without the residual and
    sees the selected tokens in sequence order.

    Args:
        block: module from [B, M, C] to [B, M, C].
        dim: the number of channels, C.
        ratio: share of the tokens to run, of those that are not protected, rounded down; a product less than
            1e-6 below a whole number is that number (0.29 of 100 are 29). 1 or more runs the block on all of
            them without a router.
        num_protected: the first tokens of every row, which always run (class and register tokens).

    Raises:
        ValueError: a negative number; in the forward pass, as :func:`torchops.topk_assignment`.

    Shapes: forward(input [B, N, C], padding_mask [B, N]) returns [B, N, C]. Padding is selected last.

    Source: Zhang et al., p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay, 2024.

    >>> layer = torchops.nn.MixtureOfDepths(nn.Linear(8, 8), dim=8, ratio=0.5)
    >>> layer(torch.randn(2, 10, 8)).shape
    torch.Size([2, 10, 8])
    """

    def __init__(self, block: nn.Module, dim: int, ratio: float, num_protected: int = 0) -> None:
        super().__init__()
        if not ratio >= 0:
            raise ValueError(f"MixtureOfDepths: expected ratio to be a share of 0 or more, got {ratio}")
        check_not_negative("MixtureOfDepths", "num_protected", num_protected)
        self.block = block
        self.ratio = float(ratio)
        self.num_protected = num_protected
        self.router = nn.Linear(dim, 1) if ratio < 1 else None

    def forward(self, input: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        if self.router is None:
            return input + self.block(input)
        scores = self.router(input)
        k = num_selected(input.shape[1], self.num_protected, self.ratio)
        assign = topk_assignment(scores.squeeze(-1), k, self.num_protected, False, padding_mask)
        selected = merge_tokens(input, assign, self.num_protected + k)[0]
        weight = merge_tokens(0.2 * torch.tanh(scores) + 1, assign, self.num_protected + k)[0]
        update = weight * self.block(selected)
        return unmerge_tokens(update.to(input.dtype), assign, input)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, num_protected={self.num_protected}"


def merge_schedule(r: int, num_layers: int, inflection: float = 0.0) -> List[int]:
    """How many tokens each layer removes: r per layer on average, constant for inflection 0, falling
    linearly from 2r to 0 for -1, rising from 0 to 2r for 1 (ToMe's schedules).

    >>> torchops.nn.merge_schedule(16, 12, inflection=-1.0)
    [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    """
    first = int(r * (1 - inflection))
    last = 2 * r - first
    step = (last - first) / max(num_layers - 1, 1)
    return [int(first + step * layer) for layer in range(num_layers)]


def mixture_of_depths_schedule(num_layers: int = 32) -> List[float]:
    """p-MoD's share of tokens per layer, for :class:`MixtureOfDepths`: max(cos(pi l / (L - 1)) / 2 + 0.5,
    0.15), and 1 (dense) where that is above 0.85.

    >>> [round(ratio, 2) for ratio in torchops.nn.mixture_of_depths_schedule(8)]
    [1.0, 1.0, 0.81, 0.61, 0.39, 0.19, 0.15, 0.15]
    """
    shares = [max(math.cos(math.pi * layer / max(num_layers - 1, 1)) / 2 + 0.5, 0.15) for layer in range(num_layers)]
    return [1.0 if share > 0.85 else share for share in shares]
