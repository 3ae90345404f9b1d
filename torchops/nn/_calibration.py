"""Runs of a model on typical inputs that record the inputs of some modules, and first centers of clusters of these."""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

__all__ = ["ignored_padding"]

_padding: ContextVar[Optional[Tensor]] = ContextVar("padding", default=None)


@contextmanager
def ignored_padding(padding_mask: Optional[Tensor]) -> Iterator[None]:
    """Inside, padding does not count as a typical input: for the calibrations of :func:`torchops.nn.factorize_`,
    :func:`torchops.nn.route_ffn_` and :func:`torchops.nn.calibrate_codebooks`.

    Args:
        padding_mask: bool [B, L], True for padding; None for none. It holds for layers whose inputs are
            [B, L, features], [B L, features] or heads [B, H, L, D], and not for others: those on pooled tokens, for
            example.

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    >>> tokens, padding = torch.randn(8, 100, 64), torch.arange(100) >= torch.randint(50, 100, (8, 1))
    >>> def run(model):
    ...     with torchops.nn.ignored_padding(padding):
    ...         model(tokens)
    >>> report = torchops.nn.factorize_(model, 2.0, verbose=False, calibration=run)
    """
    token = _padding.set(padding_mask)
    try:
        yield
    finally:
        _padding.reset(token)


def current_padding() -> Optional[Tensor]:
    return _padding.get()


def tokens_of(rows: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """A copy of a layer's inputs or outputs [..., features] as [n, features], without padding."""
    flat = rows.reshape(-1, rows.shape[-1])
    if padding_mask is None or padding_mask.numel() != len(flat):
        return flat.clone()
    return flat[~padding_mask.flatten().to(flat.device)]


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


def first_argument(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Tensor:
    """What a layer was given, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


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
