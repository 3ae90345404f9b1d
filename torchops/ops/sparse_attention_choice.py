"""Which keys, or blocks of keys, a query attends to: by the codes of product quantization, or by scores."""

from typing import Optional

from torch import Tensor

from .._namespace import operators

__all__ = ["pq_encode", "pq_loss", "pq_topk", "score_topk"]


def pq_encode(input: Tensor, codebooks: Tensor) -> Tensor:
    """The codes of product quantization: for each part of a row, which codeword is nearest to it.

    A row of D numbers is cut into M parts of D / M, and each has a codebook of E codewords of its own. Near is by the
    sum of absolute differences, in float32 (float64 for float64); of equally near codewords the first one is taken, and
    a distance that is NaN counts as infinite. Rows whose codes agree in many parts have a large product, by which SPT
    chooses the keys of a query. Integers have no gradient.

    Args:
        input: [..., D], float64, float32, bfloat16 or float16.
        codebooks: [M, E, D / M], any floating dtype, E at most 256. SPT has E = 16 and D / M = 8.

    Returns:
        uint8 [..., M], the index of a codeword each.

    Raises:
        ValueError: a wrong shape, dtype or device; E that is 0 or above 256; M times D / M that is not D.

    Source: product quantization (Jegou et al., 2011) as SPT (Gui et al., 2023) has it.

    >>> codebooks = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 4.0]]])  # 2 parts, 2 codewords each
    >>> torchops.pq_encode(torch.tensor([[0.9, 0.7, 0.0, 1.0], [0.2, 0.1, 0.0, 3.0]]), codebooks)
    tensor([[1, 0],
            [0, 1]], dtype=torch.uint8)
    """
    return operators.pq_encode(input, codebooks)


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
    """The k keys that agree with each query in most codes, a list for topk_attention.

    Codes are those of pq_encode. Of keys that agree in as many codes the nearer one in position is taken first, and of
    two that are equally far the earlier one. The choice is exact.

    Args:
        query_codes: uint8 [B, Hq, Lq, M], M at most 253.
        key_codes: uint8 [B, Hkv, Lk, M], where Hkv divides Hq.
        k: How many keys a query gets, where it sees as many.
        is_causal: Whether a query sees only keys at its own position and before.
        sink_keys: The keys at positions 0 to sink_keys - 1 are among the k.
        local_keys: So are the local_keys keys at the query's position and before it; without is_causal as many from
            local_keys / 2, rounded down, before it on.
        key_bias: [B, Lk], any floating dtype; -inf hides a key, any other number does nothing.
        query_start: int64 or int32 [B], the position of query 0; Lk - Lq by default.
        key_start: int64 or int32 [B], the position of key 0; 0 by default.

    Returns:
        int32 [B, Hq, Lq, k], ascending, -1 behind where a query sees fewer than k keys. There is no gradient.

    Raises:
        ValueError: a wrong shape, dtype or device; sink_keys and local_keys that are together more than k.

    Source: SPT (Gui et al., 2023), whose buckets lose some of the keys.

    >>> query_codes = torch.tensor([[[[1, 2, 3]]]], dtype=torch.uint8)
    >>> key_codes = torch.tensor([[[[1, 2, 0], [0, 0, 3], [1, 0, 3], [0, 2, 0], [0, 0, 0]]]], dtype=torch.uint8)
    >>> torchops.pq_topk(query_codes, key_codes, 3)  # keys 0 and 2 agree in two codes, 1 and 3 in one: 3 is nearer
    tensor([[[[0, 2, 3]]]], dtype=torch.int32)
    """
    return operators.pq_topk(
        query_codes,
        key_codes,
        k,
        key_bias,
        query_start,
        key_start,
        is_causal=is_causal,
        sink_keys=sink_keys,
        local_keys=local_keys,
    )


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
    """The k keys, or blocks of keys, of the largest scores for each query: a list for topk_attention.

    The score of a query and a key is their product, with ``relu`` no less than 0. With ``weights`` there is one list
    for all heads, by the sum over heads h of weights_h * score_h, as DSA's indexer has it. A block of keys has the
    largest score of those of its keys that are seen, and a block of queries that of its queries that see the key. Of
    equal scores the earlier key or block is chosen. The choice is exact; scores are sums in float32 (float64 for
    float64), and no tensor of queries times keys is stored.

    Args:
        query: [B, Hq, Lq, D], float64, float32, bfloat16 or float16; D at most 256.
        key: [B, Hkv, Lk, D], where Hkv divides Hq.
        k: How many keys or blocks a list names, where as many are seen.
        weights: [B, Hq, Lq], any floating dtype. None: a list for each head.
        relu: Whether negative products count as 0.
        block_size: keys in a block, as in :func:`topk_attention`; 1 chooses single keys.
        query_block: consecutive queries, counted from the first one of the call, that share a list.
        is_causal: Whether a query sees only keys at its own position and before.
        key_bias: [B, Lk], any floating dtype; -inf hides a key, any other number does nothing.
        query_start: int64 or int32 [B], the position of query 0; Lk - Lq by default.
        key_start: int64 or int32 [B], the position of key 0; 0 by default.

    Returns:
        int32 [B, Hq, Nq, k], or [B, 1, Nq, k] with weights; Nq is Lq / query_block, rounded up. Ascending, -1 behind
        where fewer than k are seen. A score that is NaN is not chosen. There is no gradient.

    Raises:
        ValueError: a wrong shape, dtype or device, D outside of 1..256, block_size or query_block < 1.

    Source: DSA (DeepSeek-V3.2), MoBA (Lu et al., 2025), Quest (Tang et al., 2024).

    >>> query, key = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[3.0, 0.0], [5.0, 1.0], [2.0, 9.0], [5.0, 0.0]]]])
    >>> torchops.score_topk(query, key, 2)  # scores 3, 5, 2, 5
    tensor([[[[1, 3]]]], dtype=torch.int32)
    >>> query, key = torch.randn(1, 4, 100, 16), torch.randn(1, 1, 100, 16)  # an indexer of 4 heads
    >>> torchops.score_topk(query, key, 12, torch.rand(1, 4, 100), relu=True, is_causal=True).shape
    torch.Size([1, 1, 100, 12])
    """
    return operators.score_topk(
        query,
        key,
        k,
        weights,
        key_bias,
        query_start,
        key_start,
        relu=relu,
        block_size=block_size,
        query_block=query_block,
        is_causal=is_causal,
    )


