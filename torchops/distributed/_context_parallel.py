"""Attention of this rank's queries to the keys that go round the ring, and its gradient."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._namespace import operators
from ._layout import Part, parts
from ._merging import PartialAttention, accumulated_zeros
from ._rotation import GradientsOfKeys, Ring, rotate


def _with_keys(key: Tensor, value: Tensor, key_bias: Optional[Tensor]) -> List[Tensor]:
    """What goes with keys, each [B, heads, Lk / n, features]."""
    return [key, value] if key_bias is None else [key, value, key_bias[:, None, :, None]]


def _operands(part: Part, piece: Sequence[Tensor]) -> Dict[str, Any]:
    """The operator's arguments behind query, of the keys of a part."""
    key, value, *bias = (_keys_of(part, tensor) for tensor in piece)

    def start(positions: range) -> Tensor:
        return torch.full(key.shape[:1], positions.start, dtype=torch.int64, device=key.device)

    return {
        "key": key,
        "value": value,
        "key_bias": bias[0][:, 0, :, 0] if bias else None,
        "sink": None,  # seen once, apart from all keys
        "query_start": start(part.queries),
        "key_start": start(part.keys),
    }


def _queries_of(part: Part, tensor: Tensor) -> Tensor:
    return tensor.narrow(2, part.offset, len(part.queries))


def _keys_of(part: Part, tensor: Tensor) -> Tensor:
    return tensor.narrow(2, part.piece_offset, len(part.keys))


class ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Optional[Tensor],
        sink: Optional[Tensor],
        ring: Ring,
        scale: Optional[float],
    ) -> Tensor:
        options = {**ring.layout.span._asdict(), "scale": scale}
        whole = PartialAttention(query, value.shape[3], sink)
        for distance, pieces in rotate(ring, _with_keys(key, value, key_bias)):
            for part in parts(ring.layout, ring.rank, ring.owner(distance)):
                output, _, normalizer = operators._span_attention_forward(
                    _queries_of(part, query), **_operands(part, pieces[part.piece]), **options
                )
                whole.add(part.offset, output, normalizer)
        output, normalizer = whole.result(query.dtype)
        ctx.ring, ctx.options = ring, options
        ctx.save_for_backward(query, key, value, key_bias, sink, output, normalizer)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tuple[Optional[Tensor], ...]:
        query, key, value, key_bias, sink, output, normalizer = ctx.saved_tensors
        needs_query, *needs, needs_sink = ctx.needs_input_grad[:5]
        with_keys = _with_keys(key, value, key_bias)
        wanted = [number for number in range(len(with_keys)) if needs[number]]
        grad_query = accumulated_zeros(query) if needs_query else None
        of_keys = GradientsOfKeys(ctx.ring, [with_keys[number] for number in wanted])
        for distance, pieces in rotate(ctx.ring, with_keys) if needs_query or wanted else ():
            of_pieces = [[accumulated_zeros(piece[number]) for number in wanted] for piece in pieces]
            for part in parts(ctx.ring.layout, ctx.ring.rank, ctx.ring.owner(distance)):
                # Output and normalizer are those of all keys, which makes a part's probabilities those of the whole.
                of_query, *of_part = operators._span_attention_backward(
                    _queries_of(part, grad_output),
                    None,
                    _queries_of(part, query),
                    output=_queries_of(part, output),
                    normalizer=_queries_of(part, normalizer),
                    **_operands(part, pieces[part.piece]),
                    **ctx.options,
                    output_mask=[needs_query, *needs, False],
                )
                if grad_query is not None:
                    _queries_of(part, grad_query).add_(of_query)
                for sum, number in zip(of_pieces[part.piece], wanted, strict=True):
                    rows = _keys_of(part, sum)
                    rows.add_(of_part[number].view_as(rows))
            of_keys.add(distance, of_pieces)
        gradients: List[Optional[Tensor]] = [None, None, None]
        for number, gradient in zip(wanted, of_keys.result(), strict=True):
            gradients[number] = gradient if number < 2 else gradient[:, 0, :, 0]
        grad_sink = None
        if needs_sink:
            grad_sink = operators._span_attention_backward(
                grad_output, None, None, None, None, output, normalizer, None, sink, None, None,
                **ctx.options, output_mask=[False, False, False, False, True],
            )[4]  # fmt: skip
        return (None if grad_query is None else grad_query.to(query.dtype), *gradients, grad_sink, None, None)
