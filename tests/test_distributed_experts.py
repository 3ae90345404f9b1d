"""Feed-forward layers whose blocks several processes share: four on the CPU, with gloo, and two pairs of them."""

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import ProcessTest, collected_in, groups, needs_gloo, run_in_processes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchops
from torchops.distributed import routed_ffn

pytestmark = needs_gloo
TESTS: list[ProcessTest] = []
in_four_processes = collected_in(TESTS)


def test_in_four_processes(tmp_path: Path) -> None:
    run_in_processes(4, TESTS, tmp_path)


BLOCKS, DIM, UNITS, SLOTS = 8, 6, 5, 3
TOKENS = [7, 0, 4, 9]  # of each rank


def layer(kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of all blocks, the same on all ranks, and options."""
    generator = torch.Generator().manual_seed(1)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    plain = {"w1": normal(BLOCKS, UNITS, DIM), "w2": normal(BLOCKS, DIM, UNITS)}
    if kind == "biases of blocks":
        return {**plain, "b1": normal(BLOCKS, UNITS), "b2": normal(BLOCKS, DIM)}, {"activation": "gelu"}
    if kind == "gated":
        sides = {"b1": normal(BLOCKS, 2 * UNITS), "b2": normal(DIM), "w_gate": normal(BLOCKS, UNITS, DIM)}
        return {**plain, **sides}, {"activation": "silu", "glu": "split", "limit": 2.0, "gate_at": "input"}
    if kind == "low rank":
        factors = {
            "lora_a1": normal(1, 2, DIM),
            "lora_b1": normal(BLOCKS, UNITS, 2),
            "lora_a2": normal(BLOCKS, 2, UNITS),
            "lora_b2": normal(1, DIM, 2),
        }
        return {**plain, **factors}, {"gate_at": "both", "lora_scale": 0.5, "recompute": True}
    return plain, {}


KINDS = ["plain", "biases of blocks", "gated", "low rank"]


def is_shared(weight: Tensor) -> bool:
    return weight.shape[0] != BLOCKS


def tokens(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Of each of four ranks: entries that go nowhere (2**32 is 0 in 32 bits), blocks named twice, a rank with none."""
    generator = torch.Generator().manual_seed(2)
    drawn = []
    for count in TOKENS:
        index = torch.randint(-2, BLOCKS + 2, (count, SLOTS), generator=generator)
        drawn.append(
            {
                "input": torch.randn(count, DIM, generator=generator, dtype=torch.float64).to(dtype),
                "index": torch.where(index == BLOCKS + 1, 2**32, index),
                "gate": torch.rand(count, SLOTS, generator=generator, dtype=torch.float64).to(dtype),
                "grad_output": torch.randn(count, DIM, generator=generator, dtype=torch.float64).to(dtype),
            }
        )
    return drawn


def joined(of_ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([rank[name] for rank in of_ranks]) for name in of_ranks[0]}


def run(function: Callable, rows: dict[str, Tensor], weights: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output, and the gradients."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
    input, gate = (
        rows[name] if rows[name] is None else rows[name].clone().requires_grad_() for name in ("input", "gate")
    )
    output = function(input, rows["index"], gate, **leaves, **options)
    output.backward(rows["grad_output"])
    of_gate = {} if gate is None else {"gate": gate.grad}
    return {"output": output.detach(), "input": input.grad, **of_gate, **{n: leaf.grad for n, leaf in leaves.items()}}


def blocks_of(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return tensor if is_shared(tensor) else tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def compare(kind: str, dtype: torch.dtype, group: dist.ProcessGroup, replicated: bool, **tolerance: float) -> None:
    weights, options = layer(kind, dtype)
    everybody = tokens(dtype)[: dist.get_world_size(group)]
    whole = joined(everybody)
    mine = whole if replicated else everybody[dist.get_rank(group)]
    if kind == "plain":
        whole["gate"] = mine["gate"] = None
    expected = run(torchops.routed_ffn, whole, weights, **options)
    shares = {name: blocks_of(weight, group) for name, weight in weights.items()}
    result = run(routed_ffn, mine, shares, **options, replicated=replicated, group=group)
    assert result["output"].dtype == dtype
    first = 0 if replicated else sum(TOKENS[: dist.get_rank(group)])
    for name, tensor in result.items():
        if name in ("output", "input", "gate"):
            of_one_process = expected[name][first : first + mine["input"].shape[0]]
        else:
            of_one_process = blocks_of(expected[name], group)
            # Of what all ranks share each has the gradient of its part.
            if is_shared(weights[name]) and not (replicated and name == "b2"):
                dist.all_reduce(tensor, group=group)
        torch.testing.assert_close(tensor, of_one_process, msg=functools.partial("{}: {}".format, name), **tolerance)


@in_four_processes
def equals_one_process(rank: int) -> None:
    for kind, group, replicated in itertools.product(KINDS, groups(), (False, True)):
        try:
            compare(kind, torch.float64, group, replicated, rtol=1e-11, atol=1e-12)
        except AssertionError as error:
            raise AssertionError(f"{kind}, {dist.get_world_size(group)} ranks, {replicated=}") from error


@in_four_processes
def sixteen_bits(rank: int) -> None:
    for dtype, group, replicated in itertools.product((torch.bfloat16, torch.float16), groups(), (False, True)):
        eps = torch.finfo(dtype).eps
        compare("biases of blocks", dtype, group, replicated, rtol=8 * eps, atol=16 * eps)


@in_four_processes
def same_bits(rank: int) -> None:
    weights, options = layer("low rank", torch.float32)
    shares = {name: blocks_of(weight, groups()[1]) for name, weight in weights.items()}
    for replicated in (False, True):
        rows = joined(tokens(torch.float32)) if replicated else tokens(torch.float32)[rank]
        first, second = (run(routed_ffn, rows, shares, **options, replicated=replicated) for _ in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


@in_four_processes
def more_dimensions(rank: int) -> None:
    """Of tokens; choices of 32 bits and gates of another dtype go along."""
    weights, options = layer("biases of blocks", torch.float32)
    shares = {name: blocks_of(weight, groups()[1]) for name, weight in weights.items()}
    input, index, gate = (
        torch.randn(2, 3, DIM),
        torch.randint(BLOCKS, (2, 3, SLOTS)).int(),
        torch.rand(2, 3, SLOTS).half(),
    )
    result = routed_ffn(input, index, gate, **shares, **options)
    torch.testing.assert_close(result, torchops.routed_ffn(input, index, gate, **weights, **options))


@in_four_processes
def under_autocast(rank: int) -> None:
    weights, options = layer("gated", torch.float32)
    shares = {name: blocks_of(weight, groups()[1]) for name, weight in weights.items()}
    for replicated in (False, True):
        rows = joined(tokens(torch.float32)) if replicated else tokens(torch.float32)[rank]
        arguments = rows["input"], rows["index"], rows["gate"]
        with torch.autocast("cpu", torch.bfloat16), SentBytes() as sent:
            result = routed_ffn(*arguments, **shares, **options, replicated=replicated)
            expected = torchops.routed_ffn(*arguments, **weights, **options)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result, expected, rtol=0.03, atol=0.1)
        rows_sent = 0 if replicated else of_all_ranks(rows_to_others(rows["index"], rank))
        assert of_all_ranks(sent.bytes) == rows_sent * (2 * DIM * 2 + SLOTS * (4 + 4))


@in_four_processes
def modules(rank: int) -> None:
    """Every rank has its tokens' rows of what one process computes, and its blocks' gradients."""
    for replicated in (False, True):
        torch.manual_seed(0)
        whole = torchops.nn.RoutedFFN(DIM, 8 * UNITS, num_blocks=BLOCKS, top_k=2, gated=True, lora_rank=2)
        for factor in (whole.lora_b1, whole.lora_b2):
            torch.nn.init.normal_(factor)
        mine = torchops.distributed.ExpertParallelFFN(copy.deepcopy(whole), replicated)
        input = torch.randn(4 * 5, DIM)
        expected = whole(input)
        expected.square().sum().backward()
        rows = slice(None) if replicated else slice(5 * rank, 5 * rank + 5)
        output = mine(input[rows])
        (output.square().sum() + torchops.nn.balance_loss(mine)).backward()
        torch.testing.assert_close(output, expected[rows])
        for name, parameter in mine.layer.named_parameters():
            of_one_process = whole.get_parameter(name)
            assert parameter.requires_grad == of_one_process.requires_grad
            if name in ("lora_b1", "lora_a2"):
                torch.testing.assert_close(
                    parameter.grad, blocks_of(of_one_process.grad, groups()[1]), rtol=1e-4, atol=1e-4
                )
    with pytest.raises(ValueError, match="expected layer to have a multiple of 4 blocks, got 6"):
        torchops.distributed.ExpertParallelFFN(torchops.nn.RoutedFFN(DIM, 12, num_blocks=6))


# ---- what is sent -----------------------------------------------------------------------------


class SentBytes(TorchDispatchMode):
    """Counts what all_to_all sends to other ranks, counts of rows aside, and what all_reduce adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.reduced: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            rows, _, sent, _ = args
            others = sum(sent) - sent[dist.get_rank()]
            self.bytes += others * rows[:1].numel() * rows.element_size()
        if "all_reduce" in function.name() or "allreduce" in function.name():
            self.reduced.append(args[0][0].nbytes)
        return function(*args, **(kwargs or {}))


def of_all_ranks(number: int) -> int:
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def rows_to_others(index: Tensor, rank: int) -> int:
    """Tokens for each other rank that has some of their blocks."""
    of_rank = BLOCKS // 4
    return sum(len({e // of_rank for e in entries if 0 <= e < BLOCKS} - {rank}) for entries in index.tolist())


@in_four_processes
def sends_a_token_once_to_a_rank(rank: int) -> None:
    weights, options = layer("biases of blocks", torch.float32)
    shares = {name: blocks_of(weight, groups()[1]) for name, weight in weights.items()}
    rows = tokens(torch.float32)[rank]
    count = of_all_ranks(rows_to_others(rows["index"], rank))
    assert count > 0
    with SentBytes() as sent:
        run(routed_ffn, rows, shares, **options)
    forward, backward = 2 * DIM * 4 + SLOTS * (4 + 4), 2 * DIM * 4 + SLOTS * 4
    assert of_all_ranks(sent.bytes) == count * (forward + backward)
    with SentBytes() as sent, torch.no_grad():
        routed_ffn(rows["input"], rows["index"], None, **shares, **options)
    assert of_all_ranks(sent.bytes) == count * (2 * DIM * 4 + SLOTS * 4)


@in_four_processes
def replicated_tokens_are_not_sent(rank: int) -> None:
    weights, options = layer("plain", torch.float32)
    shares = {name: blocks_of(weight, groups()[1]) for name, weight in weights.items()}
    rows = joined(tokens(torch.float32))
    with SentBytes() as sent:
        run(routed_ffn, rows, shares, **options, replicated=True)
    assert sent.bytes == 0
    assert sorted(sent.reduced) == sorted([rows["input"].nbytes] * 2 + [rows["gate"].nbytes])


# ---- bad input --------------------------------------------------------------------------------


@in_four_processes
def ranks_that_differ(rank: int) -> None:
    weights, _ = layer("plain", torch.float32)
    shares = {name: blocks_of(weight, groups()[1]) for name, weight in weights.items()}
    input, index, gate = torch.randn(4, DIM), torch.randint(BLOCKS, (4, SLOTS)), torch.rand(4, SLOTS)
    with pytest.raises(
        ValueError, match="expected activation to be the same on all ranks, got relu on rank 0 and gelu on rank 1"
    ):
        routed_ffn(input, index, gate, **shares, activation="gelu" if rank else "relu")
    with pytest.raises(
        ValueError, match=r"expected w1's shape to be the same on all ranks, got \[2, 5, 6\] on rank 0 and \[1, 5, 6\]"
    ):
        routed_ffn(input, index, gate, **{name: share[: 1 if rank == 3 else 2] for name, share in shares.items()})
    with pytest.raises(
        ValueError,
        match=r"expected index's shape to be the same on all ranks, got \['...', 3\] on rank 0 and \['...', 2\]",
    ):
        routed_ffn(input, index[:, : 2 if rank else 3], None, **shares)
    with pytest.raises(ValueError, match="expected input's shape to be the same on all ranks"):
        count = 4 - rank % 2
        routed_ffn(input[:count], index[:count], gate[:count], **shares, replicated=True)
    routed_ffn(input[: 4 - rank], index[: 4 - rank], gate[: 4 - rank], **shares)


@in_four_processes
def mistakes_of_one_rank_are_errors_on_all(rank: int) -> None:
    weights, _ = layer("plain", torch.float32)
    shares = {name: blocks_of(weight, groups()[1]) for name, weight in weights.items()}
    input, index = torch.randn(4, DIM), torch.randint(BLOCKS, (4, SLOTS))
    elsewhere = "" if rank == 2 else ", on rank 2"
    with pytest.raises(ValueError, match=rf"routed_ffn: expected index of shape \[4, 3\].*{elsewhere}$"):
        routed_ffn(input, index[:3] if rank == 2 else index, None, **shares)
    group = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(ValueError, match=f"expected group to have this process, got one without rank {rank}"):
            routed_ffn(input, index, None, **shares, group=group)


@in_four_processes
def a_group_of_one(rank: int) -> None:
    weights, options = layer("gated", torch.float32)
    rows = tokens(torch.float32)[0]
    expected = run(torchops.routed_ffn, rows, weights, **options)
    for replicated in (False, True):
        result = run(
            routed_ffn, rows, weights, **options, replicated=replicated, group=dist.new_subgroups(group_size=1)[0]
        )
        assert all(torch.equal(result[name], expected[name]) for name in expected)
