"""The weight of a factored layer, for code that asks for it."""

from typing import Any, Callable, List, Tuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__: List[str] = []

# What a tensor says about itself without its numbers.
METADATA = {
    Tensor.device.__get__,
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
}


class WeightOnDemand(Tensor):
    """A dense weight that is multiplied out when something is computed with it.

    Models read a linear layer's weight for its dtype or device, where the product would cost more than the layer.
    torch's own layers, which read it to compute with it in their stead, leave a tensor of another class to it.
    """

    multiply_out: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, multiply_out: Callable[[], Tensor], shape: Tuple[int, int], like: Tensor) -> "WeightOnDemand":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, multiply_out: Callable[[], Tensor], shape: Tuple[int, int], like: Tensor) -> None:
        self.multiply_out = multiply_out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(WeightOnDemand, lambda weight: weight.multiply_out(), (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]
