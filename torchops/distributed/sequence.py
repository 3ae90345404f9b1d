"""Sequences cut into the slices that ranks hold."""

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from ._calls import members
from ._layout import slice_numbers

__all__ = ["gather_sequence", "shard_sequence"]


def shard_sequence(input: Tensor, dim: int, zigzag: bool = False, group: Optional[dist.ProcessGroup] = None) -> Tensor:
    """This rank's slice of a sequence that every rank has, or its two slices.

    Of n ranks, rank r gets the r-th of n slices. With ``zigzag`` it gets slices r and 2n - 1 - r of 2n, one behind the
    other: then all ranks have equally many visible pairs under causal attention. Whatever goes by positions is cut in
    the same way: position ids, padding masks, labels. Differentiable.

    Args:
        input: the whole sequence.
        dim: the sequence's dimension, whose length is a multiple of n, or of 2n.
        zigzag: see above.
        group: the ranks; all for None.

    Returns:
        input with 1/n of the length in ``dim``, contiguous.

    Raises:
        ValueError: a length that does not divide, or a group without this process.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> torchops.distributed.shard_sequence(torch.arange(6), dim=0, zigzag=True)
    tensor([0, 1, 2, 3, 4, 5])
    >>> dist.destroy_process_group()
    """
    _, rank, world_size = members("shard_sequence", group)
    numbers = slice_numbers(rank, world_size, zigzag)
    num_slices = world_size * len(numbers)
    if input.shape[dim] % num_slices:
        raise ValueError(
            f"shard_sequence: expected input's length in dimension {dim} to be a multiple of {num_slices}, got"
            f" {input.shape[dim]}"
        )
    size = input.shape[dim] // num_slices
    return torch.cat([input.narrow(dim, number * size, size) for number in numbers], dim)


def gather_sequence(input: Tensor, dim: int, zigzag: bool = False, group: Optional[dist.ProcessGroup] = None) -> Tensor:
    """The whole sequence from the slices that :func:`shard_sequence` made; for looking at, it has no gradient.

    Args:
        input: this rank's part, of the same shape on all ranks.
        dim, zigzag, group: as in :func:`shard_sequence`.

    Returns:
        input with n times the length in ``dim``, the same on all ranks.

    Raises:
        ValueError: an odd length with ``zigzag``, or a group without this process.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> torchops.distributed.gather_sequence(torch.arange(6), dim=0)
    tensor([0, 1, 2, 3, 4, 5])
    >>> dist.destroy_process_group()
    """
    group, _, world_size = members("gather_sequence", group)
    slices_of_rank = 2 if zigzag else 1
    if input.shape[dim] % slices_of_rank:
        raise ValueError(
            f"gather_sequence: expected input's length in dimension {dim} to be even, got {input.shape[dim]}"
        )
    of_ranks = [input.new_empty(input.shape) for _ in range(world_size)]
    dist.all_gather(of_ranks, input.detach().contiguous(), group=group)
    slices = {
        number: piece
        for rank, of_rank in enumerate(of_ranks)
        for number, piece in zip(
            slice_numbers(rank, world_size, zigzag), of_rank.chunk(slices_of_rank, dim), strict=True
        )
    }
    return torch.cat([slices[number] for number in range(len(slices))], dim)
