"""What a case table says of an operator, what it fills inputs with, and the comparisons that the contract makes."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor

import torchops
from torchops._namespace import operators

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest magnitude in the expected tensor. Rounding of the result dominates in 16 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

LARGE = 700

# Whether this run is for one of the lower CPU levels (tests/test_levels.py).
FOR_ONE_LEVEL = bool(os.environ.get("TORCHOPS_CPU_CAPABILITY"))
# Under this name a test records what a process of its own has executed: a CPU level, or the CUDA floor on the host.
# conftest.py lists it at the end of a run.
EXECUTED = "executed"
CUDA_ON_HOST = "CUDA on the host"
# The CPU levels that tests/cpp/emulated builds without their instructions.
EMULATED = ("avx512_bf16", "amx")
BY_EMULATION = "by emulation: "

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One call of an operator: its arguments by name."""

    id: str
    inputs: Inputs


@dataclass(frozen=True)
class Invalid:
    """A call that must fail with this message, a ValueError."""

    id: str
    inputs: Inputs
    message: str
    # Whether it takes the data to see the mistake: fake tensors then cannot raise it.
    data_dependent: bool = False


@dataclass(frozen=True)
class OpCase:
    """An operator's row: its calls, and what is expected of them beside its reference."""

    name: str
    # (dtype, device) -> the calls that are compared with the reference; awkward and empty shapes included.
    samples: Callable[[torch.dtype, str], Iterable[Sample]]
    # device -> calls that must fail.
    invalid: Callable[[str], Iterable[Invalid]]
    # (dtype, device, length) -> a call of any length; the contract takes LARGE to have it split over threads.
    sized: Callable[[torch.dtype, str, int], Inputs]
    # The mathematics in plain PyTorch; None for an internal operator, which those that call it test.
    reference: Callable | None = None
    # The arguments that have gradients, and the operator that computes them, if that takes one.
    differentiable: Sequence[str] = ()
    backward: str = ""
    # What of the outputs is compared with the reference, where they are one of many right answers.
    compared: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
    # How far outputs and gradients may be off in a dtype, where that is more than TOLERANCE.
    output_tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    gradient_tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    # Those of `differentiable` whose gradient is another than the derivative, by design.
    straight_through: Sequence[str] = ()
    # Whether it is composed of torch's dense decompositions, which wait for a CUDA device, and whose bits may differ
    # between numbers of threads.
    decomposes: bool = False
    # Those of `differentiable` whose gradient torch adds up, which inductor does in an order of its own.
    summed_by_torch: Sequence[str] = ()
    # The tensor arguments whose first dimension is not the batch.
    unbatched: Sequence[str] = ()
    # The tensor arguments that are read as they lie, in an order of sums that depends on which dimension is contiguous.
    bits_follow_layout: Sequence[str] = ()
    # The tensor arguments whose rows depend on each other: many times the first one is not valid.
    not_expanded: Sequence[str] = ()
    # The smallest batch of an exported program: torch.export tells sizes that become 1 from others.
    least_batch: int = 1
    # device -> (inputs under autocast, inputs that give the same without it); None where it changes nothing.
    autocast: Callable[[str], tuple[Inputs, Inputs]] | None = None
    # Kernels of our own that a sized call launches on CUDA when everything is float32.
    launches: int | None = None
    # device -> a call in which a tensor has more than 2**31 elements and no row of the batch depends on another.
    large: Callable[[str], Inputs] | None = None

    @property
    def is_internal(self) -> bool:
        """Called by other operators only: a backward, or a forward that also returns what its backward needs."""
        return self.name.startswith("_")

    @property
    def op(self) -> Callable:
        """The function a user calls, resp. the registered operator of an internal one."""
        return getattr(operators, self.name).default if self.is_internal else getattr(torchops, self.name)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(operators, self.name).default

    def __str__(self) -> str:
        return self.name


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def integers(low: int, high: int, *shape: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(device)


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors an operator returned; a gradient that was not asked for is None."""
    return [result] if isinstance(result, Tensor) else [out for out in result if out is not None]


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def to_double(inputs: Inputs) -> Inputs:
    return map_tensors(inputs, lambda t: t.detach().double() if t.is_floating_point() else t)


def lowered(wide: Inputs, *kept: str) -> tuple[Inputs, Inputs]:
    """Inputs under autocast, and those of the one dtype to which it brings all that is multiplied or added, but for
    those that it keeps."""
    return wide, {
        name: value.bfloat16()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in kept
        else value
        for name, value in wide.items()
    }


def require_grad(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """A copy in which the named tensors are leaves that require a gradient."""
    return {
        name: value.detach().clone().requires_grad_() if name in names and value is not None else value
        for name, value in inputs.items()
    }


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All non-empty selections; of many names, those of one or two, and those that leave out one at most."""
    sizes = range(1, len(names) + 1) if len(names) <= 5 else (1, 2, len(names) - 1, len(names))
    return list(chain.from_iterable(combinations(names, size) for size in sizes))


def given(inputs: Inputs, names: Sequence[str]) -> list[str]:
    return [name for name in names if inputs.get(name) is not None]


def differentiable_outputs(result: Any) -> list[Tensor]:
    return [out for out in outputs_of(result) if out.requires_grad]


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients of the outputs, the same for outputs of the same shapes."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(device=out.device, dtype=out.dtype)
        for out in outputs
    ]


def gradients_of(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """From the gradients of all outputs, some of which may have none; None for an input that none depends on."""
    used = [index for index, out in enumerate(outputs) if out.requires_grad]
    of_used = [grads[index].to(outputs[index]) for index in used]
    return torch.autograd.grad([outputs[index] for index in used], inputs, of_used, allow_unused=True)


def gradients(op: Callable, inputs: Inputs, names: Sequence[str]) -> list[Tensor]:
    inputs = require_grad(inputs, names)
    outputs = differentiable_outputs(op(**inputs))
    return list(torch.autograd.grad(outputs, [inputs[name] for name in names], cotangents(outputs)))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, tolerance: float = 0) -> None:
    """`expected` is a float64 result, or integers; `dtype` is what the operator computed in."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), f"{what}: {actual} is not {expected}"
        return
    if actual.numel() == 0:
        return
    tolerance = max(TOLERANCE[dtype], TOLERANCE[actual.dtype], tolerance)
    scale = expected.abs().nan_to_num(posinf=0).max().clamp(min=1e-30).item()
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert len(actual) == len(expected), what
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, what
        assert torch.equal(as_bytes(one), as_bytes(other)), f"{what}: bits differ"


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
