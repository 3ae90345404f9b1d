"""The routed_ffn family: calls that the contract makes, and calls that must fail."""

from collections.abc import Iterator

import torch
from contract import Inputs, Invalid, OpCase, Sample, integers
from torch import Tensor

from torchops.reference import routed_ffn as reference


def choices(tokens: int, slots: int, blocks: int, device: str, skipped: int = 0) -> Tensor:
    """Some entries name no block, below 0 or above the last one."""
    return integers(-skipped, blocks + skipped, tokens, slots, device=device)


def route_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    if dtype != torch.float32:
        return  # choices are integers whatever they were made of
    for tokens, slots, blocks, skipped in [
        (37, 2, 4, 0),
        (100, 2, 4, 2),
        (9, 3, 20, 0),  # blocks without tokens
        (5000, 1, 3, 1),  # several pieces
        (2048, 2, 300, 3),  # as many entries as two pieces have, and more blocks than threads
        (1025, 2, 5, 0),  # an entry more than a piece has
        (64, 1, 1, 0),
        (0, 2, 3, 0),
        (6, 0, 3, 0),
        (1, 1, 2, 0),
    ]:
        inputs = {"index": choices(tokens, slots, blocks, device, skipped), "num_blocks": blocks}
        yield Sample(f"T{tokens}-k{slots}-G{blocks}-{skipped}", inputs)
    yield Sample("int32", {"index": choices(50, 2, 4, device, 1).int(), "num_blocks": 4})
    yield Sample("one-block", {"index": torch.full((70, 2), 3, device=device), "num_blocks": 5})
    yield Sample("none", {"index": torch.full((70, 2), -1, device=device), "num_blocks": 5})
    far = torch.tensor([[2**31, 0], [2**32, 1], [-(2**63), 1], [2**63 - 1, 0]], device=device)
    yield Sample("far-away", {"index": far, "num_blocks": 2})


def route_invalid(device: str) -> Iterator[Invalid]:
    index = choices(6, 2, 3, device)
    yield Invalid("rank", {"index": index[0], "num_blocks": 3}, "expected index of shape [T, k], got [2]")
    yield Invalid("dtype", {"index": index.float(), "num_blocks": 3}, "expected index of dtype Long or Int, got Float")
    yield Invalid("G0", {"index": index, "num_blocks": 0}, "expected num_blocks in 1..1048576, got 0")
    many = torch.empty(1, dtype=torch.int32, device=device).expand(2**30, 2)
    bound = "the largest 32-bit integer = 2147483647, got 2147483648"
    yield Invalid("T-k", {"index": many, "num_blocks": 3}, f"expected T k <= {bound}")
    yield Invalid("many", {"index": index, "num_blocks": 2**21}, "expected num_blocks in 1..1048576, got 2097152")


def route_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return {"index": choices(9 * length, 2, 7, device, 1), "num_blocks": 7}


CASES = [
    OpCase("route", route_samples, route_invalid, route_sized, reference=reference.route, launches=3),
]
