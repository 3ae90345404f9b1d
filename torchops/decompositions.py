"""The operators as torch's own, for exported programs that leave for ONNX Runtime, ExecuTorch or Core ML.

Most are the reference; here are those whose reference looks at numbers on its way, in forms whose shapes depend on
shapes alone.
"""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import reference
from ._namespace import operators
from .reference.routed_ffn import hidden
from .reference.stf import ROWS_PER_GROUP
from .reference.tokens import SIMILARITY_STEPS, cosine_similarity

__all__ = ["decompositions"]

# Their first result is not of the input's dtype, but of that of sums.
OF_SUMS = ("pq_loss", "topk_scores")


def decompositions() -> Dict[Any, Callable]:
    """What ``ExportedProgram.run_decompositions`` takes to leave no operator of torchops in a program.

    It is torch's default table, and with it a form of each operator in torch's own, of the view by which factored
    layers read their positions, and of the stable sort by which routers choose. They compute what the operators do, up
    to rounding, and in 16-bit dtypes add up in float32 as they do; but they store what operators do not: attention
    has all its scores, and a routed layer computes all blocks for every token (for every choice of a token, where gates
    are not at the output). Not in it are ``stf_factorize`` and ``stf_project``, which convert and train models.

    Returns:
        A table from operators to functions.

    >>> class Attend(nn.Module):
    ...     def forward(self, query, key, value):
    ...         return torchops.span_attention(query, key, value, is_causal=True)
    >>> inputs = torch.randn(3, 1, 2, 10, 8).unbind()
    >>> program = torch.export.export(Attend(), inputs).run_decompositions(torchops.decompositions())
    >>> any("torchops" in str(node.target) for node in program.graph.nodes)
    False
    >>> torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))
    """
    table: Dict[Any, Callable] = torch.export.default_decompositions()
    for name, function in {**of_references(), **FUNCTIONAL}.items():
        overload = getattr(operators, name).default
        table[overload] = in_dtype_of_sums(overload, function, name in OF_SUMS)
    table[torch.ops.aten.view.dtype] = view_of_bytes
    table[torch.ops.aten.sort.stable] = sort
    return table


def of_references() -> Dict[str, Callable]:
    families = {
        reference.span_attention: ("span_attention", "span_attention_lse"),
        reference.sparse_attention: (
            *("topk_attention", "topk_attention_lse", "topk_scores", "pq_encode", "pq_topk"),
            *("pq_attention", "pq_attention_lse", "pq_loss"),
        ),
        reference.stf: ("stf_linear",),
        reference.tokens: ("merge_tokens", "unmerge_tokens"),
    }
    return {name: getattr(family, name) for family, names in families.items() for name in names}


def in_dtype_of_sums(overload: Any, function: Callable, stays: bool) -> Callable:
    """Takes an operator's arguments as its schema has them, and the function's by their names."""
    defaults = {argument.name: argument.default_value for argument in overload._schema.arguments}

    def decomposition(*given: Any, **named: Any) -> Any:
        call = {**defaults, **dict(zip(defaults, given, strict=False)), **named}
        floats = [value for value in call.values() if isinstance(value, Tensor) and value.is_floating_point()]
        wide = torch.float64 if floats and floats[0].dtype == torch.float64 else torch.float32
        for name, value in call.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                call[name] = value.to(wide)
        result = function(**call)
        first, *others = result if isinstance(result, tuple) else (result,)
        if first.is_floating_point() and not stays:
            first = first.to(floats[0].dtype)
        return (first, *others) if isinstance(result, tuple) else first

    return decomposition


# ---- choices ------------------------------------------------------------------------------------
# torch's topk does not say which of equal numbers it takes, and its stable sort does not leave for ONNX.


def sort(input: Tensor, *, stable: Optional[bool], dim: int = -1, descending: bool = False) -> Tuple[Tensor, Tensor]:
    """ONNX has no other sort than one that takes the first of equal numbers first, as torch's does on the CPU."""
    return torch.ops.aten.sort.default(input, dim, descending)


def first_best(scores: Tensor, allowed: Tensor, k: Any) -> Tensor:
    """bool, as scores [..., N]: the k largest of those allowed, of equal ones the first."""
    scores = torch.where(allowed & ~scores.isnan(), scores, -torch.inf)
    around = pad(pad(scores, (0, k), value=-torch.inf), (1, 0), value=torch.inf)  # k may be 0, or more than there are
    smallest = around.topk(k + 1, dim=-1).values[..., -1:]
    above, equal = allowed & (scores > smallest), allowed & (scores == smallest)
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def ascending(chosen: Tensor, k: Any) -> Tensor:
    """The places of at most k that are chosen, N behind them where there are fewer."""
    num_places = chosen.shape[-1]
    places = torch.arange(num_places, device=chosen.device)
    places = pad(torch.where(chosen, places, num_places), (0, k), value=num_places)
    return (places.topk(k, dim=-1, largest=False).values).sort(dim=-1).values


