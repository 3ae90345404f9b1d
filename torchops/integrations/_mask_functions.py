"""What a mask function of transformers lets a query see, as a span.

transformers describes attention by a function of four indices, (row, head, query, key) -> bool. :func:`read`
calls it once with symbols in their place. An operation on them either means the same for all positions, or is
unknown and ends the reading: what comes out holds for every length. Then the function is asked about numbers,
next to the bounds of what was read and in a few other places, and has to agree.
"""

from types import CodeType, FunctionType
from typing import Any, Callable, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing


class Span(NamedTuple):
    """Arguments of span_attention."""

    block_size: int = 1
    left: int = -1
    right: int = -1
    is_causal: bool = False

    @property
    def is_full(self) -> bool:
        """All keys, or all but those behind a query."""
        return self == Span(is_causal=self.is_causal)


class Read(NamedTuple):
    span: Span
    start: Optional[Tensor]
    """[B], the position that blocks are counted from, if it is not 0."""


def read(mask_function: Callable, batch_size: int, length: int) -> Optional[Read]:
    """What mask_function says, or None if that is no span. Positions are less than length."""
    try:
        found = mask_function(Row(), 0, Position(1, 0), Position(0, 1)).read()
    except Exception:  # whatever the function does with symbols, it is not one of those that are understood
        return None
    return found if agrees(mask_function, found, batch_size, length) else None


def expect(known: bool) -> None:
    if not known:
        raise NotImplementedError


# ---- symbols ----------------------------------------------------------------------------------------

Interval = Tuple[Optional[int], Optional[int]]  # both ends included; None is infinite
EVERYTHING: Interval = (None, None)
NOTHING: Interval = (0, -1)


