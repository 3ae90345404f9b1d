"""Tiny image encoders of transformers, as the tests of their token merging make them and look at them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformers_models import make  # isort: skip  # it says why where transformers is not there

SIZE = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "image_size": 32,
    "patch_size": 4,
}
IMPLEMENTATIONS = ["eager", "sdpa"]


class Encoder(NamedTuple):
    options: dict[str, Any]
    prefix: int  # tokens before the 64 patches
    layers: str
    parts: tuple[str, str, str, str]  # norm, attention, norm, MLP
    norm: str | None = None  # behind the layers


VIT = ("layernorm_before", "attention", "layernorm_after", "mlp")
CLIP = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
DINO = ("norm1", "attention", "norm2", "mlp")
ENCODERS = {
    "ViT": Encoder(SIZE, 1, "layers", VIT, "layernorm"),
    "DeiT": Encoder(SIZE, 2, "layers", VIT, "layernorm"),
    "CLIPVision": Encoder(SIZE, 1, "encoder.layers", CLIP),
    "SiglipVision": Encoder(SIZE, 0, "encoder.layers", CLIP, "post_layernorm"),
    "Dinov2": Encoder(SIZE | {"layerscale_value": 0.5}, 1, "encoder.layer", DINO, "layernorm"),
    "Dinov2WithRegisters": Encoder(SIZE | {"num_register_tokens": 3}, 4, "encoder.layer", DINO, "layernorm"),
}


def make_encoder(name: str, model_name: str | None = None, **options: Any) -> Any:
    """In float64 and evaluation mode."""
    return make(name, model_name or f"{name}Model", ENCODERS[name].options | options, "sdpa")


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers_of(name: str, model: nn.Module) -> Any:
    return model.get_submodule(ENCODERS[name].layers)


def mlp_lengths(name: str, model: nn.Module) -> list[int]:
    """A list of how many tokens each MLP is given, in passes to come."""
    lengths: list[int] = []
    for layer in layers_of(name, model):
        layer.get_submodule(ENCODERS[name].parts[3]).register_forward_pre_hook(
            lambda mlp, args: lengths.append(args[0].shape[1])
        )
    return lengths