def score_topk(
    query: Tensor,
    key: Tensor,
    k: int,
    weights: Optional[Tensor] = None,
    key_bias: Optional[Tensor] = None,
    query_start: Optional[Tensor] = None,
    key_start: Optional[Tensor] = None,
    relu: bool = False,
    block_size: int = 1,
    query_block: int = 1,
    is_causal: bool = False,
) -> Tensor:
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    position, start = reference.sparse_attention.positions(
        batch, num_queries, num_keys, query_start, key_start, query.device
    )
    key_position = start[:, None] + torch.arange(num_keys, device=query.device)
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)
    scores = scores.relu() if relu else scores
    if weights is not None:
        scores = (weights[..., None] * scores).sum(1, keepdim=True)
    seen = ~scores.isnan()
    if is_causal:
        seen = seen & (key_position[:, None] <= position[..., None])[:, None]
    if key_bias is not None:
        seen = seen & (key_bias != -torch.inf)[:, None, None]

    def largest(dim: int, group: Tensor, shape: Sequence[Any]) -> Tuple[Tensor, Tensor]:
        """Of the scores in each group, and whether one of them is seen."""
        group = group.expand_as(scores)
        best = scores.new_full(shape, -torch.inf).scatter_reduce(dim, group, scores, "amax")
        return best, scores.new_zeros(shape).scatter_reduce(dim, group, seen.to(scores.dtype), "amax") > 0

    scores = torch.where(seen, scores, -torch.inf)
    of_list = torch.arange(num_queries, device=query.device) // query_block
    lists = (num_queries + query_block - 1) // query_block
    scores, seen = largest(2, of_list[:, None], (batch, scores.shape[1], lists, num_keys))
    names = torch.arange(num_keys, device=query.device).expand(batch, -1)
    if block_size > 1:
        block = key_position.div(block_size, rounding_mode="floor")
        first = block[:, :1] if num_keys else block.new_zeros(batch, 1)
        scores, seen = largest(3, (block - first)[:, None, None], scores.shape)
        names = first + names
        seen = seen & ((names >= 0) & (names < 2**31))[:, None, None]
    chosen = ascending(first_best(scores, seen, k), k)
    names = pad(names, (0, 1), value=-1)[:, None, None].expand(*chosen.shape[:3], -1)
    return names.gather(-1, chosen).int()


# ---- tokens -------------------------------------------------------------------------------------


