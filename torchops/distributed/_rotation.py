"""Keys that travel between ranks while attention to others is computed, and their gradients, which travel back."""

from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence, Tuple

import torch.distributed as dist
from torch import Tensor

from ._layout import Layout, Piece, rounds, seen
from ._merging import accumulated_zeros


@dataclass(frozen=True)
class Ring:
    """This rank's place among those that share a sequence."""

    group: dist.ProcessGroup
    rank: int
    layout: Layout

    def reader(self, distance: int) -> int:
        return (self.rank + distance) % self.layout.world_size

    def owner(self, distance: int) -> int:
        return (self.rank - distance) % self.layout.world_size


class Transfer:
    """Messages to one rank and from one, under way until they are waited for.

    Args:
        outgoing: tensors of each piece, contiguous.
        incoming: buffers for those that come.
    """

    def __init__(
        self, ring: Ring, outgoing: List[List[Tensor]], destination: int, incoming: List[List[Tensor]], source: int
    ) -> None:
        self.outgoing = outgoing  # to live until it is sent
        self.incoming = incoming
        operations = [
            dist.P2POp(op, tensor, group=ring.group, group_peer=peer)
            for op, pieces, peer in ((dist.isend, outgoing, destination), (dist.irecv, incoming, source))
            for piece in pieces
            for tensor in piece
            if tensor.numel()
        ]
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> List[List[Tensor]]:
        for work in self.works:
            work.wait()
        return self.incoming


def _cut(tensors: Sequence[Tensor], pieces: Sequence[Piece]) -> List[List[Tensor]]:
    return [[tensor.narrow(2, offset, len(keys)) for tensor in tensors] for keys, offset in pieces]


def _buffers(like: Sequence[Tensor], pieces: Sequence[Piece]) -> List[List[Tensor]]:
    return [[tensor.new_empty(*tensor.shape[:2], len(keys), tensor.shape[3]) for tensor in like] for keys, _ in pieces]


def rotate(ring: Ring, tensors: Sequence[Tensor]) -> Iterator[Tuple[int, List[List[Tensor]]]]:
    """Goes round the ring: yields a distance s and what this rank sees of the tensors of the rank s before it.

    They come straight from their owner, while the round before is computed.

    Args:
        tensors: what goes with keys, each [B, heads, Lk / n, features].
    """
    layout, rank = ring.layout, ring.rank

    def fetch(distance: int) -> Transfer:
        reader, owner = ring.reader(distance), ring.owner(distance)
        outgoing = [[tensor.contiguous() for tensor in piece] for piece in _cut(tensors, seen(layout, reader, rank))]
        return Transfer(ring, outgoing, reader, _buffers(tensors, seen(layout, rank, owner)), owner)

    pieces = _cut(tensors, seen(layout, rank, rank))
    distances = rounds(layout)
    for number, distance in enumerate(distances, start=1):
        transfer = fetch(distances[number]) if number < len(distances) else None
        yield distance, pieces
        if transfer is not None:
            pieces = transfer.wait()


class GradientsOfKeys:
    """The sums of all gradients to what goes with this rank's keys, in the order of rounds.

    Args:
        tensors: those of :func:`rotate` that require a gradient.
    """

    def __init__(self, ring: Ring, tensors: List[Tensor]) -> None:
        self.ring = ring
        self.tensors = tensors
        self.sums = [accumulated_zeros(tensor) for tensor in tensors]
        self.reader = ring.rank
        self.transfer: Optional[Transfer] = None

    def add(self, distance: int, gradients: List[List[Tensor]]) -> None:
        """Takes gradients of a round's pieces and sends them to their owner, for whom they are rounded to the dtype of
        the keys. What comes in return is added up while the next round is computed."""
        if distance == 0:
            self._add_to_sums(self.ring.rank, gradients)
        elif self.tensors:
            self._finish()
            reader, owner = self.ring.reader(distance), self.ring.owner(distance)
            outgoing = [
                [gradient.to(tensor.dtype) for gradient, tensor in zip(of_piece, self.tensors, strict=True)]
                for of_piece in gradients
            ]
            incoming = _buffers(self.tensors, seen(self.ring.layout, reader, self.ring.rank))
            self.reader, self.transfer = reader, Transfer(self.ring, outgoing, owner, incoming, reader)

    def result(self) -> List[Tensor]:
        self._finish()
        return [sum.to(tensor.dtype) for sum, tensor in zip(self.sums, self.tensors, strict=True)]

    def _finish(self) -> None:
        if self.transfer is not None:
            self._add_to_sums(self.reader, self.transfer.wait())
            self.transfer = None

    def _add_to_sums(self, reader: int, gradients: List[List[Tensor]]) -> None:
        rows_of_pieces = _cut(self.sums, seen(self.ring.layout, reader, self.ring.rank))
        for rows, of_piece in zip(rows_of_pieces, gradients, strict=True):
            for row, gradient in zip(rows, of_piece, strict=True):
                row.add_(gradient)
