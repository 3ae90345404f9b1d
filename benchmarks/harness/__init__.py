"""What all families share: rows, their measurement, results, tables, plots and pages."""

from .results import Report
from .rows import FORWARD, FORWARD_BACKWARD, Absent, Contender, Curves, Finding, Options, Row, Tensors, contender

__all__ = [
    "FORWARD",
    "FORWARD_BACKWARD",
    "Absent",
    "Contender",
    "Curves",
    "Finding",
    "Options",
    "Report",
    "Row",
    "Tensors",
    "contender",
]
