"""Sparse multi-head attention (SPT) as modules: codebooks that say which keys a query attends to, and projections."""

import math
from typing import Any, Dict, Optional, Union

import torch
from torch import Tensor, nn

from ..ops.sparse_attention import pq_attention, pq_encode, pq_loss
from ._losses import sum_of_losses
from ._self_attention import SelfAttention

__all__ = ["PQAttention", "SparseAttention", "quantization_loss"]


MOST_PARTS = 253  # that pq_topk counts


@torch.fx.wrap
def num_listed(num_keys: int, keep_share: float, keep_count: int) -> int:
    """k, at least 1."""
    if keep_count >= 0:
        return max(min(keep_count, num_keys), 1)
    return max(math.ceil(keep_share * num_keys - 1e-6), 1)


class PQAttention(nn.Module):
    """Attention of queries to the keys that share most codes with them.

    An attention layer calls it in place of scaled_dot_product_attention, after rotary positions if it has them.
    Queries and keys are split into parts of ``subspace`` features, and each part is replaced by the nearest of the
    ``num_codewords`` codewords of its codebook. A query attends to the ``keep`` keys that agree with it in most
    parts. Codebooks are shared by queries, keys and heads. They start as random numbers, so fit them first
    (:func:`calibrate_codebooks`). In training only ``quantization_loss`` has a gradient to them. If you do not add it
    to the loss, freeze them (``codebooks.requires_grad_(False)``).

    Args:
        head_dim: D, a multiple of subspace.
        keep: how many keys each query attends to: a number, or a share of all keys in (0, 1], rounded up. With a
            share a cache that grows makes lists longer, so that decoding token by token gives other outputs than one
            pass; with a number both are the same.
        num_codewords: E, of each part; at most 256.
        subspace: features of a part.
        sink_keys, local_keys: how many first keys of a row, and nearest keys of a query, are always attended to. They
            count among the kept ones.

    Attributes:
        codebooks: a parameter [D / subspace, E, subspace].
        quantization_loss: how far queries and keys of the last forward pass are from their codewords, a number with a
            gradient (:func:`torchops.pq_loss` of the queries and of the keys). None in evaluation, and where codebooks
            are frozen.

    Shapes: forward(query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv]) returns [B, Hq, Lq, Dv].

    Raises:
        ValueError: sizes that are not positive, a head_dim that is no multiple of subspace, more than 256 codewords; in
            the forward pass, as :func:`torchops.pq_attention`.

    Source: SPT (Gui et al., 2023).

    >>> attend = torchops.nn.PQAttention(64, keep=1 / 8, local_keys=16)
    >>> query, key, value = torch.randn(3, 1, 4, 1000, 64)
    >>> attend(query, key, value, is_causal=True).shape
    torch.Size([1, 4, 1000, 64])
    """

    quantization_loss: Optional[Tensor]
    __jit_unused_properties__ = ["keep"]  # TorchScript has no unions of numbers

    def __init__(
        self,
        head_dim: int,
        *,
        keep: Union[int, float] = 1 / 8,
        num_codewords: int = 16,
        subspace: int = 8,
        sink_keys: int = 0,
        local_keys: int = 0,
    ) -> None:
        super().__init__()
        if not keep > 0 or (isinstance(keep, float) and keep > 1):
            raise ValueError(f"PQAttention: expected keep to be a number of keys or a share in (0, 1], got {keep}")
        if subspace < 1 or head_dim < 1 or head_dim % subspace:
            raise ValueError(
                f"PQAttention: expected head_dim to be a multiple of subspace = {subspace}, got {head_dim}"
            )
        if head_dim // subspace > MOST_PARTS:
            raise ValueError(
                f"PQAttention: expected head_dim / subspace to be at most {MOST_PARTS}, got {head_dim // subspace}"
            )
        if not 1 <= num_codewords <= 256:
            raise ValueError(f"PQAttention: expected num_codewords in 1..256, got {num_codewords}")
        for name, count in (("sink_keys", sink_keys), ("local_keys", local_keys)):
            if count < 0:
                raise ValueError(f"PQAttention: expected {name} >= 0, got {count}")
        self.keep_share = float(keep) if isinstance(keep, float) else -1.0
        self.keep_count = -1 if isinstance(keep, float) else int(keep)
        self.sink_keys = sink_keys
        self.local_keys = local_keys
        self.codebooks = nn.Parameter(torch.empty(head_dim // subspace, num_codewords, subspace))
        self.quantization_loss = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codebooks)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        scale: Optional[float] = None,
        key_bias: Optional[Tensor] = None,
        sink: Optional[Tensor] = None,
        query_start: Optional[Tensor] = None,
        key_start: Optional[Tensor] = None,
    ) -> Tensor:
        """Attends; the arguments are those of :func:`torchops.pq_attention`."""
        self.quantization_loss = None
        if self.training and self.codebooks.requires_grad:
            self.quantization_loss = pq_loss(query, self.codebooks) + pq_loss(key, self.codebooks)
        return pq_attention(
            query,
            key,
            value,
            pq_encode(query, self.codebooks),
            pq_encode(key, self.codebooks),
            self.num_kept(key.shape[2]),
            is_causal,
            scale,
            self.sink_keys,
            self.local_keys,
            key_bias,
            sink,
            query_start,
            key_start,
        )

    def num_kept(self, num_keys: int) -> int:
        """How many of so many keys a query attends to, if it sees as many."""
        return num_listed(num_keys, self.keep_share, self.keep_count)

    def __getstate__(self) -> Dict[str, Any]:
        """A copy starts without the loss, whose graph belongs to a pass of this one."""
        return {**self.__dict__, "quantization_loss": None}

    @property
    def keep(self) -> Union[int, float]:
        return self.keep_count if self.keep_count >= 0 else self.keep_share

    def extra_repr(self) -> str:
        parts, num_codewords, subspace = self.codebooks.shape
        return (
            f"head_dim={parts * subspace}, keep={self.keep}, num_codewords={num_codewords}, subspace={subspace}, "
            f"sink_keys={self.sink_keys}, local_keys={self.local_keys}"
        )


