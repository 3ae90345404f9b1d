"""Which hidden units of a trained feed-forward layer belong together, and a router that says where they are active."""

from typing import List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..reference.routed_ffn import activate
from ._calibration import evenly_spaced, spread_out

__all__: List[str] = []  # for RoutedFFN.from_mlp alone

MOST_ROWS = 8192  # tokens that the router is fitted to
PATTERN_ROWS = 2048  # tokens that say which units are active together
ROUNDS = 20
RIDGE = 1e-2


class DenseFFN(NamedTuple):
    """Layers to be cut into blocks: second(act(first(x))), or second(act(gate(x)) first(x))."""

    first: nn.Linear
    second: nn.Linear
    gate: Optional[nn.Linear]
    activation: str
    alpha: float

    def hidden(self, rows: Tensor) -> Tensor:
        """The hidden units [T, H] of rows [T, d], in the dtype of these."""
        if self.gate is None:
            return activate(apply(self.first, rows), self.activation, self.alpha)
        return activate(apply(self.gate, rows), self.activation, self.alpha) * apply(self.first, rows)

    def output(self, rows: Tensor) -> Tensor:
        return apply(self.second, self.hidden(rows))


def apply(layer: nn.Linear, rows: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(rows.dtype)
    return nn.functional.linear(rows, layer.weight.to(rows.dtype), bias)


class Calibrated(NamedTuple):
    """The hidden units in the order of their blocks, and the router's parameters."""

    units: Tensor
    weight: Tensor
    bias: Tensor


@torch.no_grad()
def calibrated(layers: DenseFFN, inputs: Tensor, num_blocks: int) -> Calibrated:
    """Of inputs [..., d]. The same ones give the same result."""
    rows = evenly_spaced(inputs.detach().reshape(-1, inputs.shape[-1]), MOST_ROWS)
    rows = rows.to(layers.first.weight.device, torch.promote_types(rows.dtype, torch.float32))
    with torch.autocast(rows.device.type, enabled=False):
        weight = layers.second.weight.to(rows.dtype)
        hidden = layers.hidden(evenly_spaced(rows, PATTERN_ROWS))
        units = active_together(hidden.abs().T * weight.norm(dim=0)[:, None], num_blocks)
        norms = torch.cat([block_norms(layers.hidden(some), weight, units) for some in rows.split(PATTERN_ROWS)])
        return Calibrated(units.flatten(), *fitted_router(rows, norms))


def active_together(patterns: Tensor, num_blocks: int) -> Tensor:
    """Units [G, H / G] of patterns [H, T], so that those of a block are active for the same tokens: k-means of their
    directions, with clusters of equal size. Ascending in each block."""
    patterns = nn.functional.normalize(patterns, dim=1)
    centres = spread_out(patterns[None], num_blocks)[0]
    block = torch.full((len(patterns),), -1, device=patterns.device)
    for _ in range(ROUNDS):
        before = block
        block = balanced(patterns @ nn.functional.normalize(centres, dim=1).T)
        if torch.equal(block, before):
            break
        members = nn.functional.one_hot(block, num_blocks).T.to(patterns)
        centres = members @ patterns
    return block.sort(stable=True).indices.view(num_blocks, -1)


def balanced(similarity: Tensor) -> Tensor:
    """A cluster for each of the rows of similarity [H, G], H / G of them in each.

    All rows ask for the cluster they are most similar to. Where more ask than there is room, those stay that would lose
    most elsewhere, and the others ask again.
    """
    num_rows, num_blocks = similarity.shape
    room = num_rows // num_blocks
    block = torch.full((num_rows,), -1, device=similarity.device)
    similarity = similarity.clone()
    for _ in range(num_blocks):
        waiting = (block < 0).nonzero().flatten()
        best = similarity[waiting].topk(min(2, num_blocks), dim=1)
        loss = best.values[:, 0] - best.values[:, -1]
        waiting = waiting[loss.argsort(stable=True, descending=True)]
        wanted = similarity[waiting].argmax(1)
        for one in range(num_blocks):
            free = room - int((block == one).sum())
            asking = waiting[wanted == one]
            block[asking[:free]] = one
            if len(asking) >= free:
                similarity[:, one] = -torch.inf
    return block


def block_norms(hidden: Tensor, weight: Tensor, units: Tensor) -> Tensor:
    """[T, G], how much each block adds to the output of hidden [T, H] times weight [d, H]."""
    return torch.stack([(hidden[:, block] @ weight[:, block].T).norm(dim=1) for block in units], 1)


def fitted_router(rows: Tensor, norms: Tensor) -> "tuple[Tensor, Tensor]":
    """The linear function, weight [G, d] and bias [G], whose scores order the blocks as norms [T, G] do as well as they
    can (ridge regression). What all blocks of a token have alike orders none, and is left out."""
    norms = norms - norms.mean(1, keepdim=True)
    norms = norms / norms.std(correction=0).clamp(min=1e-12)
    mean, offset = rows.mean(0), norms.mean(0)
    rows = rows - mean
    gram = rows.T @ rows
    ridge = RIDGE * gram.diagonal().mean() + 1e-12
    weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), rows.T @ (norms - offset)).T
    return weight, offset - weight @ mean