def pq_loss(input: Tensor, codebooks: Tensor) -> Tensor:
    """What product quantization loses: a loss that moves codewords to the parts of rows, and these to codewords.

    With d_e the distance of a part x to codeword e as in :func:`pq_encode`, y is the mean of the codewords weighted by
    1 / max(d_e, 1e-5), and z the nearest one. The loss is the mean of (y - z)^2 over all numbers of the input plus that
    of (x - z)^2. Differentiable in input and codebooks: through z to the codeword that is nearest, and through the
    weights wherever a distance is above 1e-5; which one is nearest has no gradient. The backward compares again, and
    nothing that has a number for each row and codeword is stored. SPT adds 0.01 times the sum of this loss over
    queries and keys to that of its task.

    Args:
        input: [..., D], float64, float32, bfloat16 or float16. Its gradient has its dtype and is as small as a mean's
            is: float16 may need a scaled loss.
        codebooks: [M, E, D / M], any floating dtype, E at most 256.

    Returns:
        A number [] in float32 (float64 for float64). NaN for an input without numbers, as torch's mse_loss gives, and
        its gradient to codebooks is then zero. NaN too where input or codebooks hold a NaN or an infinity, as the
        formula gives.

    Raises:
        ValueError: as :func:`pq_encode`.

    Source: SPT (Gui et al., 2023).

    >>> codebooks = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], requires_grad=True)  # 1 part, 2 codewords
    >>> loss = torchops.pq_loss(torch.tensor([[0.9, 0.7], [0.0, 0.1]]), codebooks)
    >>> loss.backward()
    >>> codebooks.grad.shape
    torch.Size([1, 2, 2])
    """
    return operators.pq_loss(input, codebooks)
