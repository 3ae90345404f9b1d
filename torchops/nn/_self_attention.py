"""What self-attention modules have alike, whatever a token attends to: projections, heads, padding."""

from typing import List, Optional

import torch
from torch import Tensor, nn

__all__: List[str] = []  # a base of the families' modules


class SelfAttention(nn.Module):
    """Projections to heads and back."""

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: Optional[int] = None, bias: bool = True, sink: bool = False
    ) -> None:
        super().__init__()
        name = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{name}: expected embed_dim to be a multiple of num_heads = {num_heads}, got {embed_dim}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: expected num_heads to be a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}"
            )
        self.head_dim = embed_dim // num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.sink = nn.Parameter(torch.zeros(num_heads)) if sink else None

    def reset_parameters(self) -> None:
        """Of this module alone: projections and what attends have their own."""
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def heads(self, projected: Tensor) -> Tensor:
        """[B, L, H D] -> [B, H, L, D]."""
        return projected.unflatten(-1, [-1, self.head_dim]).transpose(1, 2)

    def key_bias(self, padding_mask: Optional[Tensor]) -> Optional[Tensor]:
        """bool [B, L] -> what hides these keys."""
        if padding_mask is None:
            return None
        return torch.zeros_like(padding_mask, dtype=torch.float32).masked_fill(padding_mask, -float("inf"))

    def output(self, attended: Tensor) -> Tensor:
        """[B, H, L, D] -> [B, L, C]."""
        return self.out_proj(attended.transpose(1, 2).flatten(2))
