"""Feed-forward layers, dense and routed, and experts of mixtures by means of PyTorch alone."""

import torch
from torch import Tensor
from torch.nn.functional import gelu, grouped_mm, linear, silu


def dense_ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor) -> Tensor:
    """w1 [D, d], w2 [d, D], b1 [D]."""
    return linear(gelu(linear(x, w1, b1)), w2)


def lora_ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, a1: Tensor, up1: Tensor, a2: Tensor, up2: Tensor) -> Tensor:
    """The dense layer with a factor of low rank beside each weight."""
    h = gelu(linear(x, w1, b1) + linear(linear(x, a1), up1))
    return linear(h, w2) + linear(linear(h, a2), up2)


def half(w1: Tensor, w2: Tensor, b1: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """As many hidden units as routing leaves."""
    width = int(w1.shape[0] * share)
    return w1[:width], w2[:, :width], b1[:width]


def masked_ffn(x: Tensor, index: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, b1: Tensor) -> Tensor:
    """Block by block the tokens that chose it, as SPT has it. w1 [G, N, d], w2 [G, d, N], b1 [G, N]."""
    output = torch.zeros_like(x)
    for block in range(w1.shape[0]):
        tokens, slots = (index == block).nonzero(as_tuple=True)
        h = gelu(linear(x[tokens], w1[block], b1[block]))
        output = output.index_add(0, tokens, (linear(h, w2[block]) * gate[tokens, slots, None]).to(x.dtype))
    return output


def grouped_ffn(x: Tensor, index: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, b1: Tensor) -> Tensor:
    """torch's grouped product, over rows that are sorted beforehand."""
    rows, of_rows, order, ends = sorted_rows(x, index, w1.shape[0])
    h = gelu(grouped_mm(rows, w1.mT, offs=ends) + b1[of_rows])
    return summed(grouped_mm(h, w2.mT, offs=ends), gate, order)


def experts_loop(x: Tensor, index: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert by expert, as transformers' eager experts. gate_up [E, 2 I, d], down [E, d, I]."""
    output = torch.zeros_like(x)
    for expert in index.unique():
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        gates, up = linear(x[tokens], gate_up[expert]).chunk(2, -1)
        rows = linear(silu(gates) * up, down[expert]) * gate[tokens, slots, None]
        output = output.index_add(0, tokens, rows.to(x.dtype))
    return output


def experts_grouped(x: Tensor, index: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Over rows that are sorted by expert, as transformers' grouped_mm."""
    rows, _, order, ends = sorted_rows(x, index, gate_up.shape[0])
    gates, up = grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, -1)
    return summed(grouped_mm(silu(gates) * up, down.mT, offs=ends), gate, order)


def with_factors(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What peft makes of adapted experts: a weight of the stack's size. a [E, r, in], b [E, out, r]."""
    return weight + scale * (b @ a)


def sorted_rows(x: Tensor, index: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_entries = index.flatten()
    order = of_entries.argsort(stable=True)
    of_rows = of_entries[order]
    ends = torch.bincount(of_entries, minlength=blocks).cumsum(0).int()
    return x[order // index.shape[1]], of_rows, order, ends


def summed(rows: Tensor, gate: Tensor, order: Tensor) -> Tensor:
    weighted = rows * gate.flatten()[order, None]
    tokens, slots = gate.shape
    of_entries = torch.empty_like(weighted).index_copy(0, order, weighted)
    return of_entries.view(tokens, slots, -1).sum(1).to(rows.dtype)
