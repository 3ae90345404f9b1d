"""Pruning, merging and routing of tokens.

All of it is one idea: an *assignment* of N tokens to M groups. ``assign[b, i]`` is the group of token i
of row b, or -1 when the token is dropped. An operator either makes an assignment or moves data along
one; token merging, pruning and routing methods are short compositions of the two (:mod:`torchops.nn`).
"""

from typing import Optional, Tuple

from torch import Tensor

from .._namespace import operators

__all__ = [
    "bipartite_assignment",
    "bipartite_pairs",
    "merge_tokens",
    "num_groups",
    "topk_assignment",
    "unmerge_tokens",
]


def num_groups(num_tokens: int, r: int, num_protected: int = 0) -> int:
    """Number of groups M that :func:`bipartite_assignment` makes: ``num_tokens`` less r, where r is
    clamped to half of the tokens behind the protected ones.

    >>> torchops.num_groups(197, 16, 1)
    181
    >>> torchops.num_groups(5, 100, 1)
    3

    Raises:
        ValueError: a negative number, or num_protected over num_tokens.
    """
    if num_tokens < 0:
        raise ValueError(f"num_groups: expected num_tokens >= 0, got {num_tokens}")
    if r < 0:
        raise ValueError(f"num_groups: expected r >= 0, got {r}")
    if num_protected < 0:
        raise ValueError(f"num_groups: expected num_protected >= 0, got {num_protected}")
    if num_protected > num_tokens:
        raise ValueError(f"num_groups: expected num_protected <= num_tokens = {num_tokens}, got {num_protected}")
    return num_tokens - min(r, (num_tokens - num_protected) // 2)


def bipartite_assignment(
    metric: Tensor,
    r: int,
    num_protected: int = 0,
    padding_mask: Optional[Tensor] = None,
) -> Tensor:
    """Merges the r most similar pairs of tokens: the bipartite soft matching of ToMe.

    Tokens at even positions are sources, those at odd positions destinations. Each source's best
    destination is the one of highest cosine similarity, and the r sources of highest such similarity
    join the group of their destination. Groups are numbered in sequence order.

    Similarities are those of the rows as 16-bit integers, which makes the matching the same on every
    level and device, and rounded to multiples of 2**-16 before they are compared, so that tokens equal
    up to noise tie; among equals the lower source position wins, then the lower destination position.
    A row of zeros has similarity 0 with everything; a row with a NaN or an infinity is less similar than
    any other.

    Args:
        metric: what similarity is measured on, usually the attention's keys averaged over heads;
            [B, N, K], any floating dtype.
        r: number of tokens to remove; clamped to ``(N - num_protected) // 2``.
        num_protected: the first tokens of every row that take no part (class and register tokens).
        padding_mask: bool [B, N], True for padding. Padding never merges with a token. Where a row
            has fewer than r merges to make, the rest of its r removals drop padding (-1), last
            positions first.

    Returns:
        assign, int64 [B, N], with values in -1..M-1, M = :func:`num_groups` (N, r, num_protected).

    Raises:
        ValueError: a wrong shape, dtype or device, a negative number, num_protected over N, or (seen
            on the CPU) padding among the protected tokens.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.

    >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.3]]])
    >>> torchops.bipartite_assignment(metric, r=1)
    tensor([[0, 1, 1, 2]])
    """
    return operators.bipartite_assignment(metric, r, num_protected=num_protected, padding_mask=padding_mask)


def bipartite_pairs(
    metric: Tensor,
    r: int,
    num_protected: int = 0,
    padding_mask: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """The matching of :func:`bipartite_assignment` as pairs of positions, in descending similarity.

    Args:
        metric, r, num_protected, padding_mask: as in :func:`bipartite_assignment`.

    Returns:
        sources, destinations: int64 [B, R], R = r clamped. Dropped padding comes last, as a source
        with destination -1.

    Raises:
        ValueError: as :func:`bipartite_assignment`.

    >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.3]]])
    >>> torchops.bipartite_pairs(metric, r=2)
    (tensor([[2, 0]]), tensor([[1, 3]]))
    """
    return operators.bipartite_pairs(metric, r, num_protected=num_protected, padding_mask=padding_mask)


def topk_assignment(
    scores: Tensor,
    k: int,
    num_protected: int = 0,
    fuse: bool = False,
    padding_mask: Optional[Tensor] = None,
) -> Tensor:
    """Keeps the k tokens of highest score, and drops the others or fuses them into one.

    The protected tokens and the k best of the others keep a group of their own, in sequence order.
    Equal scores: the lower position is kept. A NaN ranks below every number, padding below every token.

    Args:
        scores: [B, N], any floating dtype.
        k: number of tokens to keep besides the protected ones; clamped to ``N - num_protected``.
        num_protected: the first tokens of every row, kept whatever their score.
        fuse: the tokens that are not kept form the last group instead of being dropped; padding that
            is not kept is dropped all the same.
        padding_mask: bool [B, N], True for padding.

    Returns:
        assign, int64 [B, N], with values in -1..M-1, M = num_protected + k (+ 1 with fuse).

    Raises:
        ValueError: a wrong shape, dtype or device, a negative number, num_protected over N, or (seen
            on the CPU) padding among the protected tokens.

    Source: with fuse, EViT (Liang et al., 2022); without, FastV (Chen et al., 2024) and others.

    >>> torchops.topk_assignment(torch.tensor([[0.1, 0.7, 0.2, 0.9]]), k=2)
    tensor([[-1,  0, -1,  1]])
    >>> torchops.topk_assignment(torch.tensor([[0.1, 0.7, 0.2, 0.9]]), k=2, fuse=True)
    tensor([[2, 0, 2, 1]])
    """
    return operators.topk_assignment(scores, k, num_protected=num_protected, fuse=fuse, padding_mask=padding_mask)


def merge_tokens(
    input: Tensor,
    assign: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,
    normalize: bool = True,
) -> Tuple[Tensor, Tensor]:
    r"""Adds up, or averages, the tokens of each group.

    The members i of group m are the tokens with ``assign[b, i] == m``:

    .. math::

        \text{total}_{b,m} &= \sum_i \text{weight}_{b,i} \\
        \text{merged}_{b,m} &= \sum_i \text{weight}_{b,i} \, \text{input}_{b,i}
        \;\; (/ \, \text{total}_{b,m} \text{ if normalize})

    An empty group gives zeros and total 0; a group whose total is 0 is not divided. A normalised group
    of one member, of a finite weight, is a copy of it, bit for bit. Sums are taken in float32 (float64
    for float64), those of weights in float64. Differentiable in input and weight, through both outputs.

    Args:
        input: [B, N, C], float64, float32, bfloat16 or float16.
        assign: int64 [B, N], values in -1..M-1; -1 takes no part.
        num_groups: the number of groups, M.
        weight: [B, N], any floating dtype; None for ones. With the sizes of ToMe, a token that stands
            for several counts as several.
        normalize: divide by the total.

    Returns:
        merged [B, M, C] in input's dtype, total [B, M] in float32 (float64 for float64 input).

    Raises:
        ValueError: a wrong shape, dtype or device, or (on the CPU) a value of assign out of range,
            with its position. On CUDA such a value stops a debug build; otherwise the result is
            undefined, but nothing is read or written out of bounds.

    >>> input = torch.tensor([[[1.0], [3.0], [5.0]]])
    >>> torchops.merge_tokens(input, torch.tensor([[0, 0, 1]]), num_groups=2)
    (tensor([[[2.],
             [5.]]]), tensor([[2., 1.]]))
    """
    return operators.merge_tokens(input, assign, num_groups, weight=weight, normalize=normalize)


def unmerge_tokens(merged: Tensor, assign: Tensor, residual: Optional[Tensor] = None) -> Tensor:
    """Gives every token the row of its group: the way back from :func:`merge_tokens`.

    Args:
        merged: [B, M, C], float64, float32, bfloat16 or float16.
        assign: int64 [B, N], values in -1..M-1; -1 gives zeros.
        residual: [B, N, C] in merged's dtype, added to the result.

    Returns:
        [B, N, C]: ``merged[b, assign[b, i]] + residual[b, i]``. Differentiable in merged and residual.

    Raises:
        ValueError: a wrong shape, dtype or device, or (on the CPU) a value of assign out of range;
            on CUDA as for :func:`merge_tokens`.

    >>> torchops.unmerge_tokens(torch.tensor([[[2.0], [5.0]]]), torch.tensor([[0, -1, 1]]))
    tensor([[[2.],
             [0.],
             [5.]]])
    """
    return operators.unmerge_tokens(merged, assign, residual=residual)
