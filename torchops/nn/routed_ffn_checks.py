"""Whether a model computes a feed-forward layer where it seems to, and the same with a routed one in its place."""

from typing import Any, List, Optional

import torch
from torch import Tensor

from .routed_ffn import RoutedFFN
from .routed_ffn_structure import FeedForward, place_

__all__: List[str] = []  # for route_ffn_ alone

# Relative to the largest output, of two ways to sum up the same products.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def some_tokens(layer: FeedForward) -> Tensor:
    weight = layer.dense().first.weight
    tokens = torch.randn(2, 8, layer.sizes()[0], generator=torch.Generator().manual_seed(0))
    return tokens.to(weight)


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE[other.dtype] * other.abs().max())


def orient(layer: FeedForward) -> None:
    """Which of two layers has the activation behind it shows when they compute."""
    if layer.gate is None:
        return
    tokens, expected = some_tokens(layer), layer.whole(some_tokens(layer))
    if not close(layer.dense().output(tokens).to(expected), expected):
        layer.first, layer.gate = layer.gate, layer.first


def more_than_that(layer: FeedForward) -> Optional[str]:
    """What a module that holds more than a feed-forward layer does with its two linear layers, but that."""
    inputs: List[Tensor] = []
    outputs: List[Tensor] = []
    hooks = [
        layer.first.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])),
        layer.second.register_forward_hook(lambda _, __, output: outputs.append(output)),
    ]
    try:
        layer.whole(some_tokens(layer))
    except Exception:  # whatever a stranger raises
        return f"{layer.beside}, and it does not compute with tokens alone"
    finally:
        for hook in hooks:
            hook.remove()
    dense = layer.dense()
    same = len(inputs) == len(outputs) > 0 and all(
        close(dense.output(input).to(output), output) for input, output in zip(inputs, outputs, strict=True)
    )
    return None if same else f"{layer.beside}, and computes something else between its two linear layers"


def difference(layer: FeedForward, routed: RoutedFFN) -> Optional[str]:
    """Whether the model computes something else with all blocks of the routed layer. It is then as it was."""
    router: Any = routed.router
    top_k, router.top_k = router.top_k, router.num_blocks
    tokens = some_tokens(layer)
    try:
        expected = layer.whole(tokens)
        before = place_(layer, routed)
        try:
            same = close(layer.whole(tokens), expected)
        finally:
            for place, module in before:
                place.put(module)
    except Exception as error:  # whatever a stranger raises
        return f"the model does not compute with a routed layer in its place: {type(error).__name__}: {error}"
    finally:
        router.top_k = top_k
    return None if same else "the model computes something else here than a feed-forward layer"
