"""Routed feed-forward layers and experts of mixtures: for each token some blocks of weights, chosen by a router."""

from typing import Optional, Tuple

from torch import Tensor

from .._namespace import operators

__all__ = ["grouped_linear", "route", "routed_ffn"]


def route(index: Tensor, num_blocks: int) -> Tuple[Tensor, Tensor]:
    """Sorts the choices of a router by block, so that each block's tokens lie together.

    A choice is an entry of ``index``, and goes by its flat position t * k + j, which says both the token t and the slot
    j, by which its gate is found. The sort is stable: a block's tokens stay in ascending order. Integers have no
    gradient.

    Args:
        index: int32 or int64 [T, k], for each token the blocks that it goes to. An entry outside of
            0..num_blocks - 1 goes nowhere: a slot that was dropped, or an expert of another process.
        num_blocks: G, at most 2^20.

    Returns:
        order int32 [T k]: positions in the flat index, those of block 0 first; entries that go nowhere last. And
        offsets int32 [G + 1]: block g has order[offsets[g] : offsets[g + 1]]. Behind offsets[G] are the entries that
        go nowhere. Nothing is read back from a device.

    Raises:
        ValueError: a wrong shape or dtype, num_blocks outside of 1..2^20, more than 2^31 - 1 entries.

    Source: what every mixture of experts begins with; SPT (Gui et al., 2023) for blocks of one layer.

    >>> order, offsets = torchops.route(torch.tensor([[2, 0], [0, 1], [2, -1]]), 3)
    >>> order, offsets
    (tensor([1, 2, 3, 0, 4, 5], dtype=torch.int32), tensor([0, 2, 3, 5], dtype=torch.int32))
    >>> order[offsets[2] : offsets[3]] // 2  # the tokens of block 2
    tensor([0, 2], dtype=torch.int32)
    """
    return operators.route(index, num_blocks=num_blocks)


def grouped_linear(
    input: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    bias: Optional[Tensor] = None,
    slots: Optional[int] = None,
) -> Tensor:
    """Rows that are sorted by block, each times the weight of its block: output[i] = weight[g] row + bias[g].

    Blocks may have any number of rows, none too. The result of a row has the same bits for any number of threads.

    Args:
        input: [T, K], one row for each token, where ``slots`` is given; else [M, K], the sorted rows themselves.
            float64, float32, bfloat16 or float16.
        weight: [G, N, K], of the input's dtype, with any strides; gradients get the same.
        order: int32 [M], from :func:`route`. With ``slots``, output row i is made of token order[i] // slots.
        offsets: int32 [G + 1], from :func:`route`: block g has the rows offsets[g] to offsets[g + 1] - 1.
        bias: [G, N], of the input's dtype.
        slots: k, the number of choices of a token: M = T k.

    Returns:
        [M, N], sorted as ``order`` is. Rows behind offsets[G], which belong to no block, are zeros.

    Raises:
        ValueError: a wrong shape, dtype or device; on the CPU also an order that is no permutation, and offsets that
            descend or go beyond M. On CUDA entries that point elsewhere are skipped, their results undefined.

    Source: the grouped product of mixtures of experts; torch.nn.functional.grouped_mm is its relative.

    >>> tokens, choice = torch.randn(6, 8), torch.tensor([[2, 0], [0, 1], [2, -1], [1, 2], [0, 2], [1, 0]])
    >>> order, offsets = torchops.route(choice, 3)
    >>> rows = torchops.grouped_linear(tokens, torch.randn(3, 5, 8), order, offsets, slots=2)
    >>> rows.shape  # the last one belongs to the entry -1
    torch.Size([12, 5])
    """
    return operators.grouped_linear(input, weight, order, offsets, bias, slots=slots)


