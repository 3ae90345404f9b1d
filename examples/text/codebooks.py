"""Codebooks of sparse attention: fitted to the decoder, and how many of the keys with the largest scores they find."""

import torch
from torch import Tensor

import torchops
from torchops.nn import PQAttention

from ..common.report import console
from .decoder import Decoder


def fit(model: Decoder, passages: Tensor) -> Decoder:
    """Codebooks for what its layers compute of some passages."""
    with console.status("Fitting codebooks"):
        torchops.nn.calibrate_codebooks(model, lambda model: model(passages))
    return model


@torch.inference_mode()
def recall(model: Decoder, passages: Tensor) -> float | None:
    """Of the keys with the largest scores, as many as a query attends to, the share that it attends to: the mean over
    layers, heads and queries that see more keys than that. None without codebooks."""
    shares: list[Tensor] = []

    def compare(attend: PQAttention, inputs: tuple[Tensor, ...], named: object) -> None:
        query, key, _ = inputs
        length = key.shape[2]
        k = attend.num_kept(length)
        codes = [torchops.pq_encode(rows, attend.codebooks) for rows in (query, key)]
        chosen = torchops.pq_topk(*codes, k, is_causal=True)[:, :, k:].long()  # queries that see more than k keys
        exact = torchops.score_topk(query, key, k, is_causal=True)[:, :, k:].long()
        is_chosen = torch.zeros(*chosen.shape[:3], length, dtype=torch.bool).scatter_(3, chosen, value=True)
        shares.append(is_chosen.gather(3, exact).float().mean())

    hooks = [
        module.register_forward_pre_hook(compare, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, PQAttention)
    ]
    if not hooks:
        return None
    try:
        for passage in passages.split(1):
            model(passage)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(shares).mean().item()
