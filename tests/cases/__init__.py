"""Every operator's rows of the contract: one module per family, each with a list CASES."""

import importlib
import pkgutil

import pytest
import torch
from contract import FLOATS, OpCase

ALL: list[OpCase] = [
    case
    for module in pkgutil.iter_modules(__path__)
    for case in importlib.import_module(f"{__name__}.{module.name}").CASES
]
PUBLIC: list[OpCase] = [case for case in ALL if not case.is_internal]

EVERY_OP = pytest.mark.parametrize("case", ALL, ids=str)
# What runs on kernels of our own, and so never waits for a CUDA device.
KERNEL_OPS = pytest.mark.parametrize("case", [case for case in ALL if not case.decomposes], ids=str)
PUBLIC_OPS = pytest.mark.parametrize("case", PUBLIC, ids=str)
DIFFERENTIABLE_OPS = pytest.mark.parametrize("case", [case for case in ALL if case.differentiable], ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def backward_tolerance(case: OpCase, dtype: torch.dtype) -> float:
    """What gradients are allowed, for the operator that computes them."""
    return max((other.gradient_tolerance.get(dtype, 0) for other in ALL if other.backward == case.name), default=0)
