"""What feed-forward layers of a model look like, and what stands where when they are routed."""

import inspect
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from ._activations import Activation, activation_of
from ._conversion import HOOKS, as_linear, is_conv1d
from .routed_ffn import RoutedFFN
from .routed_ffn_calibration import DenseFFN

__all__: List[str] = []  # for route_ffn_ and what restores its layers

PASSIVE = (nn.Dropout, nn.Identity)


class Place(NamedTuple):
    """Where a module or function stands."""

    parent: nn.Module
    attribute: str

    def get(self) -> Any:
        return getattr(self.parent, self.attribute)

    def put(self, value: Any) -> None:
        """A module where a module stood, in the order of modules, and anything else where that stood."""
        if isinstance(value, nn.Module):
            self.parent._modules[self.attribute] = value
        else:
            self.parent.__dict__[self.attribute] = value


@dataclass(eq=False)
class FeedForward:
    """A feed-forward layer in a model: second(act(first(x))), or second(act(gate(x)) first(x)).

    The routed layer comes to ``places``, the identity to those that are ``idle`` then, and ``settings`` to attributes
    that would let the model compute without it. ``whole`` is what of the model computes with the layer, before and
    after. ``beside`` says what else is in a module that calls both layers itself.
    """

    places: List[Place]
    idle: List[Place]
    first: nn.Module
    second: nn.Module
    activation: Activation
    whole: Callable[[Tensor], Any]
    gate: Optional[nn.Module] = None
    settings: Dict[Place, Any] = field(default_factory=dict)
    beside: Optional[str] = None
    problem: Optional[str] = None
    left: Optional[str] = None

    def parts(self) -> Dict[str, nn.Module]:
        parts = {"first": self.first, "second": self.second}
        return parts if self.gate is None else {"gate": self.gate, **parts}

    def replaced(self) -> List[nn.Module]:
        return [*self.parts().values(), self.places[0].get()]

    def sizes(self) -> Tuple[int, int]:
        """Of tokens, and of hidden units."""
        found = features(self.first)
        assert found is not None
        return found

    def dense(self) -> DenseFFN:
        gate = None if self.gate is None else as_linear(self.gate)
        return DenseFFN(as_linear(self.first), as_linear(self.second), gate, *self.activation)


def place_(layer: FeedForward, routed: RoutedFFN) -> List[Tuple[Place, Any]]:
    """Puts it into the model. What stood there is returned."""
    before = [(place, place.get()) for place in (*layer.places, *layer.idle, *layer.settings)]
    routed.train(layer.first.training)
    if layer.gate is not None:
        for hooks in HOOKS:
            setattr(routed, hooks, getattr(layer.places[0].get(), hooks))
    for place in layer.places:
        place.put(routed)
    for place in layer.idle:
        place.put(idle(layer.first.training) if isinstance(place.get(), nn.Module) else unchanged)
    for place, value in layer.settings.items():
        place.put(value)
    return before


def idle(training: bool) -> nn.Module:
    identity = nn.Identity().train(training)
    identity.register_parameter("weight", None)  # T5 asks for the dtype of one
    return identity


def unchanged(rows: Tensor) -> Tensor:
    """In the place of an activation that is a function."""
    return rows


# ---- what they look like ------------------------------------------------------------------------


def feed_forwards(module: nn.Module, names: Dict[nn.Module, List[str]]) -> Iterator[FeedForward]:
    """Those that stand directly in a module."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if type(module).forward is nn.Sequential.forward:
        yield from in_a_row(module, children)
        return
    linear = [name for name, child in children if features(child)]
    found = None
    if len(linear) == 2:
        found = in_one_module(module, linear, names)
    elif len(linear) == 3:
        found = gated(module, linear, names)
    if found is not None:
        yield found
    for (_, one), (_, other) in zip(children[:-1], children[1:], strict=True):
        found = in_two_modules(one, other)
        if found is not None:
            yield found


def in_a_row(module: nn.Module, children: List[Tuple[str, nn.Module]]) -> Iterator[FeedForward]:
    """Linear, activation, perhaps dropout, Linear."""
    active = [Place(module, name) for name, child in children if not isinstance(child, PASSIVE)]
    end = 0
    for start in range(len(active) - 2):
        places = active[start : start + 3]
        first, act, second = (place.get() for place in places)
        known = activation_of(act) if start >= end and fit(first, second) else None
        if known is not None:
            end = start + 3

            def whole(rows: Tensor, places: List[Place] = places) -> Tensor:
                for place in places:
                    rows = place.get().forward(rows)
                return rows

            yield FeedForward(places[:1], places[1:], first, second, known, whole)


def in_one_module(module: nn.Module, linear: List[str], names: Iterable[nn.Module]) -> Optional[FeedForward]:
    """fc1, act and fc2 of GPT-2, timm and others; or of BART's block and others', beside its attention and norms."""
    first, second = (Place(module, name) for name in linear)
    activations = activations_in(module)
    if len(activations) != 1 or not fit(first.get(), second.get()):
        return None
    ((name, known),) = activations.items()
    beside = what_else(module, [*linear, name])
    act = Place(module, name)

    def whole(rows: Tensor) -> Any:
        return call(module, rows, rows) if beside is None else alone(module, rows)

    problem = None
    if isinstance(module, nn.TransformerDecoderLayer) and name not in vars(module):
        problem = "torch copies such a layer with relu where its activation is a module: give it a function"
    settings = without_fast_path(module, names)
    return FeedForward([first], [act, second], first.get(), second.get(), known, whole, None, settings, beside, problem)


def without_fast_path(module: nn.Module, names: Iterable[nn.Module]) -> Dict[Place, Any]:
    """In evaluation torch's encoders compute with the weights of both layers by themselves, unless these say no."""
    if not isinstance(module, nn.TransformerEncoderLayer):
        return {}
    around = [one for one in names if isinstance(one, nn.TransformerEncoder) and module in one.layers]
    return {Place(module, "activation_relu_or_gelu"): 0} | {Place(one, "use_nested_tensor"): False for one in around}


