"""Rows of sizes that the command line gives, instead of those that a family has published figures of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .rows import FORWARD, FORWARD_BACKWARD, Options, Row

Sizes = Mapping[str, Any]  # int or float by name


@dataclass(frozen=True)
class Operation:
    """One operation of a family, for any sizes.

    Args:
        sizes: their names, as labels of rows have them, and what each is where it is not given.
        row: makes a row of all sizes.
        directions: in which it is measured.
    """

    sizes: Sizes
    row: Callable[[Sizes, torch.dtype, str, Options], Row]
    directions: Sequence[str] = (FORWARD, FORWARD_BACKWARD)

    def __str__(self) -> str:
        return " ".join(name if size is None else f"{name}={size}" for name, size in self.sizes.items())


def rows_of(operations: Mapping[str, Operation], given: Sizes, options: Options) -> list[Row]:
    """Of every operation that has all sizes that are given.

    Raises:
        ValueError: no operation has.
    """
    fitting = [operation for operation in operations.values() if given.keys() <= operation.sizes.keys()]
    if not fitting:
        raise ValueError(f"expected sizes that one operation has, got {' '.join(given)}")
    rows = [
        operation.row({**operation.sizes, **given}, dtype, direction, options)
        for operation in fitting
        for dtype in options.dtypes
        for direction in operation.directions
    ]
    return list({row.label: row for row in rows}.values())  # some have one dtype, whatever is asked for
