"""What the conversion of a model changes, and its reversal has to change back."""

from typing import Any

from torch import nn


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a conversion could leave behind."""
    return {
        name: (
            type(module),
            {name: type(value) for name, value in vars(module).items()},
            sorted(module._modules),
            list(module._forward_pre_hooks.values()),
        )
        for name, module in model.named_modules()
    }
