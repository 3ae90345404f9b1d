"""What the functions of this package do alike: their group, whether all ranks call them alike, autocast and graphs."""

import functools
from typing import Any, Callable, Container, Dict, Mapping, Optional, Set, Tuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# By group, the configurations that all of its ranks have agreed on.
_agreed: "WeakKeyDictionary[dist.ProcessGroup, Set[str]]" = WeakKeyDictionary()


def outside_graphs(function: Function) -> Function:
    """A graph of torch.compile has no place for messages between two ranks, nor for numbers that all have agreed on: it
    ends before the function and another begins behind it."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # Not as a decorator, which would import the compiler with this package.
        called = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return called(*args, **kwargs)

    return cast(Function, wrapper)


def members(name: str, group: Optional[dist.ProcessGroup]) -> Tuple[dist.ProcessGroup, int, int]:
    """The group, the default one for None, this process's rank in it, and how many there are."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{name}: expected group to have this process, got one without rank {dist.get_rank()}")
    group = dist.group.WORLD if group is None else group
    assert group is not None  # get_rank has raised where there is no default one
    return group, rank, dist.get_world_size(group)


def agree(name: str, group: dist.ProcessGroup, configuration: Dict[str, Any], check: Callable[[], None]) -> None:
    """Checks this rank's arguments, and that the configuration is the same on all ranks.

    The first call with a configuration is one collective, and so every rank learns of an error on another and raises
    instead of waiting for it. Later ones are a look into a set: then a rank that calls otherwise meets a timeout.
    """
    agreed = _agreed.setdefault(group, set())
    mine = repr(configuration)
    if mine in agreed:
        return
    error: Optional[Exception] = None
    try:
        check()
    except Exception as raised:  # whatever it is, the others wait
        error = raised
    answers: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (None if error is None else str(error), configuration), group=group)
    if error is not None:
        raise error
    for rank, (message, other) in enumerate(answers):
        if message is not None:
            raise ValueError(f"{message}, on rank {rank}")
        for argument in {**answers[0][1], **other}:
            first, here = (entries.get(argument) for entries in (answers[0][1], other))
            if first != here:
                raise ValueError(
                    f"{name}: expected {argument} to be the same on all ranks, got {first} on rank 0 and {here} on rank"
                    f" {rank}"
                )
    agreed.add(mine)


def check_without_data(
    name: str, function: Callable[..., Any], tensors: Mapping[str, Optional[Tensor]], **options: Any
) -> None:
    """Calls an operator on tensors without data, for its errors."""
    given = {argument: tensor for argument, tensor in tensors.items() if tensor is not None}
    first, *others = given
    for argument in others:
        if given[argument].device != given[first].device:
            raise ValueError(
                f"{name}: expected {argument} on the device of {first}, {given[first].device}, got"
                f" {given[argument].device}"
            )
    with torch.no_grad():
        without_data = {argument: tensor.to("meta") for argument, tensor in given.items()}
        function(**{argument: without_data.get(argument) for argument in tensors}, **options)


def described(tensors: Mapping[str, Optional[Tensor]], of_rows: Container[str] = ()) -> Dict[str, Any]:
    """What must be the same on all ranks of tensors that are arguments, for :func:`agree`. Ranks may have different
    numbers of rows of those in ``of_rows``."""
    entries: Dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            entries[f"{name}'s shape"] = None
        else:
            *sizes, last = tensor.shape if tensor.dim() else (1,)
            entries[f"{name}'s shape"] = ["...", last] if name in of_rows else [*sizes, last]
            entries[f"{name}'s dtype"] = tensor.dtype
            entries[f"{name}'s device"] = tensor.device.type
            entries[f"{name}'s requires_grad"] = torch.is_grad_enabled() and tensor.requires_grad
    return entries


def lowered(tensor: Tensor) -> Tensor:
    """As autocast hands it to an operator that it lowers: what is sent is sent in that dtype."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
