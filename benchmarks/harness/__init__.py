"""What all families share: rows, their measurement, results, tables and plots."""

from .rows import FORWARD, FORWARD_BACKWARD, Contender, Options, Row, Tensors, contender

__all__ = ["FORWARD", "FORWARD_BACKWARD", "Contender", "Options", "Row", "Tensors", "contender"]
