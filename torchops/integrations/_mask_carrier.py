"""A span on its way from the mask function of transformers to the layers, as a tensor.

Models pass their mask through code that knows tensors only: checkpoints detach it, devices are changed, graphs
are traced. So everything is in the tensor itself:

- its numbers are NaN with a payload: [B, 3, S, Lk] float64 with, for each key, whether it is hidden, the
  query's start and the key's. Attention that uses it as a mask gives NaN or fails, and never ignores padding;
- S is the number of what it says for all rows: a span, or why there is none. No memory is taken for it.
"""

import operator
import threading
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from ._mask_functions import Span


class Visible(NamedTuple):
    span: Span
    key_bias: Optional[Tensor] = None  # [B, Lk]
    query_start: Optional[Tensor] = None  # [B]
    key_start: Optional[Tensor] = None  # [B]


# A span and whether keys may be hidden beside it, or why there is no span.
Said = Union[Tuple[int, int, int, bool, bool], str]

# The middle of the integers that are quiet NaN when read as float64.
NAN = 0x7FFC_0000_0000_0000
ROWS = 3
FIRST = 2  # a size of 1 would broadcast

_said: List[Said] = []
_numbers: Dict[Said, int] = {}
_lock = threading.Lock()


@torch.compiler.assume_constant_result
def number_of(said: Said) -> int:
    with _lock:
        if said not in _numbers:
            _numbers[said] = FIRST + len(_said)
            _said.append(said)
        return _numbers[said]


@torch.compiler.assume_constant_result
def said_by(number: int) -> Optional[Said]:
    return _said[number - FIRST] if FIRST <= number < FIRST + len(_said) else None


def pack(said: Said, hidden: Tensor, query_start: Tensor, key_start: Tensor) -> Tensor:
    """hidden bool [B, Lk], query_start and key_start int64 [B] -> [B, 3, S, Lk], a view of [B, 3, Lk]."""
    starts = torch.stack([query_start, key_start], 1)[..., None].expand(-1, -1, hidden.shape[1])
    carrier = (torch.cat([hidden[:, None].long(), starts], 1) + NAN).view(torch.float64)
    return carrier[:, :, None].expand(-1, -1, number_of(said), -1)


def unpack(carrier: Tensor, query: Tensor) -> Union[Visible, str, None]:
    """What pack was told: a string is the reason why there is no span. None if it did not make this tensor.

    Args:
        query: [B, H, Lq, D]. A tensor [B, H, Lq, Lk] may be somebody's mask.
    """
    if carrier.dtype != torch.float64 or carrier.dim() != 4 or carrier.shape[1] != ROWS:
        return None
    if carrier.shape[1:3] == query.shape[1:3] and carrier.stride(2) != 0:
        return None
    said = said_by(operator.index(carrier.shape[2]))  # a number also where shapes are symbols
    if not isinstance(said, tuple):
        return said
    *span, padded = said
    payload = (carrier[:, :, 0].view(torch.int64) - NAN).expand(query.shape[0], -1, -1)
    # log of 1 for keys that are seen and of 0 for the others
    key_bias = (1 - payload[:, 0]).float().log() if padded else None
    return Visible(Span(*span), key_bias, payload[:, 1, 0], payload[:, 2, 0])
