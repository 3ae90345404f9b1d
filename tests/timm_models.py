"""timm's Vision Transformers as the tests of their token merging make them and look at them."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import vision_transformer as vit
from torch import Tensor, nn


def make(seed: int = 0, cls: Callable[..., nn.Module] = vit.VisionTransformer, **options: Any) -> nn.Module:
    """64 patches, in evaluation mode."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 3,
        "num_classes": 5,
    }
    model = cls(**{**defaults, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # timm's own start is so small that nearly nothing depends on anything
    return model


def images(batch: int = 2, size: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block_outputs(model: nn.Module) -> list[Tensor]:
    """A list that holds each block's output after a pass."""
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
    return outputs


def counts(model: nn.Module, input: Tensor) -> list[int]:
    outputs = block_outputs(model)
    with torch.no_grad():
        model(input)
    return [output.shape[1] for output in outputs]
