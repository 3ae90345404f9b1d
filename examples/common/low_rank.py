"""Linear layers of low rank, beside which factored ones are compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What factorize_ goes by. A rival gets the same treatment, or the comparison says nothing.
from torchops.nn._conversion import put_
from torchops.nn._replay import Replay
from torchops.nn.stf_calibration import Fit


class LowRank(nn.Module):
    """The best approximation of a linear layer by two dense factors of its weight (truncated SVD).

    Args:
        linear: stays as it is.
        rank: of the product of the factors.
        fit: what the layer gets and should compute: then that is approximated (SVD-LLM), and not the weight.
    """

    def __init__(self, linear: nn.Linear, rank: int, fit: Fit | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        matrix = weight.double()
        if fit is not None:
            matrix = fit.target(weight.to(fit.gram.dtype)).double()
            root = fit.root(torch.float64)
            matrix = matrix @ root
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        first, second = right[:rank], left[:, :rank] * values[:rank]
        if fit is not None:
            first = torch.linalg.solve_triangular(root, first, upper=False, left=False)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        if fit is not None:
            bias = fit.bias(linear, (second @ first).to(fit.gram.dtype))
        # Of equal size, so that an optimizer's steps suit both.
        scale = (second.norm(dim=0) / first.norm(dim=1)).sqrt()
        self.first = nn.Parameter((scale[:, None] * first).to(weight.dtype))
        self.second = nn.Parameter((second / scale).to(weight.dtype))
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(input, self.first), self.second, self.bias)


def lower_rank_(
    model: nn.Module, rank_of: Callable[[str, nn.Linear], int], run: Callable[[], Any] | None = None
) -> nn.Module:
    """Replaces every linear layer of a model by one of low rank.

    Args:
        rank_of: a layer's rank, by its name and the layer.
        run: lets the model compute, the same each time. Layers are then replaced in the order of the forward, each
            fitted to the outputs of the dense model for the inputs that it gets behind the layers replaced so far.
            Without it each is as close to its weight as can be.
    """
    names = {module: name for name, module in model.named_modules() if type(module) is nn.Linear}
    made = {}
    if run is None:
        made = {layer: LowRank(layer, rank_of(name, layer)) for layer, name in names.items()}
    else:
        replay = Replay(model, {layer: [name] for layer, name in names.items()}, run, in_sequence=True)
        for stage in replay.plan.stages:
            moments = replay.moments(stage)
            for layer in stage.layers:
                fit = moments.fit(layer, layer.bias is not None)
                made[layer] = LowRank(layer, rank_of(names[layer], layer), fit)
                replay.use(layer, made[layer])
    for layer, replaced in made.items():
        put_(model, names[layer], replaced.train(layer.training))
    return model
