"""Feed-forward layers of which every byte takes half, and layers that are frozen but for factors of low rank (SPT)."""

import torch
from torch import Tensor, nn

import torchops
from torchops.nn import PQAttention, RoutedFFN

from ..common.report import console
from .decoder import Decoder

BLOCKS = 4
RANK = 8


def route(model: Decoder, top_k: int, passages: Tensor, lora_rank: int = 0) -> Decoder:
    """Every feed-forward layer in blocks of hidden units, of which a router chooses top_k, fitted to what the layers
    compute of some passages. With LoRA nothing is trained but factors, routers and codebooks."""
    with console.status(f"Routing the feed-forward layers, {top_k} of {BLOCKS} blocks"):
        torchops.nn.route_ffn_(
            model, BLOCKS, top_k, calibration=lambda model: model(passages), lora_rank=lora_rank, verbose=False
        )
    return freeze_others(model) if lora_rank else model


def adapt(model: Decoder) -> Decoder:
    """Dense feed-forward layers, frozen but for factors: to compare with."""
    torchops.nn.route_ffn_(model, num_blocks=1, top_k=1, lora_rank=RANK, verbose=False)
    return freeze_others(model)


def freeze_others(model: Decoder) -> Decoder:
    trained: list[nn.Module] = [module for module in model.modules() if isinstance(module, (RoutedFFN, PQAttention))]
    kept = {parameter for module in trained for parameter in module.parameters() if parameter.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in kept)
    return model


def num_bytes(layer: RoutedFFN) -> int:
    """Of its weights and factors, without biases and router."""
    tensors: list[torch.Tensor | None] = [
        layer.w1, layer.w2, layer.lora_a1, layer.lora_b1, layer.lora_a2, layer.lora_b2,
    ]  # fmt: skip
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
