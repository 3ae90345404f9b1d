"""Routed feed-forward layers in plain PyTorch."""

from typing import Tuple

import torch
from torch import Tensor


def route(index: Tensor, num_blocks: int) -> Tuple[Tensor, Tensor]:
    block = index.flatten().long()
    block = torch.where((block >= 0) & (block < num_blocks), block, num_blocks)
    order = block.sort(stable=True).indices
    blocks = torch.arange(num_blocks + 1, device=index.device)
    offsets = (block[:, None] < blocks).sum(0)
    return order.int(), offsets.int()
