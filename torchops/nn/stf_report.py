"""What the conversion of a model did to each of its layers."""

import math
from dataclasses import dataclass
from typing import ClassVar, List, Sequence, Tuple

from ._report import Table, spread

__all__ = ["FactorizationReport", "FactorizedLayer"]


@dataclass(frozen=True)
class FactorizedLayer:
    """What a conversion did to one linear layer, without its bias: names, bytes and error.

    ``indexed_bytes`` are those of the form that trains, with 8 or 16 bits for the position of a nonzero;
    ``packed_bytes`` those of the form that infers, with a bit for every possible position. ``norm`` is that of the
    dense weight and ``error`` that of its difference to the factored one (Frobenius); ``output_norm`` and
    ``output_error`` are those of what the dense layer computed in the calibration, around its mean where the bias takes
    the mean error, and of its difference to what the new layer computes there; NaN without one.
    """

    name: str
    sparse_side: str
    basis_size: int
    nnz: int
    dense_bytes: int
    indexed_bytes: int
    packed_bytes: int
    dense_numbers: int
    stored_numbers: int
    norm: float
    error: float
    output_norm: float = math.nan
    output_error: float = math.nan


@dataclass(frozen=True)
class FactorizationReport(Table):
    """What :func:`factorize_` did: a row for every layer, and one for all of them. Print it for a table.

    ``left`` are linear layers that stay dense without being named in skip, each by its name and the reason.
    """

    COLUMNS: ClassVar[Tuple[str, ...]] = (
        "layer",
        "sparse",
        "K",
        "nnz",
        "dense kB",
        "with indices",
        "packed",
        "smaller",
        "values only",
        "error",
        "of outputs",
    )

    PRINTED: ClassVar[Tuple[str, ...]] = ("layer", "packed kB", "smaller", "error", "outputs")

    layers: Sequence[FactorizedLayer]
    left: Sequence[Tuple[str, str]] = ()

    def total(self) -> FactorizedLayer:
        """All layers as if they were one."""
        sums = [
            sum(getattr(layer, name) for layer in self.layers)
            for name in ("dense_bytes", "indexed_bytes", "packed_bytes", "dense_numbers", "stored_numbers")
        ]
        norms = [
            math.hypot(*(getattr(layer, name) for layer in self.layers))
            for name in ("norm", "error", "output_norm", "output_error")
        ]
        return FactorizedLayer(f"{len(self.layers)} layers", "", 0, 0, *sums, *norms)

    def rows(self) -> List[List[str]]:
        """The table's cells, sizes in kilobytes. ``smaller`` is what the packed bytes are to the dense ones, and
        ``values only`` what it would be if positions were free; ``error`` is relative to the norm of the weight,
        ``of outputs`` to that of what the layer computed in the calibration. The last row is the total."""
        return [
            [
                layer.name,
                layer.sparse_side,
                f"{layer.basis_size or ''}",
                f"{layer.nnz or ''}",
                f"{layer.dense_bytes / 1000:,.1f}",
                f"{layer.indexed_bytes / 1000:,.1f}",
                f"{layer.packed_bytes / 1000:,.1f}",
                f"{layer.dense_bytes / layer.packed_bytes:.2f} x",
                f"{layer.dense_numbers / layer.stored_numbers:.2f} x",
                f"{weight_error(layer):.3f}",
                "" if math.isnan(layer.output_norm) else f"{output_error(layer):.3f}",
            ]
            for layer in (*self.layers, self.total())
        ]

    def lines(self) -> List[List[str]]:
        """What is printed. Layers of one size whose names differ in numbers alone share a line, which has their bytes
        together and the range of their errors."""
        kinds = [(layer.sparse_side, layer.basis_size, layer.nnz, layer.dense_bytes) for layer in self.layers]
        return [
            [
                name,
                f"{sum(layer.packed_bytes for layer in layers) / 1000:,.1f}",
                f"{layers[0].dense_bytes / layers[0].packed_bytes:.2f} x",
                spread([weight_error(layer) for layer in layers]),
                spread([output_error(layer) for layer in layers]),
            ]
            for name, layers in (*self._groups(kinds), (self.total().name, [self.total()]))
        ]


def weight_error(layer: FactorizedLayer) -> float:
    return layer.error / layer.norm if layer.norm else 0.0


def output_error(layer: FactorizedLayer) -> float:
    return layer.output_error / (layer.output_norm or 1.0)
