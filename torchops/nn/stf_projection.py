"""Linear layers that train a dense weight through its factorization, on :func:`torchops.stf_project`."""

from typing import Optional

import torch
from torch import Tensor, nn

from .._namespace import operators
from ..ops.stf import stf_factorize, stf_project
from ._shared_tensors import whole
from .stf import STFLinear, choose_sizes

__all__ = ["STFProjectedLinear"]


class STFProjectedLinear(nn.Module):
    """A linear layer that computes with the factorization of its dense weight (the Straight-Through Factorizer).

    The gradient to the product of the factors is taken for the gradient to the dense weight, so that all layers are
    trained on the model's loss. The forward pass uses the current basis, so that a checkpoint computes the same again.
    Call :meth:`refresh` after a step of the optimizer to update the basis. :meth:`factored` returns the result as a
    layer of factors. Each forward pass factors the weight again: this is for fine-tuning, and slower than
    ``STFLinear(...).straight_through()``, which trains basis and code instead.

    Args:
        linear: whose weight and bias it starts from; stays as it is.
        basis_size, nnz: K, at most the smaller of the layer's features, and how many basis vectors a row combines.
        sparse_side: "output" or "input"; None for that of the larger of the layer's features.
        num_iterations: of :func:`torchops.stf_factorize` for the first basis.

    Shapes: forward(input [..., in_features]) returns [..., out_features].

    >>> layer = torchops.nn.STFProjectedLinear(nn.Linear(16, 64), basis_size=12, nnz=4)
    >>> layer(torch.randn(5, 16)).sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([64, 16])
    >>> layer.refresh().factored().sparse_side
    'output'
    """

    basis: Tensor
    bias: Optional[Tensor]

    def __init__(
        self,
        linear: nn.Linear,
        basis_size: int,
        nnz: int,
        sparse_side: Optional[str] = None,
        num_iterations: int = 20,
    ) -> None:
        super().__init__()
        if sparse_side not in ("output", "input", None):
            raise ValueError(f"STFProjectedLinear: expected sparse_side to be 'output' or 'input', got {sparse_side!r}")
        if basis_size > min(linear.weight.shape):
            raise ValueError(
                "STFProjectedLinear: expected basis_size of at most the smaller of the layer's features ="
                f" {min(linear.weight.shape)}, got {basis_size}"
            )
        self.nnz = nnz
        self.transpose = (linear.in_features > linear.out_features) if sparse_side is None else sparse_side == "input"
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.register_parameter("bias", None if linear.bias is None else nn.Parameter(linear.bias.detach().clone()))
        basis = stf_factorize(self._whole_matrix(), basis_size, nnz, 1, num_iterations)[0]
        self.register_buffer("basis", basis)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws what ``nn.Linear`` would, and the basis that comes closest to it."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        if not self.basis.is_meta:
            self.basis.copy_(stf_factorize(self._whole_matrix(), self.basis.shape[1], self.nnz)[0])

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, compression: float = 2.0, sparse_side: Optional[str] = None, num_iterations: int = 20
    ) -> "STFProjectedLinear":
        """With the sizes that :meth:`STFLinear.from_linear` chooses for a compression in bytes.

        >>> layer = torchops.nn.STFProjectedLinear.from_linear(nn.Linear(64, 256), compression=2.0)
        >>> 4 * 64 * 256 / layer.factored().num_bytes("packed") >= 2
        True
        """
        side = sparse_side or ("input" if linear.in_features > linear.out_features else "output")
        rows, cols = linear.out_features, linear.in_features
        if side == "input":
            rows, cols = cols, rows
        basis_size, nnz = choose_sizes(rows, cols, linear.weight.element_size(), compression)
        return cls(linear, basis_size, nnz, side, num_iterations)

    def _matrix(self) -> Tensor:
        """The weight with the sparse factor's rows first."""
        return self.weight.T if self.transpose else self.weight

    def _whole_matrix(self) -> Tensor:
        """That of all processes, where they share the weight (torch.distributed's DTensor), and without a gradient."""
        return whole(self._matrix().detach())

    def forward(self, input: Tensor) -> Tensor:
        projected = stf_project(self._matrix(), self.basis, self.nnz, 0)[0]
        return nn.functional.linear(input, projected.T if self.transpose else projected, self.bias)

    @torch.no_grad()
    def refresh(self, num_iterations: int = 1) -> "STFProjectedLinear":
        """Improves the basis for the weight as it is now. Call it after the optimizer's step, on every process of a
        data-parallel run. Returns the module."""
        self.basis.copy_(stf_project(self._whole_matrix(), self.basis, self.nnz, num_iterations)[1])
        return self

    @torch.no_grad()
    def factored(self) -> STFLinear:
        """A factored layer that computes the same, with the factors whose product ``forward`` uses."""
        layer = STFLinear(
            self.weight.shape[1],
            self.weight.shape[0],
            self.basis.shape[1],
            self.nnz,
            bias=self.bias is not None,
            sparse_side="input" if self.transpose else "output",
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        basis, values, indices = operators._stf_project_to_factors(
            self._whole_matrix(), self.basis, self.nnz, num_iterations=0
        )
        layer.basis.copy_(basis)
        if layer.bias is not None and self.bias is not None:
            layer.bias.copy_(whole(self.bias))
        return layer._hold(values=values, indices=indices).train(self.training)
