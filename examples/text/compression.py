"""Linear layers in fewer bytes: factored by torchops, and for comparison of low rank.

A model is changed in place, and trains as before: factored layers straight through their choice of basis vectors.
"""

import torch
from torch import Tensor, nn

import torchops
from torchops.nn import STFLinear

from ..common.report import console


def factor(model: nn.Module, compression: float) -> nn.Module:
    """Every linear layer becomes a basis and a sparse factor (DSFormer), of so many fewer bytes, masks included."""
    with console.status(f"Factoring the linear layers, {compression:g} x smaller"):
        torchops.nn.factorize_(model, compression, verbose=False)
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            layer.straight_through()
    return model


def pack(model: nn.Module) -> None:
    """Factored layers in the form for inference."""
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            layer.pack()


class LowRank(nn.Module):
    """The best approximation of a linear layer's weight by two factors (truncated SVD) of so many fewer bytes."""

    def __init__(self, linear: nn.Linear, compression: float) -> None:
        super().__init__()
        weight = linear.weight.detach()
        rank = max(1, int(weight.numel() / compression / sum(weight.shape)))
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = values[:rank].sqrt()
        self.first = nn.Parameter(root[:, None] * right[:rank])
        self.second = nn.Parameter(left[:, :rank] * root)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(input, self.first), self.second, self.bias)


def lower_rank(model: nn.Module, compression: float) -> nn.Module:
    """Every linear layer becomes one of low rank."""
    for name, linear in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LowRank(linear, compression))
    return model


def num_bytes(model: nn.Module) -> int:
    """Of the weights of linear layers of all kinds, in the form for inference, without biases."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            total += layer.num_bytes("packed")
        elif isinstance(layer, LowRank):
            total += layer.first.nbytes + layer.second.nbytes
        elif isinstance(layer, nn.Linear):
            total += layer.weight.nbytes
    return total
