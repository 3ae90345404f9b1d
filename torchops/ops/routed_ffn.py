"""Routed feed-forward layers and experts of mixtures: for each token some blocks of weights, chosen by a router."""

from typing import Tuple

from torch import Tensor

from .._namespace import operators

__all__ = ["route"]


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
