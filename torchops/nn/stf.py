"""Linear layers with a factored weight, on :func:`torchops.stf_linear`."""

import math
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from ..ops.stf import stf_factorize, stf_linear, stf_linear_packed, stf_linear_straight_through, stf_pack, stf_select
from ..reference.stf import dense, stf_unpack

__all__ = ["STFLinear"]

ROWS_PER_GROUP = 16
MOST_VECTORS = 32767
# Basis vectors for each that a row combines: of all ways to divide the bytes the one that comes closest to trained
# layers (docs/decisions/stf_sizes.md).
VECTORS_PER_NONZERO = 3
# The tensors of each form of the sparse factor, by which a state dict tells which one it holds.
FORMS = {"factored": ("values", "indices"), "straight-through": ("latent",), "packed": ("packed_values", "mask")}


def choose_sizes(rows: int, cols: int, bytes_per_number: int, compression: float) -> Tuple[int, int]:
    """K and nnz of the largest packed factors that are `compression` times smaller than the dense matrix."""
    groups = -(-rows // ROWS_PER_GROUP)
    bytes_per_vector = bytes_per_number * cols + 2 * groups  # a basis vector, and its bits in every group's mask
    bytes_per_nonzero = bytes_per_number * ROWS_PER_GROUP * groups  # one in every row
    bytes_together = VECTORS_PER_NONZERO * bytes_per_vector + bytes_per_nonzero
    dense_bytes = bytes_per_number * rows * cols
    most_bytes = dense_bytes / compression if compression >= 1 else 0.0
    nnz = int(most_bytes / bytes_together)
    if nnz < 1 or cols <= VECTORS_PER_NONZERO:
        highest = dense_bytes / bytes_together if cols > VECTORS_PER_NONZERO else 0.0
        if highest < 1:
            raise ValueError(
                f"STFLinear.from_linear: expected a layer whose factors are smaller than it, got {rows} x {cols}"
            )
        raise ValueError(
            f"STFLinear.from_linear: expected compression in 1..{highest:.2f} for {rows} x {cols}, got {compression}"
        )
    most_vectors = min(cols, MOST_VECTORS)
    basis_size = min(int((most_bytes - nnz * bytes_per_nonzero) / bytes_per_vector), most_vectors)
    if basis_size == most_vectors:
        nnz = min(int((most_bytes - basis_size * bytes_per_vector) / bytes_per_nonzero), basis_size)
    return basis_size, nnz


def gram_matrix(inputs: Tensor, diagonal: bool = False) -> Tensor:
    """X^T X of [..., features], in at least float32, or its diagonal alone, in float64."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    # One product in 16 bits would round its sums.
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.square().sum(0, dtype=torch.float64) if diagonal else wide.T @ wide


class STFLinear(nn.Module):
    """A linear layer whose weight is a sparse factor times a small dense basis (DSFormer).

    The sparse factor has one of three forms, and each can be turned into the others:

    ==================  ==========================  ======================================================
    made by             tensors                     for
    ==================  ==========================  ======================================================
    :meth:`factored`    values, indices             training on a fixed choice of basis vectors; how it starts
    straight_through()  latent                      training that learns the choice, too
    :meth:`pack`        packed_values, mask         inference and files: no gradients
    ==================  ==========================  ======================================================

    Parameters change with the form, so an optimizer is made afterwards. A state dict is loaded in the form
    in which it was saved, whatever the form of the module that loads it.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        basis_size: K, the number of basis vectors of a block.
        nnz: how many of them a row of the sparse factor combines.
        num_blocks: blocks of the dense side: of in_features with the sparse factor on the output's side, of
            out_features with it on the input's.
        bias: whether there is one.
        sparse_side: "output" or "input". The larger of in_features and out_features is the better one.
        device, dtype: of the parameters.

    Shapes: forward(input [..., in_features]) returns [..., out_features]; basis [blocks, K, cols / blocks],
    values and indices [rows, blocks, nnz], latent [rows, blocks, K], with rows = out_features and
    cols = in_features on the output's side, and the other way round on the input's.

    Source: DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization, 2023.

    >>> layer = torchops.nn.STFLinear(64, 256, basis_size=32, nnz=16)
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 256])
    >>> layer.pack().num_bytes(), 4 * 64 * 256
    (25600, 65536)
    """

    bias: Optional[Tensor]
    values: Optional[Tensor]
    indices: Optional[Tensor]
    latent: Optional[Tensor]
    packed_values: Optional[Tensor]
    mask: Optional[Tensor]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis_size: int,
        nnz: int,
        num_blocks: int = 1,
        bias: bool = True,
        sparse_side: str = "output",
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if sparse_side not in ("output", "input"):
            raise ValueError(f"STFLinear: expected sparse_side to be 'output' or 'input', got {sparse_side!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.basis_size = basis_size
        self.nnz = nnz
        self.num_blocks = num_blocks
        self.sparse_side = sparse_side
        self.transpose = sparse_side == "input"
        self.rows, self.cols = (in_features, out_features) if self.transpose else (out_features, in_features)
        if not 0 <= nnz <= basis_size:
            raise ValueError(f"STFLinear: expected nnz in 0..basis_size = {basis_size}, got {nnz}")
        if num_blocks < 1 or self.cols % num_blocks:
            raise ValueError(
                f"STFLinear: expected {'out' if self.transpose else 'in'}_features to be a multiple of num_blocks ="
                f" {num_blocks}, got {self.cols}"
            )
        empty = torch.empty(0, device=device, dtype=dtype)
        self.basis = nn.Parameter(empty.new_empty(num_blocks, basis_size, self.cols // num_blocks))
        self.register_parameter("bias", nn.Parameter(empty.new_empty(out_features)) if bias else None)
        for name in ("values", "latent"):
            self.register_parameter(name, None)
        for name in ("indices", "packed_values", "mask"):
            self.register_buffer(name, None)
        self._hold(**self._empty("factored"))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a factored weight whose entries vary as those of ``nn.Linear`` do."""
        width = self.basis.shape[2]
        nn.init.normal_(self.basis, std=max(width, 1) ** -0.5)
        code = torch.randn(self.rows, self.num_blocks, self.basis_size, device=self.basis.device)
        chosen = code.argsort(-1)[..., : self.nnz].sort(-1).values
        values = torch.randn(chosen.shape, device=self.basis.device, dtype=self.basis.dtype)
        values *= math.sqrt(width / (3 * max(self.in_features * self.nnz, 1)))
        self._hold(values=values, indices=chosen.to(self._empty("factored")["indices"].dtype))
        if self.bias is not None:
            bound = max(self.in_features, 1) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        values, indices, latent = self.values, self.indices, self.latent
        packed_values, mask = self.packed_values, self.mask
        if latent is not None:
            return stf_linear_straight_through(input, self.basis, latent, self.nnz, self.bias, self.transpose)
        if packed_values is not None and mask is not None:
            return stf_linear_packed(input, self.basis, packed_values, mask, self.rows, self.bias, self.transpose)
        assert values is not None and indices is not None
        return stf_linear(input, self.basis, values, indices, self.bias, self.transpose)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        compression: float = 2.0,
        calibration: Optional[Tensor] = None,
        sparse_side: Optional[str] = None,
        num_iterations: int = 20,
    ) -> "STFLinear":
        """Factors a dense layer's weight with :func:`torchops.stf_factorize`.

        nnz and basis_size are the largest whose packed form, masks included, is smaller than the dense weight
        by the factor asked for, with basis_size about three times nnz.

        Args:
            linear: stays as it is.
            compression: bytes of the dense weight for one of the packed one.
            calibration: [..., in_features], typical inputs of the layer: what counts is then the error of its
                outputs, not that of its weight. With the sparse factor on the input's side each feature counts by its
                root mean square only, for correlations would couple the rows.
            sparse_side: "output" or "input"; None for that of the larger of the layer's features.
            num_iterations: of stf_factorize.

        Raises:
            ValueError: no factors are that small, or calibration is of another size or not finite.
        """
        gram = None
        if calibration is not None:
            if calibration.dim() == 0 or calibration.shape[-1] != linear.in_features:
                raise ValueError(
                    f"STFLinear.from_linear: expected calibration of shape [..., in_features = {linear.in_features}],"
                    f" got {list(calibration.shape)}"
                )
            if sparse_side is None:
                sparse_side = "output" if linear.out_features >= linear.in_features else "input"
            gram = gram_matrix(calibration.to(linear.weight.device), diagonal=sparse_side == "input")
        return cls._from_gram(linear, compression, gram, sparse_side, num_iterations)

    @classmethod
    def _from_gram(
        cls,
        linear: nn.Linear,
        compression: float,
        gram: Optional[Tensor],
        sparse_side: Optional[str],
        num_iterations: int,
    ) -> "STFLinear":
        """from_linear with X^T X of the inputs instead of these, or its diagonal where the sparse factor is on their
        side."""
        if gram is not None and not gram.isfinite().all():
            raise ValueError("STFLinear.from_linear: expected calibration of finite numbers, got NaN or infinity")
        rows, cols = linear.out_features, linear.in_features
        if sparse_side is None:
            sparse_side = "output" if rows >= cols else "input"
        if sparse_side == "input":
            rows, cols = cols, rows
        weight = linear.weight.detach()
        basis_size, nnz = choose_sizes(rows, cols, weight.element_size(), compression)
        layer = cls(
            linear.in_features,
            linear.out_features,
            basis_size,
            nnz,
            bias=linear.bias is not None,
            sparse_side=sparse_side,
            device=weight.device,
            dtype=weight.dtype,
        )
        # The factorization solves systems of equations: 16 bits are too few.
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        matrix = (weight.T if layer.transpose else weight).to(wide)
        if gram is not None and layer.transpose:
            # Scaled rows have the same nonzeros. The ridge is that of stf_factorize.
            squares = gram
            scale = (squares + 1e-3 * squares.mean() + 1e-12).sqrt().to(wide)[:, None]
            basis, values, indices = stf_factorize(matrix * scale, basis_size, nnz, 1, num_iterations)
            values = values / scale[..., None]
        else:
            weighed_by = None if gram is None else gram.to(wide)
            basis, values, indices = stf_factorize(matrix, basis_size, nnz, 1, num_iterations, weighed_by)
        with torch.no_grad():
            layer.basis.copy_(basis)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer._hold(values=values.to(weight.dtype), indices=indices).train(linear.training)

    # ---- forms ----------------------------------------------------------------------------------

    def form(self) -> str:
        """ "factored", "straight-through" or "packed"."""
        return next(form for form, names in FORMS.items() if getattr(self, names[0]) is not None)

    @torch.no_grad()
    def sparse_factor(self) -> Dict[str, Tensor]:
        """A copy of values and indices, both [rows, blocks, nnz], of whatever form the module has."""
        if self.latent is not None:
            values, indices = stf_select(self.latent, self.nnz)
        elif self.packed_values is not None and self.mask is not None:
            values, indices = stf_unpack(self.packed_values, self.mask, self.rows)
        else:
            assert self.values is not None and self.indices is not None
            values, indices = self.values.clone(), self.indices.clone()
        return {"values": values, "indices": indices}

    def factored(self) -> "STFLinear":
        """Trains, from here on, the values of the basis vectors that are chosen now. Returns the module."""
        return self._hold(**self.sparse_factor())

    @torch.no_grad()
    def straight_through(self) -> "STFLinear":
        """Trains, from here on, a latent factor of which the forward takes the nnz largest of every row, and
        whose dropped entries, which start at 0, can come back. Returns the module."""
        if self.latent is not None:
            return self
        factor = self.sparse_factor()
        latent = torch.zeros_like(self._empty("straight-through")["latent"])
        return self._hold(latent=latent.scatter(-1, factor["indices"].long(), factor["values"]))

    def pack(self) -> "STFLinear":
        """Makes the module smallest, for inference: nothing in it has a gradient any more. Returns the module."""
        factor = self.sparse_factor()
        packed_values, mask = stf_pack(factor["values"], factor["indices"], self.basis_size)
        return self._hold(packed_values=packed_values, mask=mask)

    def _hold(self, **factor: Tensor) -> "STFLinear":
        """Takes the sparse factor in one form and lets go of the others."""
        was_packed = self.mask is not None
        self.values = nn.Parameter(factor["values"]) if "values" in factor else None
        self.latent = nn.Parameter(factor["latent"]) if "latent" in factor else None
        self.indices = factor.get("indices")
        self.packed_values = factor.get("packed_values")
        self.mask = factor.get("mask")
        if was_packed or self.mask is not None:
            self.requires_grad_(self.mask is None)
        return self

    def _empty(self, form: str, device: Optional[torch.device] = None) -> Dict[str, Tensor]:
        groups = -(-self.rows // ROWS_PER_GROUP)
        sizes = {
            "values": (self.rows, self.num_blocks, self.nnz),
            "indices": (self.rows, self.num_blocks, self.nnz),
            "latent": (self.rows, self.num_blocks, self.basis_size),
            "packed_values": (groups, self.num_blocks, ROWS_PER_GROUP * self.nnz),
            "mask": (groups, self.num_blocks, self.basis_size),
        }
        dtypes = {"indices": torch.uint8 if self.basis_size <= 256 else torch.int16, "mask": torch.int16}
        return {
            name: torch.empty(sizes[name], dtype=dtypes.get(name, self.basis.dtype), device=device or self.basis.device)
            for name in FORMS[form]
        }

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        for form, names in FORMS.items():
            if prefix + names[0] in state_dict and form != self.form():
                self._hold(**self._empty(form))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- what it stands for ---------------------------------------------------------------------

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] that the factors stand for, as ``nn.Linear`` has it."""
        factor = self.sparse_factor()
        weight = dense(self.basis, factor["values"], factor["indices"])
        return weight.T if self.transpose else weight

    def num_bytes(self, form: Optional[str] = None) -> int:
        """Bytes of the weight's factors, positions included and the bias not, in the module's form or another."""
        factor = self._empty(form or self.form(), torch.device("meta"))
        return self.basis.nbytes + sum(tensor.nbytes for tensor in factor.values())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, basis_size={self.basis_size},"
            f" nnz={self.nnz}, num_blocks={self.num_blocks}, bias={self.bias is not None},"
            f" sparse_side={self.sparse_side!r}, form={self.form()!r}"
        )
