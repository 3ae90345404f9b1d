"""Attention over listed keys: each query, or each block of queries, has a list of keys, or of blocks of keys.

How a list is chosen is another matter: by product quantization in SPT, by an indexer in DSA, by pooled scores of
blocks in NSA, MoBA and MiniMax. What follows the choice is the same, exact softmax attention over a list.
"""

from typing import Optional, Tuple

from torch import Tensor

from .._namespace import operators
from .sparse_attention_choice import pq_encode, pq_loss, pq_topk, score_topk

__all__ = [
    "pq_attention",
    "pq_attention_lse",
    "pq_encode",
    "pq_loss",
    "pq_topk",
    "score_topk",
    "topk_attention",
    "topk_attention_lse",
    "topk_scores",
]


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
    """Softmax attention in which a query sees the keys that its list names.

    An entry of a list is the index of a key, or with ``block_size`` > 1 that of a block of keys: block b holds the
    keys at the positions b * block_size to (b + 1) * block_size - 1. An entry that names no key, -1 or any other, is
    skipped, wherever it stands. Lists may be in any order and give the same bits in every one; ascending is fastest.
    A key that is listed twice counts twice. With ``is_causal`` the keys behind a query are hidden one by one, also
    within a block. A query that sees no key gets zeros. Scores and sums are float32 (float64 for float64).
    Differentiable in query, key, value, key_bias, pair_bias and sink; the backward keeps two numbers a query.

    Args:
        query: [B, Hq, Lq, D], float64, float32, bfloat16 or float16; D at most 256. A tensor whose last
            dimension is contiguous is read where it lies, [B, L, H, D] storage included.
        key: [B, Hkv, Lk, D]. Hq is a multiple of Hkv: query head h goes with head h // (Hq / Hkv).
        value: [B, Hkv, Lk, Dv], Dv at most 256.
        indices: int32 or int64 [B, Hi, Nq, k], Hi one of 1, Hkv and Hq: heads share lists as they share keys.
            Nq is Lq / query_block, rounded up.
        block_size: keys in a block; the last block may be short.
        query_block: consecutive queries, counted from the first one of the call, that share a list.
        is_causal: hide the keys behind a query.
        scale: factor on the products of queries and keys; 1 / sqrt(D) if None.
        key_bias: [B, Lk], any floating dtype, added to every score of a key. -inf hides it (padding).
        pair_bias: [B, Hi or Hq, Nq, k], any floating dtype, added to the scores of a listed entry.
        sink: [Hq], any floating dtype: a logit that takes part in the softmax of its head and has no value.
        query_start, key_start: int64 or int32 [B], the absolute positions of the first query and of the first key
            of each row, for what the shapes do not tell. Lk - Lq and 0 if None. Causality and the blocks of keys go
            by them; an entry that names a single key (block_size = 1) counts from the first key of the tensor.

    Returns:
        [B, Hq, Lq, Dv] in query's dtype and memory layout.

    Raises:
        ValueError: a wrong shape, dtype or device, D or Dv outside of 1..256, block_size or query_block < 1.

    Source: SPT (Gui et al., 2023), DSA (DeepSeek-V3.2), NSA (Yuan et al., 2025), MoBA (Lu et al., 2025).

    >>> query, key, value = torch.randn(3, 1, 2, 6, 8)
    >>> indices = (query @ key.transpose(-1, -2)).topk(3).indices
    >>> torchops.topk_attention(query, key, value, indices, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """
    return operators.topk_attention(
        query,
        key,
        value,
        indices,
        key_bias,
        sink,
        query_start,
        key_start,
        pair_bias,
        block_size=block_size,
        query_block=query_block,
        is_causal=is_causal,
        scale=scale,
    )


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
    """:func:`topk_attention` and the logarithm of its softmax's denominator.

    Results over disjoint parts of the keys are merged with it, by :func:`torchops.merge_attention`, those of
    :func:`span_attention_lse` among them: NSA's window and list, for example.

    Args:
        query, key, value, indices, ..., key_start: as in :func:`topk_attention`.

    Returns:
        output [B, Hq, Lq, Dv], and logsumexp [B, Hq, Lq] in float32 (float64 for float64), -inf for a
        query that sees nothing. Both are differentiable.

    Raises:
        ValueError: as :func:`topk_attention`.

    >>> query, key, value = torch.randn(3, 1, 2, 6, 8)
    >>> some, others = torch.tensor([0, 3, 5]).expand(1, 1, 6, 3), torch.tensor([1, 2, 4]).expand(1, 1, 6, 3)
    >>> first, first_lse = torchops.topk_attention_lse(query, key, value, some)
    >>> second, second_lse = torchops.topk_attention_lse(query, key, value, others)
    >>> merged, lse = torchops.merge_attention([first, second], [first_lse, second_lse])
    >>> torch.testing.assert_close(merged, torchops.span_attention(query, key, value))
    """
    return operators.topk_attention_lse(
        query,
        key,
        value,
        indices,
        key_bias,
        sink,
        query_start,
        key_start,
        pair_bias,
        block_size=block_size,
        query_block=query_block,
        is_causal=is_causal,
        scale=scale,
    )


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
    """The scores of :func:`topk_attention`: scaled products of a query with the keys that its list names.

    Column e * block_size + o of a query is its score for the o-th key of entry e, in the order of its list, which is
    not sorted. The key of a column is at the position indices[e] * block_size + o; where block_size is 1 it is
    indices[e] itself. A column is -inf where there is no such key: the entry names none, or the first or last key cuts
    the block short. With ``is_causal`` the columns of keys behind the query are -inf too. The softmax over the columns
    is the distribution by which topk_attention weighs values. Columns depend on the key they stand for and on nothing
    else, so that biases of keys and entries are added to them.

    Differentiable in query and key: a loss on the scores of an indexer, or on the distribution of an attention, reaches
    what made them. The gradient to a column of -inf is not looked at, NaN included. A key that nobody lists is not
    read, and its gradient is 0. The backward keeps the lists, and of query and key what the gradients asked for are
    made of.

    Args:
        query: [B, Hq, Lq, D], float64, float32, bfloat16 or float16; D at most 256. A tensor whose last
            dimension is contiguous is read where it lies.
        key: [B, Hkv, Lk, D]. Hq is a multiple of Hkv: query head h goes with head h // (Hq / Hkv).
        indices: int32 or int64 [B, Hi, Nq, k], as :func:`topk_attention` takes them.
        block_size: keys in a block.
        query_block: consecutive queries, counted from the first one of the call, that share a list.
        is_causal: hide the keys behind a query.
        scale: factor on the products of queries and keys; 1 / sqrt(D) if None.
        query_start, key_start: int64 or int32 [B], the absolute positions of the first query and of the first key
            of each row, as in :func:`topk_attention`.

    Returns:
        [B, Hq, Lq, k * block_size] in float32 (float64 for float64), as logsumexp is: a softmax follows, and two
        scores of 30 that differ by 0.1 are the same number in bfloat16.

    Raises:
        ValueError: a wrong shape, dtype or device, D outside of 1..256, block_size or query_block < 1; more than 2^30
            columns.

    Source: what the losses on DeepSeek's DSA indexer are made of (DeepSeek-V3.2-Exp, 2025).

    >>> query, key = torch.randn(2, 1, 2, 100, 16, requires_grad=True)
    >>> value = torch.randn(1, 2, 100, 16)
    >>> indices = (query @ key.mT).topk(8).indices
    >>> weights = torchops.topk_scores(query, key, indices).softmax(-1)
    >>> chosen = value[0, torch.arange(2)[:, None, None], indices[0]]
    >>> output = (weights[..., None, :] @ chosen)[..., 0, :]
    >>> torch.allclose(output, torchops.topk_attention(query, key, value, indices), atol=1e-5)
    True
    """
    return operators.topk_scores(
        query,
        key,
        indices,
        query_start,
        key_start,
        block_size=block_size,
        query_block=query_block,
        is_causal=is_causal,
        scale=scale,
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
    """Softmax attention in which a query sees the k keys that agree with it in most codes.

    The bits, forward and backward, are those of :func:`topk_attention` over the lists of :func:`pq_topk`, which are
    made where they are needed and never stored: of 8192 tokens with 1024 keys each and 4 heads they are 134 MB, where
    query, key, value and output are 33.5 MB in float32. The backward keeps the codes and two numbers a query, and
    chooses again. Differentiable in query, key, value, key_bias and sink; the choice itself has no gradient.

    Args:
        query: [B, Hq, Lq, D], float64, float32, bfloat16 or float16; D at most 256. A tensor whose last
            dimension is contiguous is read where it lies, [B, L, H, D] storage included.
        key: [B, Hkv, Lk, D]. Hq is a multiple of Hkv: query head h goes with head h // (Hq / Hkv).
        value: [B, Hkv, Lk, Dv], Dv at most 256.
        query_codes: uint8 [B, Hq, Lq, M], M at most 253: of query, by :func:`pq_encode`.
        key_codes: uint8 [B, Hkv, Lk, M], of key.
        k: How many keys a query gets, where it sees as many.
        is_causal: Whether a query sees only keys at its own position and before.
        scale: factor on the products of queries and keys; 1 / sqrt(D) if None.
        sink_keys, local_keys: how many of the first keys, and of those at the query's position and before it, are
            always among the k: as in :func:`pq_topk`.
        key_bias: [B, Lk], any floating dtype, added to every score of a key. -inf hides it (padding), and it is then
            not chosen.
        sink: [Hq], any floating dtype: a logit that takes part in the softmax of its head and has no value.
        query_start, key_start: int64 or int32 [B], the absolute positions of the first query and of the first key
            of each row. Lk - Lq and 0 if None.

    Returns:
        [B, Hq, Lq, Dv] in query's dtype and memory layout.

    Raises:
        ValueError: a wrong shape, dtype or device, D or Dv outside of 1..256; sink_keys and local_keys that are
            together more than k.

    Source: SPT (Gui et al., 2023).

    >>> query, key, value = torch.randn(3, 1, 2, 100, 16)
    >>> codebooks = torch.randn(4, 16, 4)
    >>> codes = torchops.pq_encode(query, codebooks), torchops.pq_encode(key, codebooks)
    >>> output = torchops.pq_attention(query, key, value, *codes, k=12, is_causal=True, local_keys=4)
    >>> lists = torchops.pq_topk(*codes, k=12, is_causal=True, local_keys=4)
    >>> torch.equal(output, torchops.topk_attention(query, key, value, lists, is_causal=True))
    True
    """
    return operators.pq_attention(
        query,
        key,
        value,
        query_codes,
        key_codes,
        k,
        key_bias,
        sink,
        query_start,
        key_start,
        is_causal=is_causal,
        scale=scale,
        sink_keys=sink_keys,
        local_keys=local_keys,
    )


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
    """:func:`pq_attention` and the logarithm of its softmax's denominator.

    Results over parts of the keys are merged with it, as those of :func:`topk_attention_lse` are.

    Args:
        query, key, value, query_codes, ..., key_start: as in :func:`pq_attention`.

    Returns:
        output [B, Hq, Lq, Dv], and logsumexp [B, Hq, Lq] in float32 (float64 for float64), -inf for a
        query that sees nothing. Both are differentiable.

    Raises:
        ValueError: as :func:`pq_attention`.

    >>> query, key, value = torch.randn(3, 1, 2, 100, 16)
    >>> codes = torch.randint(16, (2, 1, 2, 100, 4), dtype=torch.uint8)
    >>> output, logsumexp = torchops.pq_attention_lse(query, key, value, *codes, k=12)
    >>> logsumexp.shape
    torch.Size([1, 2, 100])
    """
    return operators.pq_attention_lse(
        query,
        key,
        value,
        query_codes,
        key_codes,
        k,
        key_bias,
        sink,
        query_start,
        key_start,
        is_causal=is_causal,
        scale=scale,
        sink_keys=sink_keys,
        local_keys=local_keys,
    )
