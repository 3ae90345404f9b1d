"""In which order a model runs its layers, and which parts of it can be run by themselves."""

import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ._calibration import current_padding, first_argument, ignored_padding, observed

__all__: List[str] = []  # for factorize_ alone

# What arguments of a block may be beside tensors: a cache would be another after the first run.
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Seen:
    """A value that was seen, to tell whether it is there again, and nobody has written to it since."""

    def __init__(self, value: Any) -> None:
        self._value = weakref.ref(value) if isinstance(value, Tensor) else value
        self._state: Any = None
        if isinstance(value, Tensor):
            # A tensor of inference mode does not count what is written to it.
            self._state = value.clone() if value.is_inference() else value._version

    def is_(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return type(value) is type(self._value) and value == self._value
        tensor = self._value() if isinstance(self._value, weakref.ref) else None
        if tensor is None or tensor is not value:
            return False
        return bool(torch.equal(self._state, tensor) if tensor.is_inference() else self._state == tensor._version)


@dataclass
class Stage:
    """Layers that get the same inputs, and the block that runs them, None for the whole model."""

    layers: List[nn.Module]
    block: Optional[nn.Module]


class Flow(NamedTuple):
    """How a block follows another: its argument of this place is that result of the other, both flattened."""

    source: nn.Module
    argument: int
    result: int


@dataclass
class Call:
    """The flattened arguments of a block, and what was in force around the call."""

    arguments: List[Any]
    structure: TreeSpec
    padding: Optional[Tensor] = field(default_factory=current_padding)
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    autocast: Dict[str, Tuple[bool, torch.dtype]] = field(default_factory=lambda: autocast_states())

    @classmethod
    def of(cls, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> "Call":
        return cls(*tree_flatten((args, kwargs))).own()

    def own(self) -> "Call":
        """With tensors that nobody else writes to."""
        return replace(self, arguments=[v.clone() if isinstance(v, Tensor) else v for v in self.arguments])

    @contextmanager
    def around(self) -> Iterator[None]:
        with ExitStack() as stack:
            for device, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype, enabled))
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.no_grad())
            stack.enter_context(ignored_padding(self.padding))
            yield

    def run(self, block: nn.Module) -> Any:
        # A block may write to what it is given.
        args, kwargs = tree_unflatten(self.own().arguments, self.structure)
        with self.around():
            return block(*args, **kwargs)


def autocast_states() -> Dict[str, Tuple[bool, torch.dtype]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices}


def blocks_of(model: nn.Module, layers: Dict[nn.Module, List[str]]) -> Dict[nn.Module, nn.Module]:
    """The outermost element of an ``nn.ModuleList`` around each layer, or else of an ``nn.Sequential``."""
    blocks = {}
    for layer, names in layers.items():
        around = [_around(model, name) for name in names]
        if around[0] is not None and all(block is around[0] for block in around):
            blocks[layer] = around[0]
    return blocks


def _around(model: nn.Module, name: str) -> Optional[nn.Module]:
    path = [model]
    for part in name.split("."):
        path.append(path[-1]._modules[part])  # type: ignore[arg-type]
    for kind in (nn.ModuleList, nn.Sequential):
        for parent, child in zip(path, path[1:], strict=False):
            if isinstance(parent, kind):
                return child
    return None


class Plan:
    """In which order layers are called, by what blocks, found in one run of the model.

    Attributes:
        stages: of layers that were called.
        calls: of each layer, how many.
        flows: of blocks that follow others.
        first_calls: those of the block that was called first.
    """

    def __init__(self, model: nn.Module, layers: Dict[nn.Module, List[str]], run: Callable[[], Any]) -> None:
        self.stages: List[Stage] = []
        self.calls: Dict[nn.Module, int] = {}
        self.flows: Dict[nn.Module, Flow] = {}
        self.first_block: Optional[nn.Module] = None
        self.first_calls: List[Call] = []
        self._blocks = blocks_of(model, layers)
        self._block_calls: Dict[nn.Module, int] = dict.fromkeys(self._blocks.values(), 0)
        self._all_flows: Dict[nn.Module, List[Optional[Flow]]] = {block: [] for block in self._block_calls}
        self._not_alone: Set[nn.Module] = set()  # blocks that cannot be run by themselves
        self._active: List[nn.Module] = []
        # The block that was called last: its arguments' structure, these, and its results.
        self._last: Optional[Tuple[nn.Module, TreeSpec, List[Seen], List[Seen]]] = None
        self._last_input: Optional[Seen] = None

        blocks = list(self._block_calls)
        hooks = [block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True) for block in blocks]
        hooks += [block.register_forward_hook(self._leave, with_kwargs=True, always_call=True) for block in blocks]
        try:
            with observed(model, layers, self._look):
                run()
        finally:
            for hook in hooks:
                hook.remove()
        del self._last, self._last_input
        for stage in self.stages:
            if stage.block in self._not_alone:
                stage.block = None
        for block, flows in self._all_flows.items():
            flow = flows[0] if flows else None
            if flow is None or block in self._not_alone or len(flows) != self._block_calls.get(flow.source):
                continue
            if all(other == flow for other in flows):
                self.flows[block] = flow

    def is_called_once(self, stage: Stage) -> bool:
        """Whether a run of the stage's block calls each of its layers once."""
        runs = 1 if stage.block is None else self._block_calls[stage.block]
        return all(self.calls[layer] == runs for layer in stage.layers)

    def _look(self, layer: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        input, block = first_argument(args, kwargs), self._blocks.get(layer)
        if block is not None and block not in self._active:
            self._not_alone.add(block)
        if layer not in self.calls:
            stage = self.stages[-1] if self.stages else None
            if (
                stage is not None
                and stage.block is block
                and self._last_input is not None
                and self._last_input.is_(input)
            ):
                stage.layers.append(layer)
            else:
                self.stages.append(Stage([layer], block))
        self.calls[layer] = self.calls.get(layer, 0) + 1
        self._last_input = Seen(input)

    def _enter(self, block: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        arguments, structure = tree_flatten((args, kwargs))
        if not all(isinstance(value, (Tensor, *PLAIN)) for value in arguments):
            self._not_alone.add(block)
        self._all_flows[block].append(self._flow(arguments, structure))
        self._block_calls[block] += 1
        self.first_block = self.first_block or block
        if block is self.first_block:
            self.first_calls.append(Call.of(args, kwargs))
        self._active.append(block)
        self._last = (block, structure, [Seen(value) for value in arguments], [])

    def _flow(self, arguments: List[Any], structure: TreeSpec) -> Optional[Flow]:
        if self._last is None or structure != self._last[1]:
            return None
        source, _, before, results = self._last
        changed = [at for at, value in enumerate(arguments) if not before[at].is_(value)]
        if len(changed) != 1:
            return None
        found = [at for at, value in enumerate(results) if value.is_(arguments[changed[0]])]
        return Flow(source, changed[0], found[0]) if found else None

    def _leave(self, block: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> None:
        self._active.remove(block)
        last = self._last
        results = [Seen(value) for value in tree_flatten(output)[0]]
        self._last = (*last[:3], results) if last and last[0] is block else None
