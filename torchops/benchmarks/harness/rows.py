"""What a family declares: rows of contenders that do the same work on the same inputs, and what is to be
made of the figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
            timing; never timed. Those at the end may be left out. None: it answers another question (full
            attention beside a window), so that there is nothing to compare.
        is_bound: it does less than the work (a copy moves the bytes and no more): a bound to come
            close to, not a rival to beat, and not compared.
        target: the ratio, this contender's time / torchops's time, that torchops wants to reach.
        memory_target: bytes that a call may add to what is resident, at its peak.
    """

    run: Callable[[], Tensors]
    align: Callable[[Tensors], Tensors] | None = as_it_is
    is_bound: bool = False
    target: float | None = None
    memory_target: int | None = None


@dataclass(frozen=True)
class Absent:
    """Stands for a contender that is not tried in a row, and says why. One that is tried and fails becomes
    absent for that reason."""

    reason: str


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
        parameters: the numbers behind shape, by which curves and findings pick rows.
        setup_seconds, round_seconds: about what it takes to make the contenders, and to call each of them
            once, on a machine of two cores: for the estimate of a run's duration, and for its progress bar.
    """

    operation: str
    shape: str
    dtype: torch.dtype
    direction: str
    contenders: Callable[[], Mapping[str, Contender | Absent]]
    parameters: Mapping[str, int] = field(default_factory=dict)
    setup_seconds: float = 0.1
    round_seconds: float = 0.0

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


@dataclass(frozen=True)
class Curves:
    """A plot of one operation's rows over a parameter: a panel for each dtype and direction, a curve for each
    contender.

    Args:
        name: part of the image's name.
        parameter: what the rows differ in.
        fixed: the values of other parameters that a row has, to be in it.
        shows: seconds of a call, or their ratio to torchops's.
        only: the dtypes and directions to show; all by default.
    """

    name: str
    title: str
    operation: str
    parameter: str
    fixed: Mapping[str, int]
    shows: Literal["seconds", "ratio"]
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A table that a family makes of its figures; whether it is also on the page of the family."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    on_family_page: bool = False


def contender(
    forward: Callable[[], Tensors],
    inputs: Tensors,
    grad_output: Tensor,
    align: Callable[[Tensors], Tensors] | None = as_it_is,
    target: float | None = None,
    memory_target: int | None = None,
) -> Contender:
    """A contender that calls forward and then, if inputs require gradients, takes those of its first
    output to them, grad_output being the gradient of that output, made beforehand."""

    def forward_and_backward() -> Tensors:
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs[0], inputs, grad_output))

    needs_gradients = any(input.requires_grad for input in inputs)
    run = forward_and_backward if needs_gradients else forward
    return Contender(run, align, target=target, memory_target=memory_target)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
