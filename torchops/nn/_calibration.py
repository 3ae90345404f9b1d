"""A model that computes typical inputs while some of its modules are looked at, and where clusters of those begin."""

from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, List

import torch
from torch import Tensor, nn

__all__: List[str] = []  # for what is fitted to a model's inputs


@contextmanager
def observed(
    model: nn.Module, modules: Iterable[nn.Module] = (), look: Callable[..., None] = lambda *_: None
) -> Iterator[None]:
    """Evaluation mode without gradients, in which look(module, arguments, named arguments) comes before each pass of
    these modules, those inside of torch's own layers too. All is as before behind it."""
    were_training: List[Any] = [module for module in model.modules() if module.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()
        for module in were_training:
            module.training = True


def evenly_spaced(vectors: Tensor, rows: int) -> Tensor:
    """At most so many of vectors [N, D]."""
    if len(vectors) <= rows:
        return vectors
    return vectors[torch.arange(rows, device=vectors.device) * len(vectors) // rows]


def spread_out(parts: Tensor, num_codewords: int) -> Tensor:
    """Of each part's vectors [M, N, D / M] some that are far from each other: the next one is drawn with chances that
    grow with the square of the distance to those there are (k-means++)."""
    generator = torch.Generator().manual_seed(0)

    def drawn(chances: Tensor) -> Tensor:
        places = torch.multinomial(chances.float().cpu(), 1, generator=generator).to(parts.device)  # [M, 1]
        return parts.gather(1, places[..., None].expand(-1, -1, parts.shape[2]))

    centres = drawn(torch.ones(parts.shape[:2]))
    nearest = torch.full(parts.shape[:2], torch.inf, device=parts.device, dtype=parts.dtype)
    while centres.shape[1] < num_codewords:
        nearest = torch.minimum(nearest, (parts - centres[:, -1:]).square().sum(-1))
        # Where all vectors are centres already, any will do.
        centres = torch.cat([centres, drawn(torch.where(nearest.sum(1, keepdim=True) > 0, nearest, 1.0))], 1)
    return centres
