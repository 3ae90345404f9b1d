"""Attention in causal windows and blocks by means of PyTorch's own attention."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class CausalSpan(ABC):
    """Which keys a query sees: those from the first one up to itself, as many queries as keys."""

    @abstractmethod
    def first(self, query: Tensor) -> Tensor:
        """The position of the first key that the query at a position sees."""

    @abstractmethod
    def mask_mod(self) -> MaskMod:
        """FlexAttention's form of the same: a function of batch, head, query and key."""

    def mask(self, tokens: int, device: torch.device) -> Tensor:
        """bool [L, L], True where a query sees a key."""
        position = torch.arange(tokens, device=device)
        return (position[:, None] >= position) & (position >= self.first(position)[:, None])

    def num_pairs(self, tokens: int) -> int:
        position = torch.arange(tokens)
        return int((position + 1 - self.first(position)).sum())

    def block_mask(self, tokens: int, device: torch.device, block: int = 128) -> BlockMask:
        """FlexAttention's blocks. create_block_mask would look at each of the L^2 pairs."""
        first_query = torch.arange(0, tokens, block)
        last_query = (first_query + block).clamp(max=tokens) - 1
        column = torch.arange(len(first_query))
        visited = (column >= self.first(first_query)[:, None] // block) & (column <= last_query[:, None] // block)
        # All queries of a row of blocks see the keys from the last query's first to the first query itself.
        full = (column * block >= self.first(last_query)[:, None]) & ((column + 1) * block - 1 <= first_query[:, None])

        def numbers_and_indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
            indices = chosen.int().argsort(dim=1, descending=True, stable=True).int()
            return chosen.sum(1, dtype=torch.int32).to(device)[None, None], indices.to(device)[None, None]

        return BlockMask.from_kv_blocks(
            *numbers_and_indices(visited & ~full),
            *numbers_and_indices(full),
            BLOCK_SIZE=block,
            mask_mod=self.mask_mod(),
            seq_lengths=(tokens, tokens),
        )


@dataclass(frozen=True)
class Window(CausalSpan):
    """A query sees itself and the size - 1 keys before it."""

    size: int

    def first(self, query: Tensor) -> Tensor:
        return (query - self.size + 1).clamp(min=0)

    def mask_mod(self) -> MaskMod:
        size = self.size
        return lambda batch, head, query, key: (query >= key) & (query - key < size)


@dataclass(frozen=True)
class Block(CausalSpan):
    """A query sees itself and the keys before it in its own block."""

    size: int

    def first(self, query: Tensor) -> Tensor:
        return query // self.size * self.size

    def mask_mod(self) -> MaskMod:
        size = self.size
        return lambda batch, head, query, key: (query >= key) & (query // size == key // size)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, grouped: bool = False) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def masked_sdpa(mask: Tensor | None, grouped: bool = False) -> Attention:
    """mask: bool or floating, broadcast to [B, H, Lq, Lk]; None: all keys are seen."""
    return lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def reshaped_sdpa(block_size: int) -> Attention:
    """Blocks as heads of their own: causal attention on [B, H L/b, b, D], which is a view of [B, H, L, D]. The
    length is a multiple of the block."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query_blocks, key_blocks, value_blocks = (
            x.unflatten(2, (-1, block_size)).flatten(1, 2) for x in (query, key, value)
        )
        output = scaled_dot_product_attention(query_blocks, key_blocks, value_blocks, is_causal=True)
        return output.unflatten(1, (query.shape[1], -1)).flatten(2, 3)

    return attend


def compiled_flex_attention(span: CausalSpan, tokens: int, device: torch.device, grouped: bool = False) -> Attention:
    """FlexAttention, compiled for these shapes at the first call."""
    # One function is compiled for a few shapes only, and then silently runs uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = span.block_mask(tokens, device)
    return lambda query, key, value: compiled(query, key, value, block_mask=block_mask, enable_gqa=grouped)
