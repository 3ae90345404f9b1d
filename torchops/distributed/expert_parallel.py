"""Routed feed-forward layers whose blocks, or experts, are dealt to ranks.

Two schemes. Where ranks have different tokens, each token is sent once to every rank that has a block for it, with its
gates, and one row comes back from each: the sum over that rank's blocks. Where all ranks have the same tokens, each
computes its own blocks of all of them, and the results are added up by one all_reduce.
"""

from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single_autograd

from .._namespace import operators
from ._calls import agree, check_without_data, described, lowered, members, outside_graphs

__all__ = ["routed_ffn"]


@outside_graphs
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
    replicated: bool = False,
    group: Optional[dist.ProcessGroup] = None,
) -> Tensor:
    """:func:`torchops.routed_ffn` of G blocks, of which each of n ranks holds the weights of G / n: rank r those of
    blocks r G / n to (r + 1) G / n - 1.

    Equal to the operator with all weights in one process but for rounding, and the same bits from run to run.
    Differentiable in everything that the operator is differentiable in; every rank must go through the backward, one
    without tokens too. Weights of blocks get the gradient of all ranks' tokens; those that all ranks share (b2 [d],
    LoRA factors [1, ...]) that of what this rank computed, like a router's.

    Args:
        input, index, gate: this rank's tokens [..., d], any number of them, and their choices [..., k] among all G
            blocks. An entry outside of 0..G - 1 is skipped and sent nowhere.
        w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2: as there, with this rank's G / n blocks for G. b2
            [d] is added by the rank of the token.
        activation, glu, alpha, limit, up_offset, gate_at, lora_scale, recompute: as there.
        replicated: all ranks have the same input, index and gate, and compute the same loss. Nothing is sent but the
            sums of the outputs, and of the gradients to input and gate in the backward.
        group: the ranks that share the blocks; all for None.

    Returns:
        [..., d], this rank's tokens, in the input's dtype.

    Raises:
        ValueError: on every rank of the group: what :func:`torchops.routed_ffn` refuses, shapes of weights, dtypes or
            options that differ between ranks. They are compared at the first call of a configuration, by one
            collective. On this rank: a group without it.
        RuntimeError: from torch.distributed, where a rank died, or did not call within the group's timeout.

    Without ``replicated`` the numbers of rows that go from rank to rank are read by the host, once in a call.

    Source: GShard (Lepikhin et al., 2020), Switch Transformers (Fedus et al., 2021).

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> x, index, gate = torch.randn(10, 16), torch.randint(4, (10, 2)), torch.rand(10, 2)
    >>> torchops.distributed.routed_ffn(x, index, gate, torch.randn(4, 32, 16), torch.randn(4, 16, 32)).shape
    torch.Size([10, 16])
    >>> dist.destroy_process_group()
    """
    name = "distributed.routed_ffn"
    group, rank, world_size = members(name, group)
    weights = {
        "w1": w1,
        "w2": w2,
        "b1": b1,
        "b2": b2,
        "w_gate": w_gate,
        "lora_a1": lora_a1,
        "lora_b1": lora_b1,
        "lora_a2": lora_a2,
        "lora_b2": lora_b2,
    }
    options = {
        "activation": activation,
        "glu": glu,
        "alpha": alpha,
        "limit": limit,
        "up_offset": up_offset,
        "gate_at": gate_at,
        "lora_scale": lora_scale,
        "recompute": recompute,
    }
    if world_size == 1:
        return operators.routed_ffn(input, index, gate, **weights, **options)

    tokens = {"input": input, "index": index, "gate": gate}

    def check() -> None:
        check_without_data(name, operators.routed_ffn, {**tokens, **weights}, **options)

    described_tokens = described(tokens, of_rows=() if replicated else tokens)
    agree(name, group, {**described_tokens, **described(weights), **options, "replicated": replicated}, check)
    if b2 is not None and b2.dim() == 1:
        weights["b2"] = None
    scheme = _everywhere if replicated else _at_owners
    output = scheme(lowered(input), index, gate, {**weights, **options}, group)
    return output if b2 is None or b2.dim() == 2 else output + lowered(b2)


def _everywhere(
    input: Tensor, index: Tensor, gate: Optional[Tensor], layer: Dict[str, Any], group: dist.ProcessGroup
) -> Tensor:
    """All tokens on this rank, whose result lacks the blocks of the others."""
    first = dist.get_rank(group) * layer["w1"].shape[0]
    gate = None if gate is None else _Replicated.apply(gate, group)
    part = operators.routed_ffn(_Replicated.apply(input, group), index.long() - first, gate, **layer)
    return _SumOfRanks.apply(part, group)


def _at_owners(
    input: Tensor, index: Tensor, gate: Optional[Tensor], layer: Dict[str, Any], group: dist.ProcessGroup
) -> Tensor:
    """Each token on the ranks of its blocks. Rows are moved by operators whose gradients are sums in a fixed order."""
    tokens, choices = input.reshape(-1, input.shape[-1]), index.reshape(-1, index.shape[-1])
    token, local_index, sent, received = _rows(choices.long(), layer["w1"].shape[0], group)

    def rows_of(tensor: Tensor) -> Tensor:
        rows = operators.unmerge_tokens(tensor[None], token)[0]
        return all_to_all_single_autograd(rows, received, sent, group)

    computed = operators.routed_ffn(
        rows_of(tokens),
        all_to_all_single_autograd(local_index, received, sent, group),
        None if gate is None else rows_of(gate.reshape(choices.shape)),
        **layer,
    )
    returned = all_to_all_single_autograd(computed, sent, received, group)
    merged, _ = operators.merge_tokens(returned[None], token, tokens.shape[0], normalize=False)
    return merged[0].view(input.shape)


def _rows(index: Tensor, num_blocks: int, group: dist.ProcessGroup) -> Tuple[Tensor, Tensor, List[int], List[int]]:
    """Which rows go where: one for each token and rank that has some of its blocks, by rank and then by token.

    Returns:
        The rows' tokens, int64 [1, M], their choices among the blocks of their rank, int32 [M, k] with -1 for blocks of
        others, and how many rows go to and come from each rank.
    """
    ranks = dist.get_world_size(group)
    is_block = (index >= 0) & (index < ranks * num_blocks)
    owner = torch.where(is_block, index // num_blocks, ranks)
    meets = index.new_zeros(ranks + 1, index.shape[0], dtype=torch.bool).scatter_(0, owner.T, True)[:ranks]
    rank, token = meets.nonzero().unbind(1)
    local_index = torch.where(owner[token] == rank[:, None], index[token] - rank[:, None] * num_blocks, -1)
    counts = meets.sum(1)
    incoming = torch.empty_like(counts)
    dist.all_to_all_single(incoming, counts, group=group)
    sent, received = torch.stack([counts, incoming]).tolist()
    return token[None], local_index.int(), sent, received


class _Replicated(torch.autograd.Function):
    """What all ranks have alike and each uses for a part: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return input.view_as(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tuple[Tensor, None]:
        gradient = grad_output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _SumOfRanks(torch.autograd.Function):
    """The sum over ranks, of which all compute the same loss: it has the same gradient everywhere."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tuple[Tensor, None]:
        return grad_output, None