class Row:
    """The index of a row of the batch. It looks up one number of each row, in a tensor [B]."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "Start":
        expect(function is Tensor.__getitem__ and isinstance(args[1], cls) and args[0].dim() == 1)
        return Start(args[0])


class Start:
    """One number of each row, of those in a tensor [B]."""

    def __init__(self, of_rows: Tensor) -> None:
        self.of_rows = of_rows

    def __bool__(self) -> bool:
        raise NotImplementedError


class Position:
    """query * floor((q - start) / unit) + key * floor((k - start) / unit) + constant
    for the positions q of the query and k of the key."""

    def __init__(self, query: int, key: int, constant: int = 0, unit: int = 1, start: Optional[Tensor] = None) -> None:
        self.query = query
        self.key = key
        self.constant = constant
        self.unit = unit
        self.start = start

    def new_ones(self, *args: Any, **kwargs: Any) -> "Rule":
        return Rule(EVERYTHING)

    def new_zeros(self, *args: Any, **kwargs: Any) -> "Rule":
        return Rule(NOTHING)

    def __bool__(self) -> bool:
        raise NotImplementedError

    def __neg__(self) -> "Position":
        return Position(-self.query, -self.key, -self.constant, self.unit, self.start)

    def __add__(self, other: Any) -> "Position":
        if isinstance(other, Position):
            expect(self.unit == other.unit and self.start is other.start)
            query, key = self.query + other.query, self.key + other.key
            return Position(query, key, self.constant + other.constant, self.unit, self.start)
        expect(isinstance(other, (int, torch.SymInt)))
        return Position(self.query, self.key, self.constant + other, self.unit, self.start)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Position":
        if isinstance(other, Start):
            expect(self.unit == 1 and self.start is None and self.query + self.key == 1)
            return Position(self.query, self.key, self.constant, 1, other.of_rows)
        return self + -other

    def __rsub__(self, other: Any) -> "Position":
        return -self + other

    def __floordiv__(self, size: int) -> "Position":
        expect(isinstance(size, (int, torch.SymInt)) and size > 0)
        expect(self.unit == 1 and self.constant == 0 and self.query + self.key == 1)
        return Position(self.query, self.key, 0, size, self.start)

    def __abs__(self) -> "Magnitude":
        return Magnitude(self)

    def __ge__(self, other: Any) -> "Rule":
        return (self - other).at_least_zero()

    def __gt__(self, other: Any) -> "Rule":
        return (self - other - 1).at_least_zero()

    def __le__(self, other: Any) -> "Rule":
        return (-(self - other)).at_least_zero()

    def __lt__(self, other: Any) -> "Rule":
        return (-(self - other) - 1).at_least_zero()

    def __eq__(self, other: Any) -> Any:
        return (self >= other) & (self <= other)

    def __ne__(self, other: Any) -> Any:
        raise NotImplementedError

    def at_least_zero(self) -> "Rule":
        if (self.query, self.key) == (1, -1):
            return Rule.of_distance((-self.constant, None), self.unit, self.start)
        if (self.query, self.key) == (-1, 1):
            return Rule.of_distance((None, self.constant), self.unit, self.start)
        # No position is negative. What is left is known where it depends on nothing else.
        expect(self.query >= 0 and self.key >= 0 and self.constant >= 0 and self.start is None)
        return Rule(EVERYTHING)


class Magnitude:
    """The absolute value of a difference of positions."""

    def __init__(self, of: Position) -> None:
        self.of = of

    def __bool__(self) -> bool:
        raise NotImplementedError

    def __le__(self, reach: Any) -> "Rule":
        return (self.of <= reach) & (self.of >= -reach)

    def __lt__(self, reach: Any) -> "Rule":
        return (self.of < reach) & (self.of > -reach)


class Rule:
    """Which keys a query sees: the distance back to them lies in an interval, in tokens and in blocks."""

    device = torch.device("cpu")

    def __init__(
        self, tokens: Interval, blocks: Interval = EVERYTHING, unit: int = 1, start: Optional[Tensor] = None
    ) -> None:
        self.tokens = tokens
        self.blocks = blocks
        self.unit = unit
        self.start = start

    @staticmethod
    def of_distance(interval: Interval, unit: int, start: Optional[Tensor]) -> "Rule":
        return Rule(interval) if unit == 1 else Rule(EVERYTHING, interval, unit, start)

    def to(self, device: Any) -> "Rule":
        return self

    def __bool__(self) -> bool:
        raise NotImplementedError

    def __and__(self, other: Any) -> "Rule":
        other = as_rule(other)
        blocks = other if self.blocks == EVERYTHING else self
        expect(EVERYTHING in (self.blocks, other.blocks) or self.same_blocks(other))
        return Rule(both(self.tokens, other.tokens), both(self.blocks, other.blocks), blocks.unit, blocks.start)

    def __or__(self, other: Any) -> "Rule":
        other = as_rule(other)
        if self.is_nothing() or other.is_everything():
            return other
        if other.is_nothing() or self.is_everything():
            return self
        if self.blocks == other.blocks == EVERYTHING:
            return Rule(either(self.tokens, other.tokens))
        expect(self.tokens == other.tokens and self.same_blocks(other))
        return Rule(self.tokens, either(self.blocks, other.blocks), self.unit, self.start)

    def same_blocks(self, other: "Rule") -> bool:
        return self.unit == other.unit and self.start is other.start

    def is_everything(self) -> bool:
        return self.tokens == self.blocks == EVERYTHING

    def is_nothing(self) -> bool:
        return is_empty(self.tokens) or is_empty(self.blocks)

    def read(self) -> Read:
        if self.blocks == EVERYTHING:
            left, right = reaches(self.tokens)
            return Read(Span(1, left, -1 if right == 0 else right, right == 0), None)
        left, right = reaches(self.blocks)
        expect(self.tokens in (EVERYTHING, (0, None)))
        return Read(Span(self.unit, left, right, self.tokens[0] == 0), self.start)


def as_rule(value: Any) -> Rule:
    if isinstance(value, Tensor):
        expect(value.dtype == torch.bool and value.dim() == 0 and not is_tracing(value))
        value = bool(value)
    if isinstance(value, bool):
        return Rule(EVERYTHING if value else NOTHING)
    expect(isinstance(value, Rule))
    return value


def is_empty(interval: Interval) -> bool:
    low, high = interval
    return low is not None and high is not None and low > high


def both(one: Interval, other: Interval) -> Interval:
    lows = [low for low in (one[0], other[0]) if low is not None]
    highs = [high for high in (one[1], other[1]) if high is not None]
    return max(lows) if lows else None, min(highs) if highs else None


def either(one: Interval, other: Interval) -> Interval:
    """Of two that are not empty, and have no gap between them."""
    for before, after in ((one, other), (other, one)):
        expect(before[1] is None or after[0] is None or after[0] <= before[1] + 1)
    low = None if one[0] is None or other[0] is None else min(one[0], other[0])
    high = None if one[1] is None or other[1] is None else max(one[1], other[1])
    return low, high


def reaches(distance: Interval) -> Tuple[int, int]:
    """left and right of a span. Its query sees its own position."""
    low, high = distance
    expect((low is None or low <= 0) and (high is None or high >= 0))
    return -1 if high is None else high, -1 if low is None else -low


# ---- numbers ----------------------------------------------------------------------------------------

_agreed: Set[Any] = set()


def agrees(mask_function: Callable, found: Read, batch_size: int, length: int) -> bool:
    """Whether the function says of numbers what was read.

    Asked are the first and last rows; queries at the first positions, in the middle and at the end, and about
    the first borders of blocks; keys at all of these positions, and on both sides of the bounds of each query.
    A function of the same code and the same constants is asked again only where positions reach a higher
    power of two. Nothing is asked while a graph is traced: then there are no numbers.
    """
    start = torch.zeros(batch_size, dtype=torch.int64) if found.start is None else found.start
    if is_tracing(start):
        return True
    end = 1 << max(length - 1, 1).bit_length()
    try:
        asked = (constants(mask_function), found.span, end)
    except NotImplementedError:
        asked = None
    if asked in _agreed:
        return True
    rows, queries, keys = (question.to(start.device) for question in questions(found.span, batch_size, end))
    try:
        answer = mask_function(rows, torch.zeros_like(rows), queries, keys)
        agreed = bool((answer == sees(found.span, start[rows], queries, keys)).all())
    except Exception:
        return False
    if agreed and asked is not None:
        _agreed.add(asked)
    return agreed


def questions(span: Span, batch_size: int, end: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Rows [R, 1, 1, 1], queries [1, 1, Q, 1], keys [1, 1, Q, K]."""
    size, left, right, _ = span
    places = torch.tensor(
        [0, 1, 2, 3, 5, 7, size - 1, size, size + 1, 2 * size, end // 2, end // 2 + 1, end - 2, end - 1]
    )
    queries = places[(places >= 0) & (places < end)].unique()[:, None]
    bounds: List[int] = [-1, 0, 1]
    for reach in (left, right):
        if reach >= 0:
            bounds += [sign * (reach * size + near) for sign in (-1, 1) for near in (-1, 0, 1)]
    keys = torch.cat([queries[:, 0].expand(len(queries), -1), queries + torch.tensor(bounds)], 1)
    if size > 1:
        borders = queries // size * size
        keys = torch.cat([keys, borders - 1, borders, borders + size - 1, borders + size], 1)
    rows = torch.tensor([0, batch_size - 1]).unique()
    return rows[:, None, None, None], queries[None, None], keys.clamp(0, end - 1)[None, None]


def sees(span: Span, start: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    size, left, right, is_causal = span
    back = (queries - start).div(size, rounding_mode="floor") - (keys - start).div(size, rounding_mode="floor")
    seen = torch.ones_like(back, dtype=torch.bool)
    if left >= 0:
        seen &= back <= left
    if right >= 0:
        seen &= back >= -right
    return seen & (keys <= queries) if is_causal else seen


def constants(value: Any) -> Any:
    """What tells functions apart: their code, and what it holds. Tensors are not looked into."""
    if isinstance(value, FunctionType):
        cells = tuple(constants(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, cells, constants(value.__defaults__)
    if isinstance(value, tuple):
        return tuple(constants(one) for one in value)
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, (int, str, float, CodeType, type(None))):
        return value
    raise NotImplementedError
