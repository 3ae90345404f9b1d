"""Codebooks from what a model computes: k-means over queries and keys."""

from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import Tensor, nn

from ..ops.sparse_attention import pq_encode, pq_loss
from ._calibration import current_padding, evenly_spaced, observed, spread_out, tokens_of
from .sparse_attention import PQAttention

__all__ = ["calibrate_codebooks"]

ROUNDS = 20


def calibrate_codebooks(
    model: nn.Module, calibration: Callable[[nn.Module], Any], *, rows: int = 16384
) -> Dict[str, float]:
    """Sets the codebooks of a model's :class:`PQAttention` modules to the centres of clusters of their queries and
    keys, by k-means with the distance of :func:`torchops.pq_encode`.

    While the calibration runs the model, in evaluation mode and without gradients, these modules attend to all keys, so
    that every layer has the inputs that it has with full attention. The same input gives the same codebooks.

    Args:
        model: changed in place; its codebooks are the same parameters as before, with other numbers.
        calibration: called with the model; runs it on typical inputs, once or more often. Padding does not count
            inside of :func:`torchops.nn.ignored_padding`.
        rows: how many queries and keys of a layer are used, at most, evenly spaced in every pass.

    Returns:
        :func:`torchops.pq_loss` of the queries and keys that were used, by the module's name.

    Raises:
        ValueError: the model has no PQAttention, or the calibration does not reach one, or with numbers that are not
            finite.

    Source: SPT (Gui et al., 2023); product quantization (Jegou et al., 2011).

    >>> attention = torchops.nn.SparseAttention(64, 4, keep=1 / 8)
    >>> input = torch.randn(2, 300, 64)
    >>> losses = torchops.nn.calibrate_codebooks(attention, lambda attention: attention(input))
    >>> list(losses)
    ['attend']
    """
    modules = {module: name for name, module in model.named_modules() if isinstance(module, PQAttention)}
    if not modules:
        raise ValueError(f"calibrate_codebooks: expected a model with PQAttention, {type(model).__name__} has none")
    losses = {}
    for module, found in seen(model, modules, calibration, rows).items():
        where = modules[module] or type(model).__name__
        if not found:
            raise ValueError(f"calibrate_codebooks: expected the calibration to reach {where}, which it does not")
        vectors = evenly_spaced(torch.cat(found), rows)
        if not vectors.isfinite().all():
            raise ValueError(f"calibrate_codebooks: expected finite queries and keys, got others in {where}")
        codebooks = clustered(vectors, *module.codebooks.shape)
        with torch.no_grad():
            module.codebooks.copy_(codebooks)
        losses[modules[module]] = pq_loss(vectors, codebooks).item()
    return losses


def seen(
    model: nn.Module, modules: Dict[PQAttention, str], calibration: Callable[[nn.Module], Any], rows: int
) -> Dict[PQAttention, List[Tensor]]:
    """[rows, D] of every pass through each module."""
    vectors: Dict[PQAttention, List[Tensor]] = {module: [] for module in modules}

    def look(module: PQAttention, arguments: Tuple[Any, ...], named: Dict[str, Any]) -> None:
        query_and_key = [*arguments, *named.values()][:2]
        both = torch.cat([vectors_of_tokens(part.detach()) for part in query_and_key])
        vectors[module].append(evenly_spaced(both, rows).to(torch.promote_types(both.dtype, torch.float32)))

    keep = {module: (module.keep_share, module.keep_count) for module in modules}
    try:
        for module in modules:
            module.keep_share, module.keep_count = 1.0, -1
        with observed(model, modules, look):
            calibration(model)
    finally:
        for module, (share, count) in keep.items():
            module.keep_share, module.keep_count = share, count
    return vectors


def vectors_of_tokens(heads: Tensor) -> Tensor:
    """Queries or keys [B, H, L, D] as [n, D], without those of padding."""
    tokens = tokens_of(heads.transpose(1, 2).flatten(2), current_padding())
    return tokens.reshape(-1, heads.shape[-1])


def clustered(vectors: Tensor, num_parts: int, num_codewords: int, subspace: int) -> Tensor:
    """Centres [M, E, D / M] of clusters of the parts of vectors [N, D]."""
    parts = vectors.unflatten(1, (num_parts, subspace)).transpose(0, 1)  # [M, N, D / M]
    codebooks = spread_out(parts, num_codewords)
    for _ in range(ROUNDS):
        codes = pq_encode(vectors, codebooks).long()
        members = torch.nn.functional.one_hot(codes, num_codewords).permute(1, 2, 0).to(vectors)  # [M, E, N]
        counts = members.sum(-1, keepdim=True)
        codebooks = torch.where(counts > 0, members @ parts / counts.clamp(min=1), codebooks)
    return codebooks
