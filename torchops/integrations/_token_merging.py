"""What token merging in the models of every library has alike: how many tokens each block removes, and what merged
tokens stand for, which travels with them from block to block."""

import operator
from typing import Any, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.fx
from torch import Tensor

from ..nn.tokens import merge_schedule


def switch_class(module: Any, cls: type) -> None:
    module.__class__ = cls


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def parse_r(r: Union[int, List[int], Tuple[int, float]], num_blocks: int) -> List[int]:
    expected = f"token merging: expected r to be a number, a list of {num_blocks} numbers or (r, inflection), got {r}"
    try:
        if isinstance(r, tuple):
            average, inflection = r
            r_per_block = merge_schedule(operator.index(average), num_blocks, inflection)
        elif isinstance(r, list):
            r_per_block = [operator.index(entry) for entry in r]
        else:
            r_per_block = [operator.index(r)] * num_blocks
    except (TypeError, ValueError) as error:
        raise TypeError(expected) from error
    if len(r_per_block) != num_blocks:
        raise ValueError(expected)
    if any(entry < 0 for entry in r_per_block):
        raise ValueError(f"token merging: expected r of 0 or more in every block, got {r_per_block}")
    return r_per_block


class Merged(NamedTuple):
    """What M tokens stand for, of the N that entered the first block."""

    size: Tensor  # [B, M]
    assign: Tensor  # [B, N]


MERGED = "_torchops_merged"


def set_merged(tokens: Tensor, merged: Optional[Merged]) -> None:
    # The storage, since a checkpointed block is run again on another tensor over the same one.
    has_storage = not torch.compiler.is_compiling() and not isinstance(tokens, torch.fx.Proxy)
    setattr(tokens.untyped_storage() if has_storage else tokens, MERGED, merged)


def marked(tokens: Tensor) -> Optional[Merged]:
    """What set_merged said of them."""
    if isinstance(tokens, torch.fx.Proxy):  # has every attribute that it is asked for
        return vars(tokens).get(MERGED)
    merged = getattr(tokens, MERGED, None)
    if merged is None and not torch.compiler.is_compiling():
        merged = getattr(tokens.untyped_storage(), MERGED, None)
    return merged
