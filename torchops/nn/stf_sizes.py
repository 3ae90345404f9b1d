"""Sizes of factors: which fit into bytes, which a layer's tensors have, and how a state dict records them."""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ._shared_tensors import whole

__all__: List[str] = []

ROWS_PER_GROUP = 16
MOST_VECTORS = 32767
# Basis vectors for each that a row combines: of all ways to divide the bytes the one that comes closest to trained
# layers (docs/decisions/stf_sizes.md).
VECTORS_PER_NONZERO = 3
# The tensors of each form of the sparse factor, by which a state dict tells which one it holds.
FORMS = {"factored": ("values", "indices"), "straight-through": ("latent",), "packed": ("packed_values", "mask")}
# Neither float32 nor float64 has this number: no average of layouts comes out as one.
NEVER_AN_AVERAGE = 2**62 + 1


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
        # Rounded down, so that what is printed is accepted.
        hundredths = 100 * dense_bytes // bytes_together if cols > VECTORS_PER_NONZERO else 0
        if hundredths < 100:
            raise ValueError(
                f"STFLinear.from_linear: expected a layer whose factors are smaller than it, got {rows} x {cols}"
            )
        raise ValueError(
            f"STFLinear.from_linear: expected compression in 1..{hundredths / 100:.2f} for {rows} x {cols},"
            f" got {compression}"
        )
    most_vectors = min(cols, MOST_VECTORS)
    basis_size = min(int((most_bytes - nnz * bytes_per_nonzero) / bytes_per_vector), most_vectors)
    if basis_size == most_vectors:
        nnz = min(int((most_bytes - basis_size * bytes_per_vector) / bytes_per_nonzero), basis_size)
    return basis_size, nnz


def to_bytes(positions: Tensor) -> Tensor:
    """Positions as a layer holds them: of 16 bits each as two bytes [..., 2], since no backend of torch.distributed
    sends 16-bit integers."""
    return positions.contiguous().unsqueeze(-1).view(torch.uint8) if positions.dtype == torch.int16 else positions


def from_bytes(positions: Tensor) -> Tensor:
    """int16 [...] of bytes [..., 2]."""
    if torch.jit.is_scripting():  # TorchScript has no view as another dtype
        return torch.ops.aten.view_copy(positions, dtype=torch.int16).squeeze(-1)
    return positions.view(torch.int16).squeeze(-1)


def aligned(positions: Optional[Tensor]) -> Optional[Tensor]:
    """Bytes where numbers of 16 bits can stand: tensors that are mapped from a file may start anywhere."""
    if positions is None or positions.is_meta or type(positions) is not Tensor:
        return positions
    return positions.clone() if positions.data_ptr() % 2 else positions


class Sizes(NamedTuple):
    """What a factored layer's tensors follow from."""

    in_features: int
    out_features: int
    basis_size: int
    nnz: int
    num_blocks: int
    sparse_side: str

    @property
    def rows(self) -> int:
        return self.in_features if self.sparse_side == "input" else self.out_features

    @property
    def cols(self) -> int:
        return self.out_features if self.sparse_side == "input" else self.in_features

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        """Of all tensors that a layer can have."""
        groups = -(-self.rows // ROWS_PER_GROUP)
        return {
            "basis": (self.num_blocks, self.basis_size, self.cols // self.num_blocks),
            "bias": (self.out_features,),
            "values": (self.rows, self.num_blocks, self.nnz),
            "indices": (self.rows, self.num_blocks, self.nnz) + ((2,) if self.basis_size > 256 else ()),
            "latent": (self.rows, self.num_blocks, self.basis_size),
            "packed_values": (groups, self.num_blocks, ROWS_PER_GROUP * self.nnz),
            "mask": (groups, self.num_blocks, self.basis_size, 2),
        }

    def layout(self) -> List[int]:
        """The numbers that stand in the state dict, and tell layers apart whose tensors look alike."""
        return [NEVER_AN_AVERAGE, self.sparse_side == "input", *self[:5]]

    @classmethod
    def of(cls, layout: Tensor) -> "Sizes":
        """What a state dict says about its layer.

        Raises:
            ValueError: it is no layout, or an average of some.
        """
        numbers = whole(layout).tolist()
        if len(numbers) != 7 or numbers[0] != NEVER_AN_AVERAGE:
            raise ValueError(
                "expected positions as they were made, got such as an average was taken of: average parameters only"
                " (timm's ModelEmaV3; torch's AveragedModel with use_buffers=False)"
            )
        in_features, out_features, basis_size, nnz, num_blocks = numbers[2:]
        return cls(in_features, out_features, basis_size, nnz, num_blocks, "input" if numbers[1] else "output")

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())


def mismatches(sizes: Sizes, state: Dict[str, Any], prefix: str) -> List[str]:
    """Why tensors (by the names that they have in a layer) do not belong to a layer of these sizes."""
    layout = state.get("layout")
    if layout is not None and not layout.is_meta:
        try:
            other = Sizes.of(layout)
        except ValueError as error:
            return [f"STFLinear {prefix[:-1]}: {error}"]
        if other != sizes:
            return [f"STFLinear {prefix[:-1]}: expected the state of a layer with {sizes}, got one with {other}"]
    return [
        f"size mismatch for {prefix}{name}: copying a param with shape {state[name].shape} from checkpoint, the shape"
        f" in current model is {torch.Size(shape)}."
        for name, shape in sizes.shapes().items()
        if name in state and tuple(state[name].shape) != shape
    ]


def standard_deviation_of_latent(basis_size: int, nnz: int) -> float:
    """That of normal numbers whose nnz of basis_size largest in magnitude vary with 1."""
    share = nnz / max(basis_size, 1)
    if not 0 < share < 1:
        return 1.0
    threshold = math.sqrt(2) * torch.special.erfinv(torch.tensor(1 - share, dtype=torch.float64)).item()
    density = math.exp(-threshold * threshold / 2) / math.sqrt(2 * math.pi)
    return 1 / math.sqrt(1 + 2 * threshold * density / share)
