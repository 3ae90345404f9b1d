"""The softmax of every attention, in plain PyTorch."""

from typing import Optional, Tuple

import torch
from torch import Tensor


def softmax_with_sink(scores: Tensor, sink: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """Scores [B, H, Lq, Lk], sink [H] -> probabilities [B, H, Lq, Lk] and logsumexp [B, H, Lq].

    A row of nothing but -inf gets probabilities of 0 and a logsumexp of -inf.
    """
    # The sink is one more key, whose value is 0; a column of -inf changes nothing.
    logits = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    if sink is not None:
        logits = sink.to(scores.dtype)[:, None, None].expand_as(logits)
    scores = torch.cat([scores, logits], dim=-1)
    # A row of nothing but -inf has no softmax.
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0)
    # Not by torch.logsumexp: its derivative takes scores less a logsumexp that was rounded, however large they are.
    largest = scores.amax(-1, keepdim=True).detach()
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    probabilities = (weights / total).masked_fill(nothing, 0)
    logsumexp = (largest + total.log()).masked_fill(nothing, -torch.inf)
    return probabilities[..., :-1], logsumexp[..., 0]
