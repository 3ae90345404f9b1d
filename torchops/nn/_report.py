"""What the conversion of a model did, in a terminal of 80 columns: a table, and progress until it is there."""

import math
import re
from typing import Any, ClassVar, Dict, Hashable, Iterator, List, Sequence, Tuple, TypeVar

__all__: List[str] = []  # for the reports of factorize_ and route_ffn_

Layer = TypeVar("Layer")

WIDTH = 80
GAP = 2  # between columns


class Table:
    """What the conversion of a model did: ``rows()`` as data, and printed in fewer columns and lines."""

    COLUMNS: ClassVar[Tuple[str, ...]]
    PRINTED: ClassVar[Tuple[str, ...]]

    layers: Sequence[Any]
    left: Sequence[Tuple[str, str]]  # the layers that stay dense, and the reason of each

    def rows(self) -> List[List[str]]:
        """The cells of COLUMNS, for every layer; the last row is the total."""
        raise NotImplementedError

    def lines(self) -> List[List[str]]:
        """The cells of PRINTED, for all layers that are alike together; the last line is the total."""
        raise NotImplementedError

    def remarks(self) -> List[str]:
        """A line for the layers that stay dense for one reason and whose names differ in numbers alone."""
        names, reasons = [name for name, _ in self.left], [reason for _, reason in self.left]
        return [f"left dense: {name} ({reasons[positions[0]]})" for name, positions in together(names, reasons)]

    def _groups(self, kinds: Sequence[Hashable]) -> List[Tuple[str, List[Any]]]:
        """Layers of one kind whose names differ in numbers alone, with one name for them."""
        found = together([layer.name for layer in self.layers], kinds)
        return [(name, [self.layers[position] for position in positions]) for name, positions in found]

    def _fitting(self) -> List[List[str]]:
        """The lines below their header, without columns that are empty, with names as long as there is room for."""
        lines = self.lines()
        filled = [index for index in range(len(self.PRINTED)) if any(line[index] for line in lines)]
        lines = [[line[index] for index in filled] for line in (list(self.PRINTED), *lines)]
        others = [max(len(line[column]) for line in lines) for column in range(1, len(filled))]
        room = WIDTH - sum(others) - GAP * len(others)
        names = shortened([line[0] for line in lines], room)
        return [[name, *line[1:]] for name, line in zip(names, lines, strict=True)]

    def __str__(self) -> str:
        lines = self._fitting()
        first, *others = (max(len(line[column]) for line in lines) for column in range(len(lines[0])))
        gap = " " * GAP
        text = [
            gap.join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
            for line in lines
        ]
        return "\n".join(text + self.remarks())

    def __rich__(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        header, *lines, total = self._fitting()
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for index, column in enumerate(header):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for line in lines:
            table.add_row(*map(escape, line))
        table.add_section()
        table.add_row(*total, style="bold")
        return Group(table, *(escape(line) for line in self.remarks()))


def together(names: Sequence[str], kinds: Sequence[Hashable]) -> Iterator[Tuple[str, List[int]]]:
    """Layers of one kind whose names differ in numbers alone, with one name for them, and their positions.

    >>> list(together(["layer.0.query", "head", "layer.1.query", "layer.3.query"], [1, 1, 1, 1]))
    [('layer.0-1,3.query', [0, 2, 3]), ('head', [1])]
    """
    groups: Dict[Tuple[Tuple[str, ...], Hashable], List[int]] = {}
    for position, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        pattern = tuple("" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((pattern, kind), []).append(position)
    for (pattern, _), positions in groups.items():
        columns = zip(*(names[position].split(".") for position in positions), strict=True)
        numbers = [
            sorted(set(map(int, column))) if not part else [] for part, column in zip(pattern, columns, strict=True)
        ]
        if math.prod(len(found) for found in numbers if found) == len(positions):
            yield ".".join(part or _ranges(found) for part, found in zip(pattern, numbers, strict=True)), positions
        else:
            yield from ((names[position], [position]) for position in positions)


def _ranges(numbers: List[int]) -> str:
    """Ascending ones: "0-3,7"."""
    runs: List[List[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def shortened(names: Sequence[str], room: int) -> List[str]:
    """Names in so many columns, without parts behind the first few: none, or as many as tell them apart.

    >>> shortened(["encoder.block.0-5.attention.query", "head"], 28)
    ['…block.0-5.attention.query', 'head']
    >>> shortened(["encoder.block.0-5.attention.query", "decoder.block.0-5.attention.query"], 28)
    ['encoder…0-5.attention.query', 'decoder…0-5.attention.query']
    """
    for kept in range(3):
        found = [_shorter(name, room, kept) for name in names]
        if len(set(found)) == len(names):
            return found
    return [_shorter(name, room, 0) for name in names]


def _shorter(name: str, room: int, kept: int) -> str:
    parts = name.split(".")
    dropped = 0
    while len(name) > room and kept + dropped + 1 < len(parts):
        dropped += 1
        name = ".".join(parts[:kept]) + "…" + ".".join(parts[kept + dropped :])
    return name if len(name) <= room else "…" + name[len(name) - room + 1 :]


def spread(values: Sequence[float]) -> str:
    """From the smallest to the largest to three digits; nothing where they are NaN."""
    if math.isnan(values[0]):
        return ""
    least, most = (f"{value:.3f}" for value in (min(values), max(values)))
    return least if least == most else re.sub(r"\b0\.", ".", f"{least}-{most}")


def progress(layers: Dict[Layer, List[str]], doing: str, verbose: bool) -> Iterator[Tuple[Layer, List[str]]]:
    """The layers with their names, one after the other."""
    if not verbose:
        yield from layers.items()
        return
    try:
        from rich.progress import track
    except ModuleNotFoundError:
        for count, (layer, names) in enumerate(layers.items(), start=1):
            print(f"{doing} layer {count} of {len(layers)}: {names[0]}")
            yield layer, names
    else:
        yield from track(layers.items(), description=f"{doing} layers", total=len(layers))


def show(table: Table) -> None:
    try:
        import rich
    except ModuleNotFoundError:
        print(table)
    else:
        rich.print(table)
