"""What least squares needs of a layer's inputs and outputs."""

from typing import Dict, List, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, nn

__all__: List[str] = []  # for STFLinear and factorize_ alone


class Fit(NamedTuple):
    """What a factored layer is fitted to, in at least float32.

    The layer gets inputs X, [n, in], and should compute Y, [n, out], which is X W^T + bias where the dense layer got
    the same inputs. Where the bias takes the mean error, X and Y are relative to their means, else Y is without bias.
    """

    gram: Tensor  # X^T X [in, in]
    cross: Optional[Tensor] = None  # X^T Y [in, out], None for that of Y = X W^T
    output_squares: float = 0.0  # |Y|^2, with cross
    input_mean: Optional[Tensor] = None  # [in], where the bias takes the mean error
    output_mean: Optional[Tensor] = None  # [out], with cross and with the bias

    def target(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that comes closest to Y, to which nearer ones are nearer. Where inputs say little, it is
        the given one."""
        if self.cross is None:
            return weight
        return weight + torch.cholesky_solve(self.cross - self.gram @ weight.T, self.root(self.gram.dtype)).T

    def root(self, dtype: torch.dtype) -> Tensor:
        """L of X^T X + ridge = L L^T. The ridge is that of stf_factorize."""
        gram = self.gram.to(dtype)
        ridge = 1e-3 * gram.diagonal().mean() + 1e-12
        return torch.linalg.cholesky(gram + ridge * torch.eye(len(gram)).to(gram))

    def bias(self, dense: nn.Linear, weight: Tensor) -> Optional[Tensor]:
        """The bias beside another weight: it takes the mean error."""
        if self.input_mean is None or dense.bias is None:
            return dense.bias
        output_mean = self.output_mean
        if output_mean is None:
            output_mean = dense.weight.to(weight.dtype) @ self.input_mean + dense.bias
        return output_mean - weight @ self.input_mean

    def norm(self, dense: Tensor) -> float:
        """That of Y."""
        return (self._squares(dense) if self.cross is None else self.output_squares) ** 0.5

    def error(self, dense: Tensor, weight: Tensor) -> float:
        """The norm of Y - X weight^T."""
        if self.cross is None:
            return self._squares(weight - dense) ** 0.5
        both = (weight.T.double() * self.cross).sum().item()
        return max(self._squares(weight) - 2 * both + self.output_squares, 0.0) ** 0.5

    def _squares(self, weight: Tensor) -> float:
        weight = weight.to(self.gram.dtype)
        return ((weight @ self.gram).double() * weight).sum().clamp(min=0).item()


class Moments:
    """Sums over the inputs that some layers share, and over the outputs that each of them should have.

    Numbers are taken relative to those of the first token: where a mean is large, sums of squares would cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self.paired = True
        self._inputs: Optional[Tensor] = None
        self._outputs: Dict[nn.Module, Tensor] = {}
        self._sums: Dict[object, Tensor] = {}

    def add(self, inputs: Tensor, outputs: Optional[Mapping[nn.Module, Tensor]] = None) -> None:
        """Rows of inputs [n, in], and of each layer's outputs [n, out], None where they are what the dense layer makes
        of these inputs."""
        if not len(inputs):
            return
        # The model may compute under autocast, which would round the sums.
        with torch.autocast(inputs.device.type, enabled=False):
            wide = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
            self._inputs = wide[0].clone() if self._inputs is None else self._inputs
            moved = wide - self._inputs
            self.count += len(moved)
            self._sum("inputs", moved.sum(0, dtype=torch.float64))
            self._sum("gram", moved.T @ moved)
            self.paired &= outputs is not None
            for layer, rows in (outputs or {}).items():
                rows = rows.detach().to(wide.dtype)
                to_rows = rows - self._outputs.setdefault(layer, rows[0].clone())
                self._sum((layer, "outputs"), to_rows.sum(0, dtype=torch.float64))
                self._sum((layer, "squares"), to_rows.square().sum(dtype=torch.float64))
                self._sum((layer, "cross"), moved.T @ to_rows)

    def _sum(self, name: object, more: Tensor) -> None:
        self._sums[name] = self._sums[name] + more if name in self._sums else more

    def fit(self, layer: nn.Module, bias_is_free: bool) -> Fit:
        """For one of the layers. A bias that is free takes the mean error."""
        assert self._inputs is not None
        gram, origin, inputs = self._sums["gram"], self._inputs, self._sums["inputs"]
        mean = inputs / self.count
        # Sums around the mean, or around zero.
        around = mean if bias_is_free else -origin.double()
        gram = gram + (self.count * torch.outer(around - mean, around - mean) - torch.outer(mean, inputs)).to(gram)
        input_mean = (origin + mean).to(origin.dtype) if bias_is_free else None
        if not self.paired:
            return Fit(gram, input_mean=input_mean)
        outputs = self._sums[layer, "outputs"]
        output_origin = self._outputs[layer]
        output_mean = outputs / self.count
        bias = layer._parameters["bias"]
        without = output_origin.double() if bias is None else output_origin.double() - bias.detach()
        from_there = output_mean if bias_is_free else -without
        cross = self._sums[layer, "cross"]
        cross = cross + (
            self.count * torch.outer(around - mean, from_there - output_mean) - torch.outer(mean, outputs)
        ).to(cross)
        squares = self._sums[layer, "squares"] - output_mean.dot(outputs)
        squares = squares + self.count * (from_there - output_mean).square().sum()
        mean_of_outputs = (output_origin + output_mean).to(origin.dtype) if bias_is_free else None
        return Fit(gram, cross, squares.clamp(min=0).item(), input_mean, mean_of_outputs)
