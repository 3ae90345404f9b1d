"""A model that computes typical inputs while some of its modules are looked at."""

from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, List

import torch
from torch import nn

__all__: List[str] = []  # for what is fitted to a model's inputs


@contextmanager
def observed(model: nn.Module, modules: Iterable[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """Evaluation mode without gradients, in which look(module, arguments, named arguments) comes before each pass of
    these modules. All is as before behind it."""
    were_training: List[Any] = [module for module in model.modules() if module.training]
    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in were_training:
            module.training = True
