"""Tensors of modules that the processes of torch.distributed share (DTensor), for what computes with all of them."""

from typing import Any, List

import torch
from torch import Tensor

__all__: List[str] = []  # for modules that draw or factor their own tensors


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_the_first_has_it(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has made for itself, taken from the first of those that share another one."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is not None:
        for dim in range(mesh.ndim):
            torch.distributed.broadcast(tensor, group=mesh.get_group(dim), group_src=0)
    return tensor


def fill(tensor: Any, values: Tensor) -> None:
    """Copies values that all processes have, of which each keeps its part."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
