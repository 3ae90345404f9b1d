"""Which feed-forward layers of a model can be routed, and why others cannot."""

import inspect
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn

from ._activations import Activation, activation_of
from ._conversion import (
    HOOKS,
    Candidates,
    adapted_by_peft,
    as_linear,
    check_skip,
    check_wrappers,
    held_elsewhere,
    is_conv1d,
    is_plain_linear,
    matches,
    nothing_found,
    owners_of,
    problem_of,
    reason_to_leave,
    refusal,
)
from .routed_ffn_calibration import DenseFFN

__all__: List[str] = []  # for route_ffn_ alone

PASSIVE = (nn.Dropout, nn.Identity)


class Place(NamedTuple):
    """Where a module or function stands."""

    parent: nn.Module
    attribute: str

    def get(self) -> Any:
        return getattr(self.parent, self.attribute)

    def put(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.parent.__dict__.pop(self.attribute, None)
            self.parent._modules[self.attribute] = value  # where it stood, in the order of modules
        else:
            self.parent._modules.pop(self.attribute, None)
            self.parent.__dict__[self.attribute] = value


@dataclass(eq=False)
class FeedForward:
    """A feed-forward layer in a model: second(act(first(x))), or second(act(gate(x)) first(x)).

    The routed layer comes to ``places``, the identity to those that are ``idle`` then. ``whole`` is what of the model
    computes with the layer, before and after.
    """

    places: List[Place]
    idle: List[Place]
    first: nn.Module
    second: nn.Module
    activation: Activation
    whole: Callable[[Tensor], Any]
    gate: Optional[nn.Module] = None
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


def find_feed_forwards(model: nn.Module, skip: Sequence[str], num_blocks: int) -> Candidates[FeedForward]:
    """Looks at every layer before the first is routed.

    Raises:
        ValueError: a pattern of skip that no layer has, layers that cannot be routed, or none that can.
    """
    check_wrappers(model, "route_ffn_", "routed")
    names: Dict[nn.Module, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers = [layer for module in names for layer in feed_forwards(module, names)]
    named = [
        (layer, [f"{name}.{place.attribute}".lstrip(".") for place in layer.places for name in names[place.parent]])
        for layer in layers
    ]
    check_skip("route_ffn_", "feed-forward layers", (name for _, all_names in named for name in all_names), skip)

    found: Candidates[FeedForward] = Candidates()
    problems: Dict[str, str] = {}
    kept: List[str] = []
    owners, adapted = owners_of(model), adapted_by_peft(model)
    held = held_elsewhere(model, {module for layer in layers for module in layer.replaced()})
    for layer, all_names in named:
        if any(matches(name, pattern) for name in all_names for pattern in skip):
            continue
        kept += all_names
        problem = None if layer.left else reason_to_refuse(layer, adapted, held, num_blocks)
        reason = layer.left or reason_to_stay(layer, owners, names)
        if problem:
            problems[all_names[0]] = problem
        elif reason:
            found.left.append((all_names[0], reason))
        else:
            found.layers[layer] = all_names
    if problems:
        raise refusal("route_ffn_", "routed", problems, kept)
    if not found.layers:
        raise nothing_found("route_ffn_", "routed", "feed-forward layers", model, found.left, bool(named))
    return found


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
        found = in_one_module(module, linear)
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


def in_one_module(module: nn.Module, linear: List[str]) -> Optional[FeedForward]:
    """fc1, act and fc2 of GPT-2, timm and others."""
    first, second = (Place(module, name) for name in linear)
    activations = activations_in(module)
    if len(activations) != 1 or not fit(first.get(), second.get()):
        return None
    ((name, known),) = activations.items()
    left = what_else(module, [*linear, name])
    idle = [Place(module, name), second]

    def whole(rows: Tensor) -> Any:
        return call(module, rows, rows)

    return FeedForward([first], idle, first.get(), second.get(), known, whole, left=left)


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
    parameters = inspect.signature(module.forward).parameters.values()
    asked = [one for one in parameters if one.kind <= one.POSITIONAL_OR_KEYWORD and one.default is one.empty]
    return module.forward(*tensors[: len(asked)])


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


def what_else(module: nn.Module, parts: List[str]) -> Optional[str]:
    others = [
        name
        for name, child in module._modules.items()
        if name not in parts and child is not None and not isinstance(child, PASSIVE)
    ]
    return f"{type(module).__name__} holds more than that: {', '.join(others)}" if others else None


# ---- why they stay, or cannot be routed ---------------------------------------------------------


def reason_to_stay(
    layer: FeedForward, owners: Dict[int, Dict[nn.Module, str]], modules: Iterable[nn.Module]
) -> Optional[str]:
    for part, module in layer.parts().items():
        reason = reason_to_leave(module, owners)
        if len(places_of(module, modules)) > 1:
            reason = "it stands in another module, too"
        if reason:
            return f"the {part} layer: {reason}"
    dim, hidden_dim = layer.sizes()
    return f"fewer hidden units ({hidden_dim}) than features ({dim})" if hidden_dim < dim else None


def reason_to_refuse(
    layer: FeedForward, adapted: Dict[nn.Module, str], held: Dict[nn.Module, str], num_blocks: int
) -> Optional[str]:
    if layer.problem:
        return layer.problem
    for module in layer.replaced():
        if module in held:
            return f"{held[module]} holds it, too, where a module cannot be replaced"
    for part, module in layer.parts().items():
        problem = problem_of(module)
        if module in adapted:
            problem = f"peft adapts {adapted[module]}: route the model first, then adapt it"
        elif not problem and any(getattr(module, hooks) for hooks in HOOKS):
            problem = "it has hooks, which would see something else"
        if problem:
            return f"the {part} layer: {problem}"
    weights = [as_linear(module).weight for module in layer.parts().values() if is_plain_linear(module)]
    kinds = {(weight.device, weight.dtype) for weight in weights}
    if len(kinds) > 1:
        return (
            f"its layers have several devices or dtypes: {', '.join(f'{dtype} on {where}' for where, dtype in kinds)}"
        )
    hidden_dim = layer.sizes()[1]
    return f"{num_blocks} blocks do not divide its {hidden_dim} hidden units" if hidden_dim % num_blocks else None
