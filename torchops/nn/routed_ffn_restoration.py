"""Builds routed layers where a model had feed-forward layers."""

from typing import Any, Dict, List, Mapping, Sequence

import torch
from torch import nn

from .routed_ffn import RoutedFFN
from .routed_ffn_router import Router
from .routed_ffn_structure import feed_forwards, place_

__all__: List[str] = []  # for integrations

OF_LAYER = ("activation", "alpha", "limit", "up_offset", "gate_at", "lora_scale", "recompute")
OF_ROUTER = ("num_blocks", "top_k", "score", "renormalize", "straight_through")


def described(layer: RoutedFFN) -> Dict[str, Any]:
    """What it takes to build the layer: numbers, words and truth values, as a file has them."""
    router: Any = layer.router
    if type(router) is not Router:
        raise ValueError(
            f"RoutedFFN: expected router to be a Router to describe the layer, got {type(router).__name__}"
        )
    num_blocks, dim, units = layer.w2.shape
    return {
        "dim": dim,
        "hidden_dim": num_blocks * units,
        "gated": layer.w_gate is not None,
        "biases": [name for name in ("b1", "b2") if getattr(layer, name) is not None],
        "lora_rank": 0 if layer.lora_a1 is None else layer.lora_a1.shape[1],
        "router": {name: getattr(router, name) for name in OF_ROUTER} | {"bias": router.bias is not None},
        **{name: getattr(layer, name) for name in OF_LAYER},
    }


def built(like: torch.Tensor, dim: int, biases: Sequence[str], router: Mapping[str, Any], **options: Any) -> RoutedFFN:
    """The layer of a description, uninitialised, with a tensor's device and dtype."""
    kind: Dict[str, Any] = {"device": torch.device("meta"), "dtype": like.dtype}
    num_blocks, top_k = router["num_blocks"], router["top_k"]
    layer = RoutedFFN(
        dim, num_blocks=num_blocks, top_k=top_k, router=Router(dim, **router, **kind), bias=True, **options, **kind
    )
    for name in {"b1", "b2"} - set(biases):
        setattr(layer, name, None)
    return layer.to_empty(device=like.device)


def place_routed_(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts layers, uninitialised, in the places of the feed-forward layers of these names.

    Args:
        model: as it was before :func:`route_ffn_`, on any device; changed in place.
        layers: descriptions.

    Raises:
        ValueError: the model has no such feed-forward layer.
    """
    names: Dict[nn.Module, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found = {
        f"{name}.{place.attribute}".lstrip("."): layer
        for module in names
        for layer in feed_forwards(module, names)
        for place in layer.places
        for name in names[place.parent]
    }
    for name, description in layers.items():
        layer = found.get(name)
        if layer is None or layer.sizes() != (description["dim"], description["hidden_dim"]):
            raise ValueError(
                f"RoutedFFN: expected a model with a feed-forward layer {name} of {description['dim']} x"
                f" {description['hidden_dim']}, got {'none' if layer is None else ' x '.join(map(str, layer.sizes()))}"
            )
    for name, description in layers.items():
        place_(found[name], built(found[name].first.get_parameter("weight"), **description))
