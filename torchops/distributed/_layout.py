"""Which rank holds which positions of a sequence, and which of them others see: integers only.

Intervals of positions are Python ranges.
"""

import functools
from dataclasses import dataclass
from typing import Iterable, List, NamedTuple, Tuple


class Span(NamedTuple):
    """The rule of :func:`torchops.span_attention`, for whole intervals of positions."""

    block_size: int
    left: int
    right: int
    is_causal: bool

    def keys(self, queries: range, keys: range) -> range:
        """Those of the keys that some of the queries see."""
        if not queries or not keys:
            return range(0)
        begin, end = keys.start, keys.stop
        if self.left >= 0:
            begin = max(begin, (queries[0] // self.block_size - self.left) * self.block_size)
        if self.right >= 0:
            end = min(end, (queries[-1] // self.block_size + self.right + 1) * self.block_size)
        if self.is_causal:
            end = min(end, queries.stop)
        return range(begin, end)

    def queries(self, keys: range, queries: range) -> range:
        """Those of the queries that see some of the keys."""
        if not queries or not keys:
            return range(0)
        begin, end = queries.start, queries.stop
        if self.right >= 0:
            begin = max(begin, (keys[0] // self.block_size - self.right) * self.block_size)
        if self.left >= 0:
            end = min(end, (keys[-1] // self.block_size + self.left + 1) * self.block_size)
        if self.is_causal:
            begin = max(begin, keys.start)
        return range(begin, end)


class Piece(NamedTuple):
    """Consecutive keys of one slice, by position, and where the first of them lies in its owner's tensor."""

    keys: range
    offset: int


class Part(NamedTuple):
    """Queries of this rank and keys of a piece, one call of the operator."""

    queries: range  # positions
    offset: int  # of the first query in this rank's tensor
    keys: range  # positions
    piece: int  # which one
    piece_offset: int  # of the first key in it


def union(intervals: Iterable[range]) -> List[range]:
    """In ascending order, none of which touches another."""
    joined: List[range] = []
    for interval in sorted((interval for interval in intervals if interval), key=lambda interval: interval.start):
        if joined and interval.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, interval.stop))
        else:
            joined.append(interval)
    return joined


def slice_numbers(rank: int, world_size: int, zigzag: bool) -> Tuple[int, ...]:
    """The slices of a sequence that a rank holds, in the order of its tensor."""
    return (rank, 2 * world_size - 1 - rank) if zigzag else (rank,)


@dataclass(frozen=True)
class Layout:
    """A sequence cut into slices of equal length, which are dealt to ranks.

    Lengths are those of the whole sequence. The last query lies where the last key does.
    """

    world_size: int
    num_queries: int
    num_keys: int
    span: Span
    zigzag: bool

    def slices(self, rank: int, length: int, start: int = 0) -> List[range]:
        numbers = slice_numbers(rank, self.world_size, self.zigzag)
        size = length // (self.world_size * len(numbers))
        return [range(start + number * size, start + (number + 1) * size) for number in numbers]

    def queries(self, rank: int) -> List[range]:
        return self.slices(rank, self.num_queries, self.num_keys - self.num_queries)


@functools.lru_cache(maxsize=1 << 14)
def seen(layout: Layout, reader: int, owner: int) -> Tuple[Piece, ...]:
    """The keys of the owner that the reader sees."""
    pieces = []
    for number, held in enumerate(layout.slices(owner, layout.num_keys)):
        for keys in union(layout.span.keys(queries, held) for queries in layout.queries(reader)):
            pieces.append(Piece(keys, number * len(held) + keys.start - held.start))
    return tuple(pieces)


@functools.lru_cache(maxsize=1 << 14)
def parts(layout: Layout, reader: int, owner: int) -> Tuple[Part, ...]:
    """What the reader computes with the keys that it sees."""
    found = []
    for number, queries in enumerate(layout.queries(reader)):
        for piece, (held, _) in enumerate(seen(layout, reader, owner)):
            keys = layout.span.keys(queries, held)
            rows = layout.span.queries(keys, queries)
            if rows:
                offset = number * len(queries) + rows.start - queries.start
                found.append(Part(rows, offset, keys, piece, keys.start - held.start))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def rounds(layout: Layout) -> Tuple[int, ...]:
    """The distances s at which some rank sees keys of the rank s before it, counted round the ring; 0 is the first.

    Every rank goes through all of them, so that all post their messages in one order.
    """
    ranks, whole = range(layout.world_size), range(layout.num_keys)
    distances = {0}
    owner_of = {number: rank for rank in ranks for number in slice_numbers(rank, layout.world_size, layout.zigzag)}
    size = max(layout.num_keys // len(owner_of), 1)
    for reader in ranks:
        for queries in layout.queries(reader):
            keys = layout.span.keys(queries, whole)
            if keys:
                slices = range(keys[0] // size, keys[-1] // size + 1)
                distances.update((reader - owner_of[number]) % layout.world_size for number in slices)
    return tuple(sorted(distances))
