"""Linear layers in fewer bytes: factored by torchops, and for comparison of low rank.

A model is changed in place, and its layers are fitted to what they compute while ``run`` lets it compute something. It
trains as before: factored layers straight through their choice of basis vectors.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

import torchops
from torchops.nn import RoutedFFN, STFLinear

from ..common.low_rank import LowRank, lower_rank_
from ..common.report import console
from . import routing


def factor(model: nn.Module, compression: float, run: Callable[[], Any]) -> nn.Module:
    """Every linear layer becomes a basis and a sparse factor (DSFormer), of so many fewer bytes, masks included."""
    with console.status(f"Factoring the linear layers, {compression:g} x smaller"):
        torchops.nn.factorize_(model, compression, verbose=False, calibration=lambda _: run())
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            layer.straight_through()
    return model


def pack(model: nn.Module) -> None:
    """Factored layers in the form for inference."""
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            layer.pack()


def lower_rank(model: nn.Module, compression: float, run: Callable[[], Any]) -> nn.Module:
    """Every linear layer becomes one of low rank."""
    return lower_rank_(
        model, lambda _, linear: max(1, int(linear.weight.numel() / compression / sum(linear.weight.shape))), run
    )


def num_bytes(model: nn.Module) -> int:
    """Of the weights of linear layers of all kinds, in the form for inference, without biases."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            total += layer.num_bytes("packed")
        elif isinstance(layer, LowRank):
            total += layer.first.nbytes + layer.second.nbytes
        elif isinstance(layer, RoutedFFN):
            total += routing.num_bytes(layer)
        elif isinstance(layer, nn.Linear):
            total += layer.weight.nbytes
    return total