class SparseAttention(SelfAttention):
    """Multi-head self-attention in which every token attends to the keys most similar to its query, found by product
    quantization.

    Args:
        embed_dim: the number of features, C.
        num_heads: query heads, each of C / num_heads features.
        keep, num_codewords, subspace, sink_keys, local_keys: as in :class:`PQAttention`, which is ``attend``.
        is_causal: whether a token attends only to itself and those before it.
        num_kv_heads: key and value heads, which groups of query heads share; num_heads if None.
        bias: whether the projections have biases.
        sink: learn one logit for each head that is in the softmax and has no value, so that a token can attend to
            nothing. It starts at 0.

    Shapes: forward(input [B, L, C], padding_mask [B, L], start [B]) returns [B, L, C].

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, or num_heads not of num_kv_heads; as :class:`PQAttention`.

    Source: SPT (Gui et al., 2023).

    >>> attention = torchops.nn.SparseAttention(64, 4, keep=1 / 8)
    >>> output = attention(torch.randn(2, 300, 64))
    >>> loss = output.square().mean() + 0.01 * torchops.nn.quantization_loss(attention)
    >>> loss.backward()
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        keep: Union[int, float] = 1 / 8,
        num_codewords: int = 16,
        subspace: int = 8,
        sink_keys: int = 0,
        local_keys: int = 0,
        is_causal: bool = True,
        num_kv_heads: Optional[int] = None,
        bias: bool = True,
        sink: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, bias, sink)
        self.is_causal = is_causal
        self.attend = PQAttention(
            self.head_dim,
            keep=keep,
            num_codewords=num_codewords,
            subspace=subspace,
            sink_keys=sink_keys,
            local_keys=local_keys,
        )

    def forward(self, input: Tensor, padding_mask: Optional[Tensor] = None, start: Optional[Tensor] = None) -> Tensor:
        """Attends.

        Args:
            input: the tokens, [B, L, C].
            padding_mask: bool [B, L], True for padding, which no token attends to.
            start: int64 or int32 [B], the position of the first token of each row, which sink_keys are counted from:
                minus the padding on its left. 0 if None.
        """
        attended = self.attend(
            self.heads(self.q_proj(input)),
            self.heads(self.k_proj(input)),
            self.heads(self.v_proj(input)),
            self.is_causal,
            None,
            self.key_bias(padding_mask),
            self.sink,
            start,
            start,
        )
        return self.output(attended)

    def extra_repr(self) -> str:
        return f"is_causal={self.is_causal}, sink={self.sink is not None}"


def quantization_loss(model: nn.Module) -> Tensor:
    """The sum of the quantization losses of a model's :class:`PQAttention` modules, of their last forward pass.

    SPT adds 0.01 times it to the loss of the task.

    Args:
        model: one that has computed in training mode.

    Returns:
        A number with a gradient to the codebooks, and to queries and keys.

    Raises:
        ValueError: no module of the model has a loss, or one was computed without gradients: under torch.no_grad, or
            in a checkpoint that enters autograd again (use_reentrant=True).

    Source: SPT (Gui et al., 2023).

    >>> model = nn.Sequential(torchops.nn.SparseAttention(32, 2), torchops.nn.SparseAttention(32, 2))
    >>> output = model(torch.randn(1, 64, 32))
    >>> torchops.nn.quantization_loss(model).backward()
    """
    losses = {
        name: module.quantization_loss for name, module in model.named_modules() if isinstance(module, PQAttention)
    }
    return sum_of_losses("quantization_loss", "PQAttention", losses)
