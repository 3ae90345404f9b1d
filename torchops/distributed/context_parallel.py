"""Attention over a sequence of which every rank holds a slice.

A query and a key meet on the rank of the query. Ranks form a ring: in round s each one computes with what it sees of
the keys of the rank s before it, which their owner sends straight to it while the round before is computed. Windows and
blocks see the keys of a few neighbours, and no other round takes place. Partial results are merged by their softmaxes'
denominators, always in the order of rounds. In the backward keys travel again, and their gradients straight home.
"""

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from .._namespace import operators
from ._calls import agree, check_without_data, described, lowered, members, outside_graphs
from ._context_parallel import ContextParallelAttention
from ._layout import Layout, Span, rounds, seen
from ._rotation import Ring

__all__ = ["sent_keys", "span_attention"]


@outside_graphs
def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int = 1,
    left: int = -1,
    right: int = -1,
    is_causal: bool = False,
    scale: Optional[float] = None,
    key_bias: Optional[Tensor] = None,
    sink: Optional[Tensor] = None,
    zigzag: bool = False,
    group: Optional[dist.ProcessGroup] = None,
) -> Tensor:
    """:func:`torchops.span_attention` over a sequence that is cut among n ranks, each of which has 1/n of the queries
    and of the keys.

    Of the keys only those are sent that some query of another rank sees, each once to each rank that sees it. Equal to
    the operator on the whole sequence but for rounding, and the same bits from run to run. Differentiable in query,
    key, value, key_bias and sink; every rank must go through the backward.

    Args:
        query, key, value: this rank's slices [B, H, L / n, D] along the sequence, as :func:`shard_sequence` cuts them
            and of the same shapes on all ranks. Shapes and dtypes are those of :func:`torchops.span_attention`. Lengths
            of queries and keys may differ: the last query of the last rank lies where the last key does.
        block_size, left, right, is_causal, scale: as there, in positions of the whole sequence.
        key_bias: [B, Lk / n], cut as keys are.
        sink: [Hq], the same on all ranks. Its gradient is that of this rank's queries, like that of every weight: to be
            added up over ranks.
        zigzag: each rank has two slices of 2n, r and 2n - 1 - r, which makes ranks equally busy with causal attention.
        group: the ranks that share the sequence; all for None.

    Returns:
        [B, Hq, Lq / n, Dv], this rank's slice, in query's dtype.

    Raises:
        ValueError: on every rank of the group: what :func:`torchops.span_attention` refuses, an odd length with
            ``zigzag``, shapes, dtypes or options that differ between ranks. They are compared at the first call of a
            configuration, by one collective. On this rank: a group without it.
        RuntimeError: from torch.distributed, where a rank died, or did not call within the group's timeout.

    Source: Ring Attention (Liu et al., 2023); the order of slices, Striped Attention (Brandon et al., 2023) and its
    followers.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> query, key, value = (torchops.distributed.shard_sequence(whole, dim=2) for whole in torch.randn(3, 1, 2, 8, 4))
    >>> torchops.distributed.span_attention(query, key, value, left=3, right=0, is_causal=True).shape
    torch.Size([1, 2, 8, 4])
    >>> dist.destroy_process_group()
    """
    name = "distributed.span_attention"
    group, rank, world_size = members(name, group)
    span = Span(block_size, left, right, is_causal)
    options = {**span._asdict(), "scale": scale}
    if world_size == 1:
        return operators.span_attention(query, key, value, key_bias, sink, **options)
    query, key, value = lowered(query), lowered(key), lowered(value)

    tensors = {"query": query, "key": key, "value": value, "key_bias": key_bias, "sink": sink}

    def check() -> None:
        check_without_data(name, operators.span_attention, tensors, **options)
        for argument, tensor in (("query", query), ("key", key)):
            if zigzag and tensor.shape[2] % 2:
                raise ValueError(f"{name}: expected {argument}'s length to be even, got {tensor.shape[2]}")

    agree(name, group, {**described(tensors), **options, "zigzag": zigzag}, check)
    layout = Layout(world_size, query.shape[2] * world_size, key.shape[2] * world_size, span, zigzag)
    ring = Ring(group, rank, layout)
    return ContextParallelAttention.apply(query, key, value, key_bias, sink, ring, scale)


def sent_keys(
    length: int,
    world_size: int,
    block_size: int = 1,
    left: int = -1,
    right: int = -1,
    is_causal: bool = False,
    zigzag: bool = False,
) -> Tensor:
    """How many keys each rank sends to each other one in a forward pass of :func:`span_attention`.

    A key and its value are Hkv (D + Dv) numbers for each row of the batch, in the dtype of key and value, and one
    number of key_bias where it is given. In a backward pass the same are sent again, and as many numbers come back as
    gradients of those of them that require one. Nothing else is sent.

    Args:
        length: of the whole sequence, a multiple of the slices that it is cut into.
        world_size: the number of ranks, n.
        block_size, left, right, is_causal, zigzag: as in :func:`span_attention`.

    Returns:
        int64 [n, n]: from the owner of the keys (row) to the rank that sees them (column).

    >>> torchops.distributed.sent_keys(16, 4, left=2, right=0, is_causal=True)
    tensor([[0, 2, 0, 0],
            [0, 0, 2, 0],
            [0, 0, 0, 2],
            [0, 0, 0, 0]])
    >>> torchops.distributed.sent_keys(16, 4, is_causal=True, zigzag=True)
    tensor([[0, 2, 2, 2],
            [4, 0, 2, 2],
            [4, 4, 0, 2],
            [4, 4, 4, 0]])
    """
    layout = Layout(world_size, length, length, Span(block_size, left, right, is_causal), zigzag)
    sent = torch.zeros(world_size, world_size, dtype=torch.int64)
    for distance in rounds(layout)[1:]:
        for owner in range(world_size):
            reader = (owner + distance) % world_size
            sent[owner, reader] = sum(len(keys) for keys, _ in seen(layout, reader, owner))
    return sent
