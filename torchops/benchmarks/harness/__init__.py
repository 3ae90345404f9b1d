"""What all families share: rows, their measurement, results, tables, plots and pages."""

from .results import Report
from .rows import FORWARD, FORWARD_BACKWARD, Absent, Contender, Curves, Finding, Options, Row, Tensors, contender
from .sizes import Operation, Sizes, rows_of

__all__ = [
    "FORWARD",
    "FORWARD_BACKWARD",
    "Absent",
    "Contender",
    "Curves",
    "Finding",
    "Operation",
    "Options",
    "Report",
    "Row",
    "Sizes",
    "Tensors",
    "contender",
    "rows_of",
]