def bipartite_pairs(
    metric: Tensor, r: int, padding_mask: Optional[Tensor] = None, num_protected: int = 0
) -> Tuple[Tensor, Tensor]:
    batch, num_tokens, _ = metric.shape
    r = torch.sym_min(r, (num_tokens - num_protected) // 2)
    position = torch.arange(num_tokens, device=metric.device)
    padding = metric.new_zeros(batch, num_tokens, dtype=torch.bool) if padding_mask is None else padding_mask
    candidate = (position >= num_protected) & ~padding
    is_source, is_destination = candidate & (position % 2 == 0), candidate & (position % 2 == 1)
    # Similarities are -inf, or in -1..1: whoever is no destination is less similar than all that are.
    similarity = cosine_similarity(metric).double().clamp(min=-2).masked_fill(~is_destination[:, None], -3)
    similarity = pad(similarity, (0, 1), value=-4)  # so that there is one, also without tokens
    best = similarity.amax(-1)
    place = torch.arange(num_tokens + 1, device=metric.device)
    destination = torch.where(similarity == best[..., None], place, num_tokens).amin(-1)
    matched = is_source & (best > -3)
    # Matches by falling similarity, of equals the first one; behind them padding, the last one first; then all others.
    steps = ((best + 3) * SIMILARITY_STEPS).round().long()
    key = torch.where(padding, position - num_tokens, -num_tokens - 1 - position)
    key = torch.where(matched, (steps + 1) * num_tokens - position, key)
    order = key.topk(r, dim=-1).indices
    return order, torch.where(matched, destination, -1).gather(1, order)


def bipartite_assignment(
    metric: Tensor, r: int, padding_mask: Optional[Tensor] = None, num_protected: int = 0
) -> Tensor:
    sources, destinations = bipartite_pairs(metric, r, padding_mask, num_protected)
    stays = torch.ones(metric.shape[:2], dtype=torch.int64, device=metric.device).scatter(1, sources, 0)
    assign = stays.cumsum(1) - 1
    joined = torch.where(destinations < 0, -1, assign.gather(1, destinations.clamp(min=0)))
    return assign.scatter(1, sources, joined)


def topk_assignment(
    scores: Tensor, k: int, padding_mask: Optional[Tensor] = None, num_protected: int = 0, fuse: bool = False
) -> Tensor:
    batch, num_tokens = scores.shape
    k = torch.sym_min(k, num_tokens - num_protected)
    position = torch.arange(num_tokens, device=scores.device)
    padding = torch.zeros_like(scores, dtype=torch.bool) if padding_mask is None else padding_mask
    free = position >= num_protected
    numbers = free & ~padding & ~scores.isnan()
    kept = first_best(scores, numbers, k)
    for tier in (free & ~padding & scores.isnan(), free & padding):
        kept = kept | (tier & (tier.cumsum(-1) <= k - kept.sum(-1, keepdim=True)))
    kept = (kept | ~free).long()
    rest = torch.where(padding, -1, num_protected + k if fuse else -1)
    return torch.where(kept > 0, kept.cumsum(1) - 1, rest)


# ---- routed layers ------------------------------------------------------------------------------


def route(index: Tensor, num_blocks: int) -> Tuple[Tensor, Tensor]:
    block = index.flatten().long()
    block = torch.where((block >= 0) & (block < num_blocks), block, num_blocks)
    place = torch.arange(block.shape[0], device=index.device)
    offsets = (block[:, None] < torch.arange(num_blocks + 1, device=index.device)).sum(0)
    return (block * block.shape[0] + place).sort().indices.int(), offsets.int()


def grouped_linear(
    input: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    bias: Optional[Tensor] = None,
    slots: Optional[int] = None,
) -> Tensor:
    rows = input if slots is None else input[order.long() // slots]
    place = torch.arange(rows.shape[0], device=rows.device)
    block = (place[:, None] >= offsets[1:]).sum(1)  # G behind the last one
    of_blocks = torch.einsum("mk,gnk->mgn", rows, weight)
    if bias is not None:
        of_blocks = of_blocks + bias
    is_its = block[:, None] == torch.arange(weight.shape[0], device=rows.device)
    return of_blocks.masked_fill(~is_its[..., None], 0).sum(1)


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
    w1 = w1 if w_gate is None else torch.cat([w_gate, w1], 1)
    entries = index.reshape(tokens.shape[0], index.shape[-1])
    chosen = entries[..., None] == torch.arange(w1.shape[0], device=index.device)  # [T, k, G]
    ones = chosen.to(tokens.dtype)
    gates = ones if gate is None else gate.reshape(entries.shape)[..., None].expand_as(ones).masked_fill(~chosen, 0)
    # Where gates are at the output, all slots of a token have the same blocks to choose from.
    slots = [(chosen.any(1), gates.sum(1), ones.sum(1))]
    if gate_at != "output":
        slots = list(zip(chosen.unbind(1), gates.unbind(1), ones.unbind(1), strict=True))
    output = torch.zeros_like(tokens)
    for is_chosen, scale, one in ((mask, scale[..., None], one[..., None]) for mask, scale, one in slots):
        rows = tokens[:, None].expand(-1, w1.shape[0], -1)
        rows = scale * rows if gate_at == "input" else rows
        first = product(rows, w1, b1)
        first = scale * first if gate_at == "both" else first
        first = first if lora_a1 is None else first + lora_scale * low_rank(rows, lora_a1, lora_b1)
        units = hidden(first, activation, glu, alpha, limit, up_offset)
        second = product(units, w2, b2 if b2 is not None and b2.dim() == 2 else None)
        second = (one if gate_at == "input" else scale) * second
        if lora_a2 is not None:
            second = second + (scale if gate_at == "output" else one) * lora_scale * low_rank(units, lora_a2, lora_b2)
        # Nothing of blocks that a token did not choose, which may hold anything.
        output = output + second.masked_fill(~is_chosen[..., None], 0).sum(1)
    if b2 is not None and b2.dim() == 1:
        output = output + b2
    return output.view_as(input)


def product(rows: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """[T, G, K] times [G, N, K] or [1, N, K], plus [G, N]."""
    result = torch.einsum("tgk,gnk->tgn", rows, weight.expand(rows.shape[1], -1, -1))
    return result if bias is None else result + bias


def low_rank(rows: Tensor, a: Tensor, b: Any) -> Tensor:
    return product(product(rows, a), b)


# ---- factored layers ----------------------------------------------------------------------------


def stf_select(latent: Tensor, nnz: int) -> Tuple[Tensor, Tensor]:
    sizes = torch.where(latent.isnan(), torch.inf, latent.abs())
    indices = ascending(first_best(sizes, torch.ones_like(sizes, dtype=torch.bool), nnz), nnz)
    return latent.gather(-1, indices), indices.to(torch.uint8 if latent.shape[-1] <= 256 else torch.int16)


def stf_linear_straight_through(
    input: Tensor, basis: Tensor, latent: Tensor, nnz: int, bias: Optional[Tensor] = None, transpose: bool = False
) -> Tensor:
    values, indices = stf_select(latent, nnz)
    return reference.stf.stf_linear(input, basis, values, indices, bias, transpose)


def bits(device: torch.device) -> Tensor:
    """Powers of two: masks have a row in each bit, and ONNX shifts no signed integers."""
    return 2 ** torch.arange(ROWS_PER_GROUP, device=device)


def view_of_bytes(input: Tensor, dtype: torch.dtype) -> Tensor:
    """The positions of an ``STFLinear``, which keeps them as bytes, the lower one first; ONNX views no bytes."""
    if (input.dtype, dtype) != (torch.uint8, torch.int16):
        return NotImplemented
    low, high = input.long().unflatten(-1, (-1, 2)).unbind(-1)
    return signed(low + 256 * high)


def signed(number: Tensor) -> Tensor:
    """int16 of the same bits as numbers in 0..2**16 - 1."""
    return torch.where(number < 2**15, number, number - 2**16).to(torch.int16)


def stf_pack(values: Tensor, indices: Tensor, basis_size: int) -> Tuple[Tensor, Tensor]:
    num_rows, num_blocks, nnz = values.shape
    groups = (num_rows + ROWS_PER_GROUP - 1) // ROWS_PER_GROUP
    # Rows that complete the last group: zeros at the columns 0..nnz-1.
    more = (ROWS_PER_GROUP - 1, num_blocks, nnz)
    columns = torch.arange(nnz, device=values.device).expand(more)
    values = torch.cat([values, values.new_zeros(more)])[: groups * ROWS_PER_GROUP]
    indices = torch.cat([indices.long(), columns])[: groups * ROWS_PER_GROUP]

    def by_column(code: Tensor) -> Tensor:  # [rows, blocks, K] -> [groups, blocks, K, rows of a group]
        return code.reshape(groups, ROWS_PER_GROUP, num_blocks, basis_size).permute(0, 2, 3, 1)

    empty = values.new_zeros(values.shape[0], num_blocks, basis_size)
    code = by_column(empty.scatter(-1, indices, values))
    there = by_column(empty.long().scatter(-1, indices, 1))
    # What is there, in the order of columns and then rows.
    first = ascending(there.flatten(2) > 0, ROWS_PER_GROUP * nnz)
    mask = (there * bits(values.device)).sum(-1)
    return code.flatten(2).gather(-1, first), signed(mask)


def stf_linear_packed(
    input: Tensor,
    basis: Tensor,
    packed_values: Tensor,
    mask: Tensor,
    rows: int,
    bias: Optional[Tensor] = None,
    transpose: bool = False,
) -> Tensor:
    there = mask.long()[..., None].remainder(2**16).div(bits(mask.device), rounding_mode="floor").remainder(2)
    place = (there.flatten(2).cumsum(-1) - 1).clamp(min=0)
    packed_values = pad(packed_values, (0, 1))  # so that there is one
    code = packed_values.gather(-1, place).view_as(there) * there
    # [groups, blocks, K, rows of a group] -> [rows, blocks, K]
    code = code.permute(0, 3, 1, 2).flatten(0, 1)[:rows]
    weight = torch.einsum("rbk,bkc->rbc", code, basis).flatten(1)
    return torch.nn.functional.linear(input, weight.T if transpose else weight, bias)


FUNCTIONAL: Dict[str, Callable] = {
    function.__name__: function
    for function in (
        *(score_topk, bipartite_pairs, bipartite_assignment, topk_assignment),
        *(route, grouped_linear, routed_ffn),
        *(stf_select, stf_linear_straight_through, stf_pack, stf_linear_packed),
    )
}
