"""Linear layers of low rank, beside which factored ones are compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The best approximation of a linear layer's weight by two dense factors (truncated SVD).

    Args:
        linear: stays as it is.
        rank: of the product of the factors.
        gram: X^T X of inputs (``input_grams``): then not the weight is approximated, but what it computes of these.
    """

    def __init__(self, linear: nn.Linear, rank: int, gram: Tensor | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        matrix = weight.double()
        if gram is not None:
            ridge = 1e-3 * gram.diagonal().mean() + 1e-12
            root = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
            matrix = matrix @ root
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        first, second = right[:rank], left[:, :rank] * values[:rank]
        if gram is not None:
            first = torch.linalg.solve_triangular(root, first, upper=False, left=False)
        # Of equal size, so that an optimizer's steps suit both.
        scale = (second.norm(dim=0) / first.norm(dim=1)).sqrt()
        self.first = nn.Parameter((scale[:, None] * first).to(weight.dtype))
        self.second = nn.Parameter((second / scale).to(weight.dtype))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(input, self.first), self.second, self.bias)


@torch.no_grad()
def input_grams(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """X^T X of the inputs that each linear layer gets while ``run`` lets the model compute, by the layer's name."""
    grams: dict[str, Tensor] = {}

    def watch(name: str, linear: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + (rows.T @ rows).double()

        return linear.register_forward_pre_hook(add)

    hooks = [watch(name, linear) for name, linear in model.named_modules() if type(linear) is nn.Linear]
    run()
    for hook in hooks:
        hook.remove()
    return grams
