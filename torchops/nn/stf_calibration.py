"""What the inputs of layers were while a model computed."""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ._calibration import observed
from .stf import gram_matrix

__all__: List[str] = []  # for factorize_ alone

MOST_ROWS = 1024


class InputStatistics:
    """Of a layer's inputs X, what its factorization and the report need: X^T X, or its diagonal and a few rows.

    The diagonal is all that a sparse factor on the input's side is weighed by, and such a layer has many features:
    its X^T X would be the largest tensor of the model. The norm of an output X W^T is then taken from at most 1024
    rows that are sums of X's with random signs: exact for as many inputs, and for more an estimate whose standard
    deviation is 3% at the very most.
    """

    def __init__(self, diagonal: bool) -> None:
        self.diagonal = diagonal
        self.moments: Optional[Tensor] = None
        self._rows: Optional[Tensor] = None
        self._count = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, inputs: Tensor) -> None:
        # The model may compute under autocast, which would round the sums.
        with torch.autocast(inputs.device.type, enabled=False):
            moments = gram_matrix(inputs, self.diagonal)
            self.moments = moments if self.moments is None else self.moments + moments
            if self.diagonal:
                self._add_rows(inputs.detach().reshape(-1, inputs.shape[-1]))

    def _add_rows(self, inputs: Tensor) -> None:
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if self._rows is None:
            self._rows = inputs[:0].clone()
        taken = MOST_ROWS - len(self._rows)
        self._rows = torch.cat([self._rows, inputs[:taken]])
        for more in inputs[taken:].split(MOST_ROWS):
            signs = 2 * torch.randint(2, (len(more), 1), generator=self._generator) - 1
            places = (torch.arange(len(more)) + self._count) % MOST_ROWS
            self._rows[places.to(more.device)] += signs.to(more) * more
            self._count += len(more)

    def output_norm(self, weight: Tensor) -> float:
        """The Frobenius norm of X weight^T."""
        assert self.moments is not None
        if self.diagonal:
            assert self._rows is not None
            return (self._rows.to(weight.dtype) @ weight.T).norm().item()
        gram = self.moments.to(weight.dtype)
        return (weight @ gram * weight).sum().clamp(min=0).sqrt().item()


def input_statistics(
    model: nn.Module, diagonal: Dict[nn.Module, bool], calibration: Callable[[nn.Module], Any]
) -> Dict[nn.Module, InputStatistics]:
    """Those of each layer, or of which the diagonal is enough, while the calibration lets the model compute."""
    statistics = {layer: InputStatistics(only) for layer, only in diagonal.items()}

    def add(layer: nn.Module, inputs: Tuple[Tensor, ...], named: Dict[str, Tensor]) -> None:
        statistics[layer].add(inputs[0] if inputs else next(iter(named.values())))

    with observed(model, statistics, add):
        calibration(model)
    return statistics
