"""Routed feed-forward layers in plain PyTorch."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def route(index: Tensor, num_blocks: int) -> Tuple[Tensor, Tensor]:
    block = index.flatten().long()
    block = torch.where((block >= 0) & (block < num_blocks), block, num_blocks)
    order = block.sort(stable=True).indices
    blocks = torch.arange(num_blocks + 1, device=index.device)
    offsets = (block[:, None] < blocks).sum(0)
    return order.int(), offsets.int()


def grouped_linear(
    input: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    bias: Optional[Tensor] = None,
    slots: Optional[int] = None,
) -> Tensor:
    rows = input if slots is None else input[order.long() // slots]
    ends = offsets.tolist()
    of_blocks = [
        F.linear(rows[ends[block] : ends[block + 1]], weight[block], None if bias is None else bias[block])
        for block in range(weight.shape[0])
    ]
    behind = rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[1])
    return torch.cat([*of_blocks, behind])


def activate(value: Tensor, activation: str, alpha: float = 1.0) -> Tensor:
    if activation == "relu2":
        return F.relu(value).square()
    if activation == "gelu_tanh":
        return F.gelu(value, approximate="tanh")
    if activation == "silu":
        return value * torch.sigmoid(alpha * value)
    return F.relu(value) if activation == "relu" else F.gelu(value)


def hidden(
    preactivation: Tensor, activation: str, glu: str, alpha: float, limit: Optional[float], up_offset: float
) -> Tensor:
    """[..., N1] -> [..., N]."""
    if glu == "none":
        return activate(preactivation, activation, alpha)
    if glu == "interleaved":
        gate, up = preactivation[..., 0::2], preactivation[..., 1::2]
    else:
        gate, up = preactivation.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return activate(gate, activation, alpha) * (up + up_offset)


def routed_ffn(
    input: Tensor,
    index: Tensor,
    gate: Optional[Tensor],
    w1: Tensor,
    w2: Tensor,
    b1: Optional[Tensor] = None,
    b2: Optional[Tensor] = None,
    w_gate: Optional[Tensor] = None,
    lora_a1: Optional[Tensor] = None,
    lora_b1: Optional[Tensor] = None,
    lora_a2: Optional[Tensor] = None,
    lora_b2: Optional[Tensor] = None,
    activation: str = "relu",
    glu: str = "none",
    alpha: float = 1.0,
    limit: Optional[float] = None,
    up_offset: float = 0.0,
    gate_at: str = "output",
    lora_scale: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    tokens = input.reshape(-1, input.shape[-1])
    output = torch.zeros_like(tokens)
    if w_gate is not None:
        w1 = torch.cat([w_gate, w1], 1)

    def low_rank(rows: Tensor, a: Optional[Tensor], b: Optional[Tensor], block: int) -> Tensor:
        if a is None or b is None:
            return rows.new_zeros(())
        for factor in (a, b):
            rows = rows @ factor[min(block, factor.shape[0] - 1)].mT
        return lora_scale * rows

    entries = index.reshape(tokens.shape[0], index.shape[-1])
    for slot in range(entries.shape[1]):
        for block in range(w1.shape[0]):
            chosen = (entries[:, slot] == block).nonzero().flatten()
            rows = tokens[chosen]
            scale = rows.new_ones(1, 1) if gate is None else gate.reshape(entries.shape)[chosen, slot, None].to(rows)
            if gate_at == "input":
                rows, scale = scale * rows, torch.ones_like(scale)
            at_hidden = scale if gate_at == "both" else torch.ones_like(scale)
            at_lora = torch.ones_like(scale) if gate_at == "both" else scale
            first = at_hidden * F.linear(rows, w1[block], None if b1 is None else b1[block])
            h = hidden(first + low_rank(rows, lora_a1, lora_b1, block), activation, glu, alpha, limit, up_offset)
            second = F.linear(h, w2[block], b2[block] if b2 is not None and b2.dim() == 2 else None)
            second = scale * second + at_lora * low_rank(h, lora_a2, lora_b2, block)
            output = output.index_add(0, chosen, second)
    if b2 is not None and b2.dim() == 1:
        output = output + b2
    return output.view_as(input)
