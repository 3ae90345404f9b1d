"""Mixed-span attention (MASFormer) as a module: projections around :func:`torchops.span_attention`."""

from typing import Any, Dict, Iterable, List, Optional

from torch import Tensor

from ..ops.span_attention import span_attention
from ._self_attention import SelfAttention

__all__ = ["SpanAttention", "mixed_span", "visible_pairs"]


class SpanAttention(SelfAttention):
    """Multi-head self-attention in which every token attends to a span of tokens.

    Args:
        embed_dim: the number of features, C.
        num_heads: query heads, each of C / num_heads features.
        block_size, left, right, is_causal: the span, as in :func:`torchops.span_attention`;
            :func:`mixed_span` gives them for each layer of a stack. Full attention if left out.
        num_kv_heads: key and value heads, which groups of query heads share; num_heads if None.
        bias: whether the projections have biases.
        sink: learn one logit for each head that is in the softmax and has no value, so that a token can
            attend to nothing. It starts at 0.

    Shapes: forward(input [B, L, C], padding_mask [B, L], start [B]) returns [B, L, C].

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, or num_heads not of num_kv_heads.

    Source: Zhang et al., MASFormer: Robust Hybrid Attention for Long Sequences, 2023.

    >>> attention = torchops.nn.SpanAttention(64, 4, left=127, right=0, is_causal=True, num_kv_heads=2)
    >>> attention(torch.randn(2, 300, 64)).shape
    torch.Size([2, 300, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        block_size: int = 1,
        left: int = -1,
        right: int = -1,
        is_causal: bool = False,
        num_kv_heads: Optional[int] = None,
        bias: bool = True,
        sink: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, bias, sink)
        self.block_size = block_size
        self.left = left
        self.right = right
        self.is_causal = is_causal

    def forward(self, input: Tensor, padding_mask: Optional[Tensor] = None, start: Optional[Tensor] = None) -> Tensor:
        """Attends.

        Args:
            input: the tokens, [B, L, C].
            padding_mask: bool [B, L], True for padding, which no token attends to.
            start: int64 or int32 [B], the position of the first token of each row, which blocks are counted
                from: minus the padding on its left. 0 if None.
        """
        attended = span_attention(
            self.heads(self.q_proj(input)),
            self.heads(self.k_proj(input)),
            self.heads(self.v_proj(input)),
            self.block_size,
            self.left,
            self.right,
            self.is_causal,
            None,
            self.key_bias(padding_mask),
            self.sink,
            start,
            start,
        )
        return self.output(attended)

    def extra_repr(self) -> str:
        return (
            f"block_size={self.block_size}, left={self.left}, right={self.right}, is_causal={self.is_causal}, "
            f"sink={self.sink is not None}"
        )


def mixed_span(
    num_layers: int,
    full_layers: Iterable[int],
    *,
    block_size: int = 1,
    left: int = 0,
    right: int = 0,
    is_causal: bool = False,
) -> List[Dict[str, Any]]:
    """The spans of a MASFormer stack: full attention in some layers, a local span in all others.

    Args:
        num_layers: how many layers there are.
        full_layers: the indices of the layers with full attention; negative ones count from the end.
        block_size, left, right: the span of the other layers, as in :func:`torchops.span_attention`: each block
            on its own if left and right are left out.
        is_causal: of all layers.

    Returns:
        For each layer its keyword arguments for :class:`SpanAttention` or :func:`torchops.span_attention`.

    Raises:
        ValueError: there is no such layer.

    Source: Zhang et al., MASFormer: Robust Hybrid Attention for Long Sequences, 2023.

    >>> spans = torchops.nn.mixed_span(3, [0], block_size=64, is_causal=True)
    >>> spans[0]
    {'block_size': 1, 'left': -1, 'right': -1, 'is_causal': True}
    >>> spans[1] == spans[2] == {'block_size': 64, 'left': 0, 'right': 0, 'is_causal': True}
    True
    >>> layers = nn.Sequential(*[torchops.nn.SpanAttention(32, 4, **span) for span in spans])
    """
    local = {"block_size": block_size, "left": left, "right": right, "is_causal": is_causal}
    full = {"block_size": 1, "left": -1, "right": -1, "is_causal": is_causal}
    spans = [local] * num_layers
    for layer in full_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"mixed_span: expected full_layers in {-num_layers}..{num_layers - 1}, got {layer}")
        spans[layer] = full
    return [dict(span) for span in spans]


def visible_pairs(length: int, block_size: int = 1, left: int = -1, right: int = -1, is_causal: bool = False) -> int:
    """How many pairs of a query and a key :func:`torchops.span_attention` multiplies in self-attention.

    Time grows with this number. So a stack of layers takes this share of what full attention takes:

    >>> spans = torchops.nn.mixed_span(24, range(4), block_size=1024, is_causal=True)
    >>> full = 24 * torchops.nn.visible_pairs(8192, is_causal=True)
    >>> f"{sum(torchops.nn.visible_pairs(8192, **span) for span in spans) / full:.1%}"
    '27.1%'

    Args:
        length: number of queries, and of keys.
        block_size, left, right, is_causal: the span, as in :func:`torchops.span_attention`.

    Returns:
        The number of pairs, of one head and one row of the batch.
    """
    pairs = 0
    for begin in range(0, length, block_size):
        end = min(begin + block_size, length)
        first = max(begin - left * block_size, 0) if left >= 0 else 0
        last = min(begin + (right + 1) * block_size, length) if right >= 0 else length
        if is_causal:  # query p sees the keys first..p
            pairs += sum(range(begin + 1 - first, end + 1 - first))
        else:
            pairs += (end - begin) * (last - first)
    return pairs
