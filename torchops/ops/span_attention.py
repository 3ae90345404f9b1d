r"""Attention over a span of keys: full, in blocks or in a sliding window, by one rule.

A query at the absolute position p sees the keys in its own block of ``block_size`` positions, in ``left``
blocks before it and in ``right`` blocks after it. -1 removes a bound. With ``is_causal`` it sees no key
after itself. A key at position t is seen if

.. math::

    \lfloor p / \mathrm{block\_size} \rfloor - \text{left}
    \le \lfloor t / \mathrm{block\_size} \rfloor
    \le \lfloor p / \mathrm{block\_size} \rfloor + \text{right}
    \quad \text{and} \quad (t \le p \text{ if } \mathrm{is\_causal})

=========================================  ==========  ====  =====  =========
attention                                  block_size  left  right  is_causal
=========================================  ==========  ====  =====  =========
full                                       1           -1    -1     False
full, causal                               1           -1    -1     True
sliding window of W keys, causal           1           W-1   0      True
blocks of b, each on its own               b           0     0      either
blocks of b that see the one before, too   b           1     0      either
BigBird's band                             b           1     1      False
=========================================  ==========  ====  =====  =========

Cost and memory grow with the number of visible pairs: there is no mask.
"""

from typing import Optional, Tuple

from torch import Tensor

from .._namespace import operators

__all__ = ["span_attention", "span_attention_lse"]


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
    """Softmax attention in which a query sees a span of keys (see the module for the rule).

    Unlike ``scaled_dot_product_attention``, causality is aligned to the end when there are fewer
    queries than keys: the last query sees the last key, which is what decoding with a cache needs.
    A query that sees no key gets zeros. Scores and sums are float32 (float64 for float64).
    Differentiable in query, key, value, key_bias and sink; the backward keeps one number a query.

    Args:
        query: [B, Hq, Lq, D], float64, float32, bfloat16 or float16; D at most 256. A tensor whose last
            dimension is contiguous is read where it lies, [B, L, H, D] storage included.
        key: [B, Hkv, Lk, D]. Hq is a multiple of Hkv: query head h goes with head h // (Hq / Hkv).
        value: [B, Hkv, Lk, Dv], Dv at most 256.
        block_size: positions in a block.
        left, right: blocks before and behind a query's own that it sees; -1 for all.
        is_causal: hide the keys behind a query.
        scale: factor on the products of queries and keys; 1 / sqrt(D) if None.
        key_bias: [B, Lk], any floating dtype, added to every score of a key. -inf hides it (padding).
        sink: [Hq], any floating dtype: a logit that takes part in the softmax of its head and has no value.
        query_start, key_start: int64 or int32 [B], the absolute positions of the first query and of the
            first key of each row, for what the shapes do not tell: left padding, a cache that was trimmed
            or is not full, a shard. Lk - Lq and 0 if None.

    Returns:
        [B, Hq, Lq, Dv] in query's dtype and memory layout.

    Raises:
        ValueError: a wrong shape, dtype or device, D or Dv outside of 1..256, block_size < 1, left or
            right < -1.

    Source: MASFormer (Zhang et al., 2023); online softmax as in FlashAttention (Dao et al., 2022).

    >>> query, key, value = torch.randn(3, 1, 2, 6, 8)
    >>> torchops.span_attention(query, key, value, left=3, right=0, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """
    return operators.span_attention(
        query,
        key,
        value,
        block_size=block_size,
        left=left,
        right=right,
        is_causal=is_causal,
        scale=scale,
        key_bias=key_bias,
        sink=sink,
        query_start=query_start,
        key_start=key_start,
    )


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
    """:func:`span_attention` and the logarithm of its softmax's denominator.

    Results over disjoint parts of the keys are merged with it, by :func:`torchops.merge_attention`. Give the sink to
    one part only.

    Args:
        query, key, value, block_size, ..., key_start: as in :func:`span_attention`.

    Returns:
        output [B, Hq, Lq, Dv], and logsumexp [B, Hq, Lq] in float32 (float64 for float64), -inf for a
        query that sees nothing. Both are differentiable.

    Raises:
        ValueError: as :func:`span_attention`.

    >>> query, key, value = torch.randn(3, 1, 2, 6, 8)
    >>> first, first_lse = torchops.span_attention_lse(query, key[:, :, :4], value[:, :, :4])
    >>> second, second_lse = torchops.span_attention_lse(query, key[:, :, 4:], value[:, :, 4:])
    >>> merged, lse = torchops.merge_attention([first, second], [first_lse, second_lse])
    >>> torch.testing.assert_close(merged, torchops.span_attention(query, key, value))
    """
    return operators.span_attention_lse(
        query,
        key,
        value,
        block_size=block_size,
        left=left,
        right=right,
        is_causal=is_causal,
        scale=scale,
        key_bias=key_bias,
        sink=sink,
        query_start=query_start,
        key_start=key_start,
    )
