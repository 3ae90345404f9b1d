"""Linear layers with a factored weight, on :func:`torchops.stf_linear`."""

import math
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..ops.stf import stf_factorize, stf_linear, stf_linear_packed, stf_linear_straight_through, stf_pack, stf_select
from ..reference.stf import dense, stf_unpack
from ._shared_tensors import as_the_first_has_it, fill
from .stf_calibration import Fit, Moments
from .stf_sizes import (
    FORMS,
    Sizes,
    aligned,
    choose_sizes,
    from_bytes,
    mismatches,
    standard_deviation_of_latent,
    to_bytes,
)
from .stf_weight import WeightOnDemand

__all__ = ["STFLinear"]


class STFLinear(nn.Module):
    """A linear layer whose weight is a sparse factor times a small dense basis (DSFormer).

    The sparse factor has one of three forms, and each can be turned into the others:

    ==================  ==========================  ======================================================
    made by             tensors                     for
    ==================  ==========================  ======================================================
    :meth:`factored`    values, indices             training on a fixed choice of basis vectors; how it starts
    straight_through()  latent                      training that learns the choice, too
    :meth:`pack`        packed_values, mask         inference and files: factors without gradients
    ==================  ==========================  ======================================================

    Parameters change with the form, so make the optimizer afterwards. Frozen tensors stay frozen, and what packing
    froze trains again after unpacking. A state dict is loaded in the form in which it was saved, whatever the form of
    the module that loads it. The state of another layer raises an error and leaves the module unchanged. Average
    parameters only: a module whose positions, which are buffers, were averaged raises an error when it runs.

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
    cols = in_features on the output's side, and the other way round on the input's. The module holds positions of
    16 bits, those of K > 256 and masks, as bytes in a last dimension of 2; ``sparse_factor()`` returns them as
    :func:`torchops.stf_linear` takes them. ``layout`` identifies the layer of a state dict.

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
    layout: Tensor

    __jit_unused_properties__ = ["weight"]
    # Whether basis, bias and sparse factor trained before they were packed.
    _trained: Tuple[bool, bool, bool] = (True, True, True)
    # The layout that was looked at, and its version then.
    _checked: Optional[Tuple[Tensor, int]] = None

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
        # The one that is always there comes first: torch.export counts on it.
        for name in ("layout", "indices", "packed_values", "mask"):
            self.register_buffer(name, None)
        self._hold(**self._empty("factored"))
        self.reset_parameters()

    def sizes(self) -> Sizes:
        """What the shapes of the module's tensors follow from."""
        return Sizes(self.in_features, self.out_features, self.basis_size, self.nnz, self.num_blocks, self.sparse_side)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws a weight whose entries vary as those of ``nn.Linear`` do. Form and tensors stay."""
        fill(self.layout, torch.tensor(self.sizes().layout(), device=self.layout.device))
        if self.basis.is_meta:
            return
        width = self.basis.shape[2]
        nn.init.normal_(self.basis, std=max(width, 1) ** -0.5)
        std = math.sqrt(width / (3 * max(self.in_features * self.nnz, 1)))
        if self.latent is not None:
            nn.init.normal_(self.latent, std=std * standard_deviation_of_latent(self.basis_size, self.nnz))
        elif self.values is not None and self.indices is not None:
            nn.init.normal_(self.values, std=std)
            fill(self.indices, to_bytes(self._random_indices()))
        elif self.packed_values is not None and self.mask is not None:
            indices = self._random_indices()
            values = as_the_first_has_it(torch.randn(indices.shape, device=indices.device).mul_(std), self.basis)
            packed_values, mask = stf_pack(values.to(self.packed_values.dtype), indices, self.basis_size)
            fill(self.packed_values, packed_values)
            fill(self.mask, to_bytes(mask))
        if self.bias is not None:
            bound = max(self.in_features, 1) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def _random_indices(self) -> Tensor:
        """[rows, blocks, nnz], the same on all processes that share the layer (torch.distributed's DTensor)."""
        code = torch.rand(self.rows, self.num_blocks, self.basis_size, device=self.basis.device)
        indices = code.argsort(-1)[..., : self.nnz].sort(-1).values
        indices = as_the_first_has_it(indices, self.basis)
        return indices.to(torch.uint8 if self.basis_size <= 256 else torch.int16)

    def forward(self, input: Tensor) -> Tensor:
        return self._linear(input, self.bias)

    def _linear(self, input: Tensor, bias: Optional[Tensor]) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_layout()
        values, indices, latent = self.values, self.indices, self.latent
        packed_values, mask = self.packed_values, self.mask
        if latent is not None:
            return stf_linear_straight_through(input, self.basis, latent, self.nnz, bias, self.transpose)
        if packed_values is not None and mask is not None:
            mask = from_bytes(mask)
            return stf_linear_packed(input, self.basis, packed_values, mask, self.rows, bias, self.transpose)
        assert values is not None and indices is not None
        if self.basis_size > 256:
            indices = from_bytes(indices)
        return stf_linear(input, self.basis, values, indices, bias, self.transpose)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        compression: float = 2.0,
        calibration: Optional[Tensor] = None,
        sparse_side: Optional[str] = None,
        num_iterations: int = 20,
        stored_dtype: Optional[torch.dtype] = None,
    ) -> "STFLinear":
        """Factors a dense layer's weight with :func:`torchops.stf_factorize`.

        nnz and basis_size are the largest whose packed form, masks included, is smaller than the dense weight
        by the factor asked for, with basis_size about three times nnz.

        Args:
            linear: stays as it is. Its mode and what is frozen in it are passed on, its hooks are not.
            compression: bytes of the dense weight for one of the packed one.
            calibration: [..., in_features], typical inputs of the layer, more than it has features: what counts is
                then the error of its outputs, not that of its weight, and the bias takes the mean error.
            sparse_side: "output" or "input"; None for that of the larger of the layer's features.
            num_iterations: of stf_factorize.
            stored_dtype: for which bytes are counted, None for the weight's. Masks weigh more beside 16-bit numbers.

        Raises:
            ValueError: no factors are that small, or calibration is of another size, without rows or not finite.
        """
        fit = None
        if calibration is not None:
            if calibration.dim() == 0 or calibration.shape[-1] != linear.in_features:
                raise ValueError(
                    f"STFLinear.from_linear: expected calibration of shape [..., in_features = {linear.in_features}],"
                    f" got {list(calibration.shape)}"
                )
            moments = Moments()
            moments.add(calibration.to(linear.weight.device).flatten(0, -2))
            if moments.count == 0:
                raise ValueError("STFLinear.from_linear: expected calibration with at least one row, got none")
            fit = moments.fit(linear, bias_is_free=linear.bias is not None)
        return cls._fitted(linear, compression, fit, sparse_side, num_iterations, stored_dtype)

    @classmethod
    @torch.no_grad()
    def _fitted(
        cls,
        linear: nn.Linear,
        compression: float,
        fit: Optional[Fit],
        sparse_side: Optional[str],
        num_iterations: int,
        stored_dtype: Optional[torch.dtype],
    ) -> "STFLinear":
        """from_linear for what the layer should compute of its inputs, or for its weight."""
        if fit is not None and not all(t.isfinite().all() for t in fit if isinstance(t, Tensor)):
            raise ValueError("STFLinear.from_linear: expected calibration of finite numbers, got NaN or infinity")
        if sparse_side is None:
            sparse_side = "output" if linear.out_features >= linear.in_features else "input"
        rows, cols = linear.out_features, linear.in_features
        if sparse_side == "input":
            rows, cols = cols, rows
        weight = linear.weight.detach()
        basis_size, nnz = choose_sizes(rows, cols, (stored_dtype or weight.dtype).itemsize, compression)
        # Nothing is drawn, since all of it is written below.
        layer = cls(
            linear.in_features,
            linear.out_features,
            basis_size,
            nnz,
            bias=linear.bias is not None,
            sparse_side=sparse_side,
            device=torch.device("meta"),
            dtype=weight.dtype,
        ).to_empty(device=weight.device)
        # The factorization solves systems of equations: 16 bits are too few.
        wide = weight.to(weight.dtype if weight.dtype == torch.float64 else torch.float32)
        grams = {}
        if fit is not None:
            wide = fit.target(wide)
            grams = {"row_gram" if layer.transpose else "gram": fit.gram.to(wide.dtype)}
        matrix = wide.T if layer.transpose else wide
        basis, values, indices = stf_factorize(matrix, basis_size, nnz, 1, num_iterations, **grams)
        layer.basis.copy_(basis)
        layer._hold(values=values.to(weight.dtype), indices=indices).train(linear.training)
        assert layer.values is not None
        for factor in (layer.basis, layer.values):
            factor.requires_grad_(linear.weight.requires_grad)
        bias = linear.bias if fit is None else fit.bias(linear, layer.dense_weight().to(wide.dtype))
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer

    # ---- forms ----------------------------------------------------------------------------------

    def form(self) -> str:
        """ "factored", "straight-through" or "packed"."""
        return next(form for form, names in FORMS.items() if getattr(self, names[0]) is not None)

    @torch.no_grad()
    def sparse_factor(self) -> Dict[str, Tensor]:
        """A copy of values and indices, both [rows, blocks, nnz], of whatever form the module has."""
        self._check_layout(wait=True)
        if self.latent is not None:
            values, indices = stf_select(self.latent, self.nnz)
        elif self.packed_values is not None and self.mask is not None:
            values, indices = stf_unpack(self.packed_values, from_bytes(self.mask), self.rows)
        else:
            assert self.values is not None and self.indices is not None
            values, indices = self.values.clone(), self.indices.clone()
            indices = from_bytes(indices) if self.basis_size > 256 else indices
        return {"values": values, "indices": indices}

    def factored(self) -> "STFLinear":
        """Trains, from here on, the values of the basis vectors that are chosen now. Returns the module."""
        return self if self.form() == "factored" else self._hold(**self.sparse_factor())

    @torch.no_grad()
    def straight_through(self) -> "STFLinear":
        """Trains, from here on, a latent factor of which the forward takes the nnz largest of every row, and
        whose dropped entries, which start at 0, can come back. Returns the module."""
        if self.form() == "straight-through":
            return self
        factor = self.sparse_factor()
        latent = torch.zeros_like(self._empty("straight-through")["latent"])
        return self._hold(latent=latent.scatter(-1, factor["indices"].long(), factor["values"]))

    def pack(self) -> "STFLinear":
        """Makes the module smallest, for inference: nothing in it has a gradient any more. Returns the module."""
        if self.form() == "packed":
            return self
        factor = self.sparse_factor()
        packed_values, mask = stf_pack(factor["values"], factor["indices"], self.basis_size)
        return self._hold(packed_values=packed_values, mask=mask)

    def _hold(self, **factor: Tensor) -> "STFLinear":
        """Takes the sparse factor in one form and lets go of the others."""
        held = self.values if self.values is not None else self.latent
        if held is not None:
            now = (self.basis.requires_grad, self.bias is None or self.bias.requires_grad, held.requires_grad)
            self._trained = now
        trains = [before and "mask" not in factor for before in self._trained]
        for name in ("values", "latent"):
            setattr(self, name, nn.Parameter(factor[name], trains[2]) if name in factor else None)
        for name in ("indices", "packed_values", "mask"):
            setattr(self, name, to_bytes(factor[name]) if name in factor else None)
        self.layout = torch.tensor(self.sizes().layout(), device=self.basis.device)
        if "mask" in factor or held is None:
            self.basis.requires_grad_(trains[0])
            if self.bias is not None:
                self.bias.requires_grad_(trains[1])
        return self

    def _empty(self, form: str, device: Optional[torch.device] = None) -> Dict[str, Tensor]:
        shapes, device = self.sizes().shapes(), device or self.basis.device
        return {
            name: torch.empty(
                shapes[name], dtype=torch.uint8 if name in ("indices", "mask") else self.basis.dtype, device=device
            )
            for name in FORMS[form]
        }

    # ---- its state ------------------------------------------------------------------------------

    def _check_layout(self, wait: bool = False) -> None:
        """Positions are data that nothing but this module writes. Whoever averages buffers changes the layout, too."""
        layout = self.layout
        if torch.compiler.is_compiling() or type(layout) is not Tensor or layout.is_meta or layout.is_inference():
            return
        if self._checked is not None and self._checked[0] is layout and self._checked[1] == layout._version:
            return
        # DistributedDataParallel writes buffers before every forward; waiting for the device then is not worth it.
        if self.training and layout.device.type != "cpu" and not wait:
            return
        problems = mismatches(self.sizes(), {"layout": layout}, "")
        if problems:
            raise ValueError(problems[0])
        self._checked = (layout, layout._version)

    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        state = {
            name: state_dict[prefix + name]
            for name in ("basis", "bias", "layout", *sum(FORMS.values(), ()))
            if prefix + name in state_dict
        }
        for name in ("indices", "mask"):
            if name in state:  # files of older versions have int16 there
                state[name] = aligned(to_bytes(state[name]))
        form = next((form for form, names in FORMS.items() if names[0] in state), self.form())
        problems = mismatches(self.sizes(), state, prefix)
        # A factor that is not all there is of no use in another form.
        missing = [] if form == self.form() else [name for name in ("basis", *FORMS[form]) if name not in state]
        if problems or missing:
            error_msgs.extend(problems)
            missing_keys.extend(prefix + name for name in missing)
            return
        # Files of older versions have none.
        state.setdefault("layout", torch.tensor(self.sizes().layout(), device=state.get("basis", self.basis).device))
        if form != self.form():
            self._hold(**self._empty(form))
        state_dict = {**state_dict, **{prefix + name: tensor for name, tensor in state.items()}}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def loaded(self) -> "STFLinear":
        """To be called by what sets the module's tensors without ``load_state_dict``: freezes what is packed, and
        looks whether the tensors are this layer's. Returns the module.

        Raises:
            ValueError: they are another layer's.
        """
        self._check_layout(wait=True)
        if self.form() == "packed":
            self.requires_grad_(False)
        for name in ("indices", "mask"):
            setattr(self, name, aligned(getattr(self, name)))
        return self

    def __getstate__(self) -> Dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_checked"}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if "layout" not in self._buffers:  # pickled by an older version
            self.register_buffer("layout", None)
            self._hold(
                **{name: tensor for name in sum(FORMS.values(), ()) if (tensor := getattr(self, name)) is not None}
            )

    # ---- what it stands for ---------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The weight as :meth:`dense_weight` has it, for code that was written for ``nn.Linear`` and reads it: a new
        tensor, multiplied out when something is computed with it, with a gradient to the factors unless they are
        packed. Writing to it changes nothing."""
        if torch.compiler.is_compiling():  # where what is not needed is left out anyway
            return self._multiplied_out()
        return WeightOnDemand(self._multiplied_out, (self.out_features, self.in_features), self.basis)

    def _multiplied_out(self) -> Tensor:
        """The layer of the identity."""
        identity = torch.eye(self.in_features, dtype=self.basis.dtype, device=self.basis.device)
        with torch.autocast(self.basis.device.type, enabled=False):
            return self._linear(identity, None).T

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] that the factors stand for, as ``nn.Linear`` has it."""
        factor = self.sparse_factor()
        weight = dense(self.basis, factor["values"], factor["indices"])
        return weight.T if self.transpose else weight

    def num_bytes(self, form: Optional[str] = None, dtype: Optional[torch.dtype] = None) -> int:
        """Bytes of the weight's factors, positions included and the bias not, in the module's form and dtype or in
        others."""
        itemsize = (dtype or self.basis.dtype).itemsize
        tensors = [self.basis, *self._empty(form or self.form(), torch.device("meta")).values()]
        return sum(t.numel() * (itemsize if t.is_floating_point() else t.element_size()) for t in tensors)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, basis_size={self.basis_size},"
            f" nnz={self.nnz}, num_blocks={self.num_blocks}, bias={self.bias is not None},"
            f" sparse_side={self.sparse_side!r}, form={self.form()!r}"
        )
