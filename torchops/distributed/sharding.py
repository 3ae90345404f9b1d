"""Makes the operators work on DTensors, by the rules of :mod:`torchops.distributed.sharding_rules`.

DTensor asks for the placements that an operator can be computed with, takes those that cost least to come by, and calls
the operator on each process's part. Autograd runs above it: the gradient is another operator, with a rule of its own.
"""

import itertools
import math
from functools import partial
from typing import Any, Callable, Container, Dict, FrozenSet, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from .._namespace import operators
from .sharding_rules import RULES, Arguments, Dimension, Rule

__all__: List[str] = []


class Kept(Partial):
    """Where a tensor lies that flattens leading dimensions and is divided along another than the first of them."""

    def __init__(self, label: str) -> None:
        super().__init__(f"kept {label}")


Labels = Tuple[str, ...]
Placements = List[Optional[Placement]]
Sharding = Tuple[Placements, Placements]
# Of DTensor: the choices for a call.
Strategy = Callable[[Any], Any]
NO_RULE = Rule({}, ())


class Call:
    """One call of an operator under a rule: what its tensors' dimensions are, and how many there are of each."""

    def __init__(self, schema: torch.FunctionSchema, rule: Rule, arguments: Arguments) -> None:
        self.rule = rule
        self.arguments = arguments
        self.inputs = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        self.outputs = [returned.name or "output" for returned in schema.returns]
        self.specs = {name: spec for name in self.inputs if hasattr(spec := arguments[name], "placements")}
        self.mesh = next(iter(self.specs.values())).mesh
        self.num_leading = max(
            (
                len(spec.shape) + 1 - len(letters)
                for name, spec in self.specs.items()
                if (letters := self.letters(name)).startswith("*")
            ),
            default=0,
        )
        self.sizes = dict(
            itertools.chain.from_iterable(
                zip(self.labels(name), spec.shape, strict=False)
                for name, spec in self.specs.items()
                if name not in rule.kept
            )
        )

    def letters(self, name: str) -> str:
        """Those of a tensor, or of what it is a gradient to."""
        name = name.removeprefix("grad_")
        return self.rule.kept.get(name) or self.rule.tensors.get(name, "")

    def labels(self, name: str) -> Labels:
        """One for each dimension: its letter, or "*0", "*1" for leading ones."""
        letters = self.letters(name)
        leading = [f"*{dim}" for dim in range(self.num_leading)] if letters.startswith("*") else []
        return (*leading, *letters.removeprefix("*"))

    def shardings(self) -> Iterator[Sharding]:
        """What can be done along one dimension of a mesh: all of it by everyone, or a part by each."""
        yield self.sharding(Dimension("", ""), frozenset())
        for dimension in self.rule.dimensions:
            if not dimension.when(self.arguments):
                continue
            for labels in self.alternatives(dimension):
                labels = self.divided(dimension, labels)
                if labels:
                    yield self.sharding(dimension, labels)

    def alternatives(self, dimension: Dimension) -> Iterator[FrozenSet[str]]:
        letters = frozenset(dimension.letters)
        if "*" not in letters:
            yield letters
            return
        # No tokens are nothing to divide.
        for dim in range(0 if any(self.sizes[f"*{dim}"] == 0 for dim in range(self.num_leading)) else self.num_leading):
            yield (letters if dim == 0 else letters - {"T"}) - {"*"} | {f"*{dim}"}

    def divided(self, dimension: Dimension, labels: FrozenSet[str]) -> FrozenSet[str]:
        """Those of the labels whose tensors are sharded; none where parts would not belong together."""
        sizes = {label: self.sizes[label] for label in labels if label in self.sizes}
        largest = max(sizes.values(), default=0)
        if dimension.broadcasts and largest > 1:
            labels = labels - {label for label, size in sizes.items() if size == 1}
            sizes = {label: size for label, size in sizes.items() if size > 1}
        if dimension.even or len(set(sizes.values())) > 1:
            # Along how many dimensions of the mesh it will be divided is not known here.
            sides = [self.mesh.size(dim) for dim in range(self.mesh.ndim)]
            counts = {math.prod(some) for n in range(len(sides)) for some in itertools.combinations(sides, n + 1)}
            if any(size < min(counts) for size in sizes.values()) or any(
                size % count for size in sizes.values() for count in counts if count <= size
            ):
                return frozenset()
        return labels

    def sharding(self, dimension: Dimension, labels: FrozenSet[str]) -> Sharding:
        outputs: Placements = [self.of_output(name, dimension, labels) for name in self.outputs]
        return outputs, [self.of_input(name, dimension, labels) if name in self.specs else None for name in self.inputs]

    def of_input(self, name: str, dimension: Dimension, labels: FrozenSet[str]) -> Placement:
        shard = self.shard(name, labels)
        if shard is not None:
            return shard
        if labels and name in self.rule.kept:
            return self.of_output(name, dimension, labels)
        return Partial() if labels and name in dimension.outside else Replicate()

    def of_output(self, name: str, dimension: Dimension, labels: FrozenSet[str]) -> Placement:
        shard = self.shard(name, labels)
        if shard is not None:
            return shard
        leading = [label for label in labels if label.startswith("*")]
        if leading and name in self.rule.kept:
            return Kept(leading[0])
        is_sum = labels and name not in dimension.whole and name.removeprefix("grad_") not in dimension.outside
        return Partial(dimension.reduction) if is_sum else Replicate()

    def shard(self, name: str, labels: FrozenSet[str]) -> Optional[Shard]:
        return next((Shard(dim) for dim, label in enumerate(self.labels(name)) if label in labels), None)


