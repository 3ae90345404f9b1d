"""Routed feed-forward layers whose blocks are dealt to ranks, as modules."""

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.routed_ffn import RoutedFFN
from ._calls import members
from .expert_parallel import routed_ffn

__all__ = ["ExpertParallelFFN"]


class ExpertParallelFFN(nn.Module):
    """A :class:`torchops.nn.RoutedFFN` of which this rank keeps G / n blocks, and the router whole.

    Ranks start from the same layer: seeded alike, loaded from one file, or broadcast. Then router, b2 and the LoRA
    factors that all blocks share are averaged over ranks like other weights (DistributedDataParallel); weights of
    blocks are not, for they have the gradients of all ranks' tokens already: of the sum of all ranks' losses.
    :func:`torchops.nn.balance_loss` is that of this rank's tokens.

    Args:
        layer: gives its parameters away: what stays in it are this rank's blocks.
        replicated: all ranks have the same tokens, see :func:`routed_ffn`.
        group: the ranks that share the blocks; all for None.

    Attributes:
        layer: the layer, with this rank's blocks.

    Shapes: forward(input [..., d]) returns [..., d].

    Raises:
        ValueError: a number of blocks that is no multiple of the number of ranks, or a group without this process; in
            the forward pass, as :func:`routed_ffn`.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> layer = torchops.distributed.ExpertParallelFFN(torchops.nn.RoutedFFN(64, 256, num_blocks=4))
    >>> layer(torch.randn(10, 64)).shape
    torch.Size([10, 64])
    >>> dist.destroy_process_group()
    """

    def __init__(self, layer: RoutedFFN, replicated: bool = False, group: Optional[dist.ProcessGroup] = None) -> None:
        super().__init__()
        group, rank, world_size = members("ExpertParallelFFN", group)
        num_blocks = layer.w1.shape[0]
        if num_blocks % world_size:
            raise ValueError(
                f"ExpertParallelFFN: expected layer to have a multiple of {world_size} blocks, got {num_blocks}"
            )
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.dim() > 1 and parameter.shape[0] == num_blocks:
                share = parameter.detach().chunk(world_size)[rank].clone(memory_format=torch.contiguous_format)
                setattr(layer, name, nn.Parameter(share, parameter.requires_grad))
        self.layer = layer
        self.replicated = replicated
        self.group = group

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        index, gates = layer.router(input)
        return routed_ffn(
            input,
            index,
            gates,
            layer.w1,
            layer.w2,
            layer.b1,
            layer.b2,
            layer.w_gate,
            layer.lora_a1,
            layer.lora_b1,
            layer.lora_a2,
            layer.lora_b2,
            layer.activation,
            layer.glu,
            layer.alpha,
            layer.limit,
            layer.up_offset,
            layer.gate_at,
            layer.lora_scale,
            layer.recompute,
            self.replicated,
            self.group,
        )

    def extra_repr(self) -> str:
        return f"ranks={dist.get_world_size(self.group)}, replicated={self.replicated}"
