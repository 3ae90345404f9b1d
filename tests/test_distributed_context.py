"""Attention over a sequence that several processes share: four on the CPU, with gloo, and two pairs of them."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import ProcessTest, needs_gloo, run_in_processes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchops
from torchops.distributed import gather_sequence, sent_keys, shard_sequence, span_attention

pytestmark = needs_gloo
TESTS: list[ProcessTest] = []


def test_in_four_processes(tmp_path: Path) -> None:
    run_in_processes(4, TESTS, tmp_path)


def in_four_processes(test: ProcessTest) -> ProcessTest:
    TESTS.append(test)
    return test


@functools.cache
def groups() -> list[dist.ProcessGroup]:
    """This process's pair, in which ranks are others than in the whole group for two of them, and all four."""
    return [dist.new_subgroups(group_size=2)[0], dist.group.WORLD]


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
        torch.testing.assert_close(result, shard(name, expected[name], zigzag, group), msg=lambda m: f"{name}: {m}", **tolerance)


@in_four_processes
def equals_one_process(rank: int) -> None:
    for span, group, zigzag in itertools.product(SPANS, groups(), (False, True)):
        try:
            compare(inputs(torch.float64), group, zigzag, SPANS[span], rtol=1e-11, atol=1e-12)
        except AssertionError as error:
            raise AssertionError(f"{span}, {dist.get_world_size(group)} ranks, zigzag={zigzag}") from error