def routed_ffn(
    input: Tensor,
    index: Tensor,
    gate: Optional[Tensor],
    w1: Tensor,
    w2: Tensor,
    b1: Optional[Tensor] = None,
    b2: Optional[Tensor] = None,
    w_gate: Optional[Tensor] = None,
    lora_a1: Optional[Tensor] = None,
    lora_b1: Optional[Tensor] = None,
    lora_a2: Optional[Tensor] = None,
    lora_b2: Optional[Tensor] = None,
    activation: str = "relu",
    glu: str = "none",
    alpha: float = 1.0,
    limit: Optional[float] = None,
    up_offset: float = 0.0,
    gate_at: str = "output",
    lora_scale: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    r"""A feed-forward layer of G blocks, of which each token is computed by the k that ``index`` names.

    For a token x, with block g and gate c of each of its k slots:

    .. math::

        y = \sum_{\text{slots}} c \, (W_{2,g} h + b_{2,g}) \qquad h = \text{act}(W_{1,g} x + b_{1,g})

    Blocks are slices of the hidden units of one layer (SPT), or experts of a mixture. The results of a token's slots
    are added up in float32 (float64 for float64), in the order of the slots, and rounded once. No token is dropped: a
    capacity is the caller's, who writes -1 into ``index``.

    Args:
        input: x [..., d], float64, float32, bfloat16 or float16.
        index: int32 or int64 [..., k]. An entry outside of 0..G - 1 is skipped: it adds nothing and its gate has a
            gradient of zero. A block that stands there twice counts twice.
        gate: c [..., k], of any of the four dtypes; None for ones.
        w1: [G, N1, d], of the input's dtype as all weights, with any strides; gradients get the same. N1 is N, or 2 N
            where ``glu`` is "concat" or "interleaved".
        w2: [G, d, N].
        b1: [G, N1]; [G, 2 N] where ``glu`` is "split", for the gates first.
        b2: [G, d], times the gate as the block's result is; or [d], added once.
        w_gate: [G, N, d], where ``glu`` is "split".
        lora_a1, lora_b1: [G or 1, r, d] and [G, N1, r] (2 N, for the gates first, where ``glu`` is "split"):
            W1_g + lora_scale lora_b1_g lora_a1_g takes W1_g's place.
        lora_a2, lora_b2: [G, r, N] and [G or 1, d, r], the same for W2_g.
        activation: "relu", "relu2" (its square), "gelu", "gelu_tanh", or "silu", which is x sigmoid(alpha x).
        glu: where gated units have their two halves. "none"; "split", in ``w_gate`` and ``w1``; "concat", the rows of
            the gates and then those of the values in ``w1``; "interleaved", by turns. A gated unit is
            act(min(g, limit)) (clamp(u, -limit, limit) + up_offset).
        alpha: of silu.
        limit: see ``glu``; None for no limit.
        up_offset: see ``glu``.
        gate_at: "output" as above. "input": c is multiplied with x, not with the result (Llama 4). "both": with the
            results of both layers, but not with those of the LoRA factors (SPT),
            h = act(c (W1_g x + b1_g) + LoRA1 x), y = sum of c (W2_g h + b2_g) + LoRA2 h.
        lora_scale: see ``lora_a1``.
        recompute: keep nothing for the backward pass but the arguments, and compute W1_g x again there.

    Returns:
        y [..., d] of the input's dtype.

    Raises:
        ValueError: a wrong shape, dtype, device or name.
        NotImplementedError, RuntimeError: gradients of gradients, and forward mode.

    Under autocast input, weights, biases and factors are lowered; gates are not.

    Source: SPT (Gui et al., 2023); Switch Transformers (Fedus et al., 2021) and its successors for experts.

    >>> w1, b1, w2 = torch.randn(256, 64), torch.randn(256), torch.randn(64, 256)  # a feed-forward layer, in 4 blocks
    >>> x, index = torch.randn(2, 10, 64), torch.tensor([0, 1, 2, 3]).expand(2, 10, 4)
    >>> y = torchops.routed_ffn(x, index, None, w1.view(4, 64, 64), w2.view(64, 4, 64).movedim(1, 0), b1.view(4, 64))
    >>> torch.testing.assert_close(y, torch.relu(x @ w1.T + b1) @ w2.T, rtol=1e-4, atol=1e-3)  # all blocks: dense
    """
    return operators.routed_ffn(
        input,
        index,
        gate,
        w1,
        w2,
        b1,
        b2,
        w_gate,
        lora_a1,
        lora_b1,
        lora_a2,
        lora_b2,
        activation=activation,
        glu=glu,
        alpha=alpha,
        limit=limit,
        up_offset=up_offset,
        gate_at=gate_at,
        lora_scale=lora_scale,
        recompute=recompute,
    )
