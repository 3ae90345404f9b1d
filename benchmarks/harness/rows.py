"""What a family declares: rows of contenders that do the same work on the same inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]

FORWARD = "forward"
FORWARD_BACKWARD = "forward + backward"


def as_it_is(outputs: Tensors) -> Tensors:
    return outputs


@dataclass(frozen=True)
class Contender:
    """One way to do a row's work.

    Args:
        run: does it once, and returns everything that it made: outputs, then gradients.
        align: brings these into the order and layout of torchops's, for the comparison before the
            timing; never timed.
        is_bound: it does less than the work (a copy moves the bytes and no more): a bound to come
            close to, not a rival to beat, and not compared.
        target: the ratio, this contender's time / torchops's time, that torchops wants to reach.
    """

    run: Callable[[], Tensors]
    align: Callable[[Tensors], Tensors] = as_it_is
    is_bound: bool = False
    target: float | None = None


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        operation: what is done, for instance "merge_tokens"; rows of one operation share a table.
        shape: the inputs' shape in words.
        dtype: dtype of the activations.
        direction: FORWARD or FORWARD_BACKWARD.
        contenders: makes the inputs and the contenders by name, "torchops" among them; called when the
            row's turn comes, so that only one row's inputs are in memory.
    """

    operation: str
    shape: str
    dtype: torch.dtype
    direction: str
    contenders: Callable[[], Mapping[str, Contender]]

    @property
    def label(self) -> str:
        return f"{self.operation}, {self.shape}, {dtype_name(self.dtype)}, {self.direction}"


@dataclass(frozen=True)
class Options:
    """What the command line asks of a family: quick is for a first look at a few rows, full adds those
    that need much time or memory."""

    device: torch.device
    dtypes: Sequence[torch.dtype]
    quick: bool
    full: bool


def contender(
    forward: Callable[[], Tensors],
    inputs: Tensors,
    grad_output: Tensor,
    align: Callable[[Tensors], Tensors] = as_it_is,
    target: float | None = None,
) -> Contender:
    """A contender that calls forward and then, if inputs require gradients, takes those of its first
    output to them, grad_output being the gradient of that output, made beforehand."""

    def forward_and_backward() -> Tensors:
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs[0], inputs, grad_output))

    needs_gradients = any(input.requires_grad for input in inputs)
    return Contender(forward_and_backward if needs_gradients else forward, align, target=target)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