def is_tensor(value: Any) -> bool:
    """As register_sharding's strategies have them."""
    return hasattr(value, "strategies")


def shardings(op: torch._ops.OpOverload, rule: Rule, *args: Any, **kwargs: Any) -> Sequence[Sharding]:
    """What register_sharding asks for."""
    arguments: Dict[str, Any] = {argument.name: argument.default_value for argument in op._schema.arguments}
    arguments |= zip(arguments, args, strict=False)
    return list(Call(op._schema, rule, arguments | kwargs).shardings())


def placed_tensors(op: torch._ops.OpOverload, op_schema: Any) -> Iterator[Tuple[str, Tuple[Placement, ...]]]:
    """The tensors of a call by name, and where they lie."""
    for argument, value in zip(op._schema.arguments, op_schema.args_schema, strict=False):
        if is_tensor(value):
            yield argument.name, value.strategies[0].output_spec.placements


def with_kept_in_place(strategy: Strategy, op: torch._ops.OpOverload, kept: Container[str]) -> Strategy:
    """A strategy without the choices that move tensors which mean something only where they are."""

    def in_place(op_schema: Any) -> Any:
        choices = strategy(op_schema)
        for position, (name, there) in enumerate(placed_tensors(op, op_schema)):
            if name in kept:
                choices.strategies = [c for c in choices.strategies if c.input_specs[position].placements == there]
                if not choices.strategies:
                    raise ValueError(
                        f"{name_of(op)}: expected {name} divided as its forward divides it, got {list(there)}"
                    )
        return choices

    return in_place


def of_whole_tensors(strategy: Strategy, op: torch._ops.OpOverload, reason: str) -> Strategy:
    """A strategy that sends nothing: where something is divided, the caller says how it comes together."""

    def whole(op_schema: Any) -> Any:
        for name, there in placed_tensors(op, op_schema):
            if not all(placement.is_replicate() for placement in there):
                raise ValueError(
                    f"{name_of(op)}: expected {name} whole on every process, for {reason}, got {list(there)}: "
                    "redistribute it to Replicate() first"
                )
        return strategy(op_schema)

    return whole


def name_of(op: torch._ops.OpOverload) -> str:
    return op._schema.name.split("::")[1]


def register(op: torch._ops.OpOverload, rule: Union[Rule, str]) -> None:
    register_sharding(op)(partial(shardings, op, NO_RULE if isinstance(rule, str) else rule))
    propagator = DTensor._op_dispatcher.sharding_propagator
    positional = [argument for argument in op._schema.arguments if not argument.kwarg_only]
    are_tensors = ["Tensor" in str(argument.type) for argument in positional]
    # Of the arguments that are no tensors register_sharding has a choice remembered by integers alone, but all of them
    # say what the outputs are.
    remembered_by = RuntimeSchemaInfo(
        are_tensors.index(False) if False in are_tensors else len(are_tensors),
        [argument.name for argument in op._schema.arguments if argument.kwarg_only] or None,
    )
    strategy = propagator.op_strategy_funcs[op]
    if isinstance(rule, str):
        strategy = of_whole_tensors(strategy, op, rule)
    elif rule.kept:
        strategy = with_kept_in_place(strategy, op, rule.kept)
    propagator.register_op_strategy(op, strategy, remembered_by)


for _name, _rule in RULES.items():
    register(getattr(operators, _name).default, _rule)
