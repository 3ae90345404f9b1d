"""A small byte-level decoder whose layers attend each to a span of their own, or to the keys most similar to each
query: how torchops.span_attention and torchops.nn.PQAttention go into a model.

It is a plain pre-norm transformer with rotary positions; only the call of attention differs. Spans have no
weights, so a model trained with full attention takes any mix of spans; codebooks are fitted to it. Everything compiles
with torch.jit.script and exports with torch.export.
"""

import copy
from collections.abc import Sequence
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchops
from torchops.reference.span_attention import visible


class Span(nn.Module):
    """Causal attention to a span of keys, as :func:`torchops.span_attention` has it."""

    def __init__(self, block_size: int = 1, left: int = -1, right: int = -1, is_causal: bool = True) -> None:
        super().__init__()
        self.block_size = block_size
        self.left = left
        self.right = right
        self.is_causal = is_causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key and value [B, H, L, D] -> [B, H, L, D]."""
        return torchops.span_attention(query, key, value, self.block_size, self.left, self.right, self.is_causal)

    def visible_pairs(self, length: int) -> int:
        return torchops.nn.visible_pairs(length, self.block_size, self.left, self.right, self.is_causal)


class SpanByTorch(Span):
    """The same by torch's own operator, to compare with. It knows full attention; a shorter span is a mask over
    all pairs of ``length`` symbols."""

    def __init__(self, length: int, block_size: int = 1, left: int = -1, right: int = -1, is_causal: bool = True):
        super().__init__(block_size, left, right, is_causal)
        self.mask = None
        if left != -1 or right != -1:
            shape = torch.empty(1, 1, length, 0)
            self.mask = visible(shape, shape, block_size, left, right, is_causal)[0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        is_causal = self.is_causal and self.mask is None
        return F.scaled_dot_product_attention(query, key, value, self.mask, is_causal=is_causal)


class Similar(nn.Module):
    """Causal attention to the keys most similar to each query (SPT)."""

    def __init__(self, head_dim: int, keep: float) -> None:
        super().__init__()
        self.attend = torchops.nn.PQAttention(head_dim, keep=keep)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key and value [B, H, L, D] -> [B, H, L, D]."""
        return self.attend(query, key, value, is_causal=True)

    def visible_pairs(self, length: int) -> int:
        return sum(min(query + 1, self.attend.num_kept(length)) for query in range(length))


def rotary_angles(length: int, dim: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Cosines and sines [length, dim / 2] by which a position turns pairs of features."""
    frequency = 10000.0 ** -(torch.arange(dim // 2, device=device) / (dim // 2))
    angle = torch.arange(length, device=device).unsqueeze(1) * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns features of queries or keys [B, H, L, D], so that their products depend on distances."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def shift_half(x: Tensor) -> Tensor:
    """Takes half of the features [B, L, C] from the symbol before, so that attention compares pairs of
    symbols: one byte tells little, and this saves a layer of learning to look at the one before."""
    stays, moves = x.chunk(2, dim=-1)
    return torch.cat([stays, F.pad(moves, (0, 0, 1, 0))[:, :-1]], -1)


class Layer(nn.Module):
    """Attention and MLP.

    Args:
        dim: C.
        num_heads: H.
        attend: what every head does with its queries, keys and values.
    """

    def __init__(self, dim: int, num_heads: int, attend: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attend = attend
        self.projection = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        qkv = self.qkv(shift_half(self.attention_norm(x))).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, L, D]
        attended = self.attend(rotate(query, cosine, sine), rotate(key, cosine, sine), value)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Predicts the next byte.

    Args:
        vocabulary: how many symbols there are.
        dim, num_heads: C, H.
        attention: what each layer does with its queries, keys and values: :class:`Span` or the like.

    Shapes: forward(symbols int64 [B, L]) -> logits [B, L, vocabulary].
    """

    def __init__(self, vocabulary: int, dim: int, num_heads: int, attention: Sequence[nn.Module]) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.embedding = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(Layer(dim, num_heads, attend) for attend in attention)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in self.layers:  # at first a layer adds nothing
            nn.init.zeros_(layer.projection.weight)
            nn.init.zeros_(layer.mlp[-1].weight)

    def forward(self, symbols: Tensor) -> Tensor:
        cosine, sine = rotary_angles(symbols.shape[1], self.head_dim, symbols.device)
        x = self.embedding(symbols)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.head(self.norm(x))

    def with_attention(self, attention: Sequence[nn.Module]) -> "Decoder":
        """A copy with other attention in its layers, and the same weights."""
        model = copy.deepcopy(self)
        for layer, attend in zip(model.layers, attention, strict=True):
            layer.attend = attend
        return model