def gated(module: nn.Module, linear: List[str], names: Dict[nn.Module, List[str]]) -> Optional[FeedForward]:
    """gate_proj, up_proj, act_fn and down_proj of Llama and others. The module is replaced as a whole."""
    one, other, second = (module.get_submodule(name) for name in linear)
    activations = activations_in(module)
    if len(activations) != 1 or not (fit(one, second) and fit(other, second)):
        return None
    ((name, known),) = activations.items()
    places = places_of(module, names)
    if not places:
        return None  # the model itself

    def whole(rows: Tensor) -> Tensor:
        return places[0].get().forward(rows)

    problem = None
    if "forward" in vars(module):
        problem = "its forward was replaced, as accelerate's hooks do: remove them first, and add them after"
    elif any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.children()):
        problem = "its dropout would be lost: set p to 0"
    elif has_hooks(getattr(module, name)):
        problem = "its activation has hooks, which would be lost"
    left = what_else(module, [*linear, name])
    return FeedForward(places, [], other, second, known, whole, gate=one, problem=problem, left=left)


def in_two_modules(one: nn.Module, other: nn.Module) -> Optional[FeedForward]:
    """intermediate and output of BERT and others."""
    linear = [[name for name, child in module._modules.items() if features(child)] for module in (one, other)]
    if [len(names) for names in linear] != [1, 1]:
        return None
    first, second = Place(one, linear[0][0]), Place(other, linear[1][0])
    activations = activations_in(one)
    if len(activations) != 1 or not fit(first.get(), second.get()):
        return None
    ((name, known),) = activations.items()
    left = what_else(one, [linear[0][0], name])

    def whole(rows: Tensor) -> Any:
        return call(other, call(one, rows), rows)

    return FeedForward([first], [Place(one, name), second], first.get(), second.get(), known, whole, left=left)


def call(module: nn.Module, *tensors: Tensor) -> Any:
    """With as many as it asks for: the last one may be what a module adds (Bloom, BERT's output)."""
    return module.forward(*tensors[: num_required(module)])


def alone(block: nn.Module, rows: Tensor) -> Tensor:
    """A block on tokens, without the masks and positions that it asks for, or with tokens in their places."""
    more = num_required(block) - 1
    try:
        result = block.forward(rows, *[None] * more)
    except Exception:  # whatever a stranger raises
        result = block.forward(rows, *[rows] * more)
    return result if isinstance(result, Tensor) else result[0]


def num_required(module: nn.Module) -> int:
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(one.kind <= one.POSITIONAL_OR_KEYWORD and one.default is one.empty for one in parameters)


def places_of(module: nn.Module, modules: Iterable[nn.Module]) -> List[Place]:
    return [Place(parent, name) for parent in modules for name, child in parent._modules.items() if child is module]


def features(module: Any) -> Optional[Tuple[int, int]]:
    """in and out of what is a linear layer, or looks like one."""
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(module, nn.Module) or not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        return None
    return sizes[0], sizes[1]


def fit(first: nn.Module, second: nn.Module) -> bool:
    there, back = features(first), features(second)
    return there is not None and back is not None and there == back[::-1]


def activations_in(module: nn.Module) -> Dict[str, Activation]:
    """The modules and functions directly in it that are known activations."""
    candidates: Dict[str, Any] = {
        name: child
        for name, child in module._modules.items()
        if child is not None and not features(child) and not child.state_dict()  # which a call may change
    }
    candidates |= {name: value for name, value in vars(module).items() if name != "forward" and callable(value)}
    found = {name: activation_of(value) for name, value in candidates.items() if not isinstance(value, type)}
    return {name: known for name, known in found.items() if known is not None}


def has_hooks(module: Any) -> bool:
    return any(getattr(module, hooks, False) for hooks in HOOKS)


def what_else(module: nn.Module, parts: List[str]) -> Optional[str]:
    others = [
        name
        for name, child in module._modules.items()
        if name not in parts and child is not None and not isinstance(child, PASSIVE)
    ]
    return f"{type(module).__name__} holds more than that: {', '.join(others)}" if others else None
