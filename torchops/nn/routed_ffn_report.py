"""What the conversion of a model did to each of its feed-forward layers."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Sequence, Tuple

from ._report import Table, spread

__all__ = ["RoutedLayer", "RoutingReport"]


@dataclass(frozen=True)
class RoutedLayer:
    """What a conversion did to one feed-forward layer: its name, activation, sizes and error.

    ``weights`` are the numbers in its weights, ``computed`` those of them that compute a token, ``trained`` the numbers
    that train afterwards. ``output_norm`` is that of what the dense layer computed in the calibration, ``output_error``
    that of its difference to the routed one (Frobenius), NaN without a calibration. ``busiest`` is the share of tokens
    there that the block chosen most often computes.
    """

    name: str
    activation: str
    dim: int
    hidden_dim: int
    num_blocks: int
    top_k: int
    weights: int
    computed: int
    trained: int
    output_norm: float = math.nan
    output_error: float = math.nan
    busiest: float = math.nan


@dataclass(frozen=True)
class RoutingReport(Table):
    """What :func:`route_ffn_` did: a row for every layer, and one for all of them. Print it for a table.

    ``left`` are feed-forward layers that stay dense without being named in skip, each by its name and the reason.
    """

    COLUMNS: ClassVar[Tuple[str, ...]] = (
        "layer",
        "activation",
        "sizes",
        "blocks",
        "weights",
        "computed",
        "trained",
        "error",
        "busiest",
    )

    PRINTED: ClassVar[Tuple[str, ...]] = ("layer", "sizes", "blocks", "computed", "error", "busiest")

    layers: Sequence[RoutedLayer]
    left: Sequence[Tuple[str, str]] = ()

    def total(self) -> RoutedLayer:
        """All layers as if they were one."""
        sums: Dict[str, Any] = {
            name: sum(getattr(layer, name) for layer in self.layers) for name in ("weights", "computed", "trained")
        }
        norms: Dict[str, Any] = {
            name: math.hypot(*(getattr(layer, name) for layer in self.layers))
            for name in ("output_norm", "output_error")
        }
        busiest = max(layer.busiest for layer in self.layers)
        return RoutedLayer(f"{len(self.layers)} layers", "", 0, 0, 0, 0, **sums, **norms, busiest=busiest)

    def rows(self) -> List[List[str]]:
        """The table's cells. Weights and what is trained are in thousands, ``computed`` is the share of the weights
        that compute a token, ``error`` is relative to the norm of what the dense layer computed. The last row is the
        total."""
        return [
            [
                layer.name,
                layer.activation,
                *sizes(layer),
                f"{layer.weights / 1000:,.1f}",
                f"{layer.computed / layer.weights:.2f}",
                f"{layer.trained / 1000:,.1f}",
                spread([output_error(layer)]),
                spread([layer.busiest]),
            ]
            for layer in (*self.layers, self.total())
        ]

    def lines(self) -> List[List[str]]:
        """What is printed. Layers of one kind whose names differ in numbers alone share a line, which has the range of
        their errors and of the shares of their busiest blocks."""
        kinds = [(layer.activation, *sizes(layer)) for layer in self.layers]
        return [
            [
                name,
                *sizes(layers[0]),
                f"{layers[0].computed / layers[0].weights:.2f}",
                spread([output_error(layer) for layer in layers]),
                spread([layer.busiest for layer in layers]),
            ]
            for name, layers in (*self._groups(kinds), (self.total().name, [self.total()]))
        ]


def sizes(layer: RoutedLayer) -> Tuple[str, str]:
    """Of its weights, and how many of its blocks compute a token; nothing for the total."""
    if not layer.dim:
        return "", ""
    return f"{layer.dim} x {layer.hidden_dim}", f"{layer.top_k} of {layer.num_blocks}"


def output_error(layer: RoutedLayer) -> float:
    return layer.output_error / (layer.output_norm or 1.0)
