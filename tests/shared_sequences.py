"""Sequences that several processes share, for tests: inputs, comparison with one process, and what is sent."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import torchops
from torchops.distributed import shard_sequence, span_attention

LENGTH = 48
FULL = {"is_causal": False}
CAUSAL = {"is_causal": True}
SPANS = {
    "full": FULL,
    "causal": CAUSAL,
    "a window within a slice": {"left": 5, "right": 0, "is_causal": True},
    "a window over several slices": {"left": 29, "right": 0, "is_causal": True},
    "to both sides": {"left": 4, "right": 7},
    "to the right only": {"left": 0, "right": 20},
    "behind, without bound": {"left": 3, "right": -1},
    "blocks as slices": {"block_size": 12, "left": 0, "right": 0, "is_causal": True},
    "blocks across slices": {"block_size": 7, "left": 0, "right": 0},
    "blocks and the ones before": {"block_size": 5, "left": 2, "right": 0, "is_causal": True},
    "causal by blocks": {"block_size": 16, "left": -1, "right": 0},
}


def inputs(dtype: torch.dtype, length: int = LENGTH, num_keys: int | None = None) -> dict[str, Tensor]:
    """The same on all ranks: two query heads share keys, values have other dimensions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    num_keys = length if num_keys is None else num_keys
    bias = normal(2, num_keys)
    bias[0, 3:9] = -torch.inf
    return {
        "query": normal(2, 4, length, 6),
        "key": normal(2, 2, num_keys, 6),
        "value": normal(2, 2, num_keys, 5),
        "key_bias": bias,
        "sink": normal(4),
        "grad_output": normal(2, 4, length, 5),
    }


def sequence_dim(name: str) -> int:
    return 1 if name == "key_bias" else 2


def shard(name: str, tensor: Tensor, zigzag: bool, group: dist.ProcessGroup) -> Tensor:
    return tensor if name == "sink" else shard_sequence(tensor, sequence_dim(name), zigzag, group)


def run(attention: Callable, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output, and the gradients of what requires one."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items() if name[:4] != "grad"}
    output = attention(**leaves, **options)
    output.backward(tensors["grad_output"])
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def compare(
    whole: dict[str, Tensor], group: dist.ProcessGroup, zigzag: bool, options: dict[str, Any], **tolerance: float
) -> None:
    expected = run(torchops.span_attention, whole, **options)
    slices = {name: shard(name, tensor, zigzag, group) for name, tensor in whole.items()}
    results = run(span_attention, slices, **options, zigzag=zigzag, group=group)
    assert results["output"].dtype == slices["query"].dtype
    if "sink" in results:
        dist.all_reduce(results["sink"], group=group)
    for name, result in results.items():
        torch.testing.assert_close(
            result,
            shard(name, expected[name], zigzag, group),
            msg=functools.partial("{}: {}".format, name),
            **tolerance,
        )


@contextmanager
def events(happened: list[str], sent: Counter) -> Iterator[None]:
    """Records calls of the operators, messages posted and waited for, and the bytes that go to each rank."""
    implementation = torchops.distributed._context_parallel
    post, operators = dist.batch_isend_irecv, implementation.operators

    class Work:
        def __init__(self, works: list[dist.Work]) -> None:
            self.works = works

        def wait(self) -> None:
            happened.append("wait")
            for work in self.works:
                work.wait()

    def recording_post(messages: list[dist.P2POp]) -> list[Work]:
        happened.append("post")
        for message in messages:
            if message.op is dist.isend:
                sent[message.group_peer] += message.tensor.nbytes
        return [Work(post(messages))]

    class RecordingOperators:
        def __getattr__(self, name: str) -> Callable:
            happened.append("compute")
            return getattr(operators, name)

    dist.batch_isend_irecv, implementation.operators = recording_post, RecordingOperators()
    try:
        yield
    finally:
        dist.batch_isend_irecv, implementation.operators = post, operators


@contextmanager
def sent_bytes() -> Iterator[Counter]:
    sent: Counter = Counter()
    with events([], sent):
        yield sent
