"""Which feed-forward layers of a model can be routed, and why others cannot."""

from typing import Dict, Iterable, List, Optional, Sequence

import torch
from torch import nn

from ._conversion import (
    Candidates,
    adapted_by_peft,
    as_linear,
    check_skip,
    check_wrappers,
    held_elsewhere,
    is_plain_linear,
    matches,
    nothing_found,
    owners_of,
    problem_of,
    reason_to_leave,
    refusal,
)
from .routed_ffn_checks import more_than_that
from .routed_ffn_structure import FeedForward, feed_forwards, has_hooks, places_of

__all__: List[str] = []  # for route_ffn_ alone


def find_feed_forwards(model: nn.Module, skip: Sequence[str], num_blocks: int) -> Candidates[FeedForward]:
    """Looks at every layer before the first is routed. The model is in evaluation mode, and no gradients are recorded.

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
        if layer.beside and not problem and not reason:
            with torch.autocast(layer.dense().first.weight.device.type, enabled=False):
                reason = more_than_that(layer)
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
        elif not problem and has_hooks(module):
            problem = "it has hooks, which would see something else"
        if problem:
            return f"the {part} layer: {problem}"
    if any(has_hooks(place.get()) for place in layer.idle):
        return "its activation has hooks, which would see something else"
    weights = [as_linear(module).weight for module in layer.parts().values() if is_plain_linear(module)]
    kinds = {(weight.device, weight.dtype) for weight in weights}
    if len(kinds) > 1:
        return (
            f"its layers have several devices or dtypes: {', '.join(f'{dtype} on {where}' for where, dtype in kinds)}"
        )
    hidden_dim = layer.sizes()[1]
    return f"{num_blocks} blocks do not divide its {hidden_dim} hidden units" if hidden_dim % num_blocks else None
