"""Losses that modules keep from their last forward pass, for the caller to add to that of the task."""

from typing import Dict, List, Optional

import torch
from torch import Tensor

__all__: List[str] = []  # for the families' functions


def sum_of_losses(function: str, kind: str, losses: Dict[str, Optional[Tensor]]) -> Tensor:
    """Of all modules of a kind, by their names; None is one that has not computed in training."""
    computed = {name: loss for name, loss in losses.items() if loss is not None}
    if not computed:
        raise ValueError(
            f"{function}: expected a model with {kind} that has computed in training mode, got {len(losses)} such"
            " modules, none with a loss"
        )
    for name, loss in computed.items():
        if not loss.requires_grad:
            raise ValueError(
                f"{function}: expected losses with gradients, got one without for {name or 'the model'}: it "
                "computed under torch.no_grad, or in a checkpoint with use_reentrant=True (False keeps gradients)"
            )
    return torch.stack([loss.to(next(iter(computed.values()))) for loss in computed.values()]).sum()
