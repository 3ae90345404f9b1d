"""Attention over a sequence that several processes share: four on the CPU, with gloo, and two pairs of them."""

import itertools
import os
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import ProcessTest, collected_in, groups, needs_gloo, run_in_processes
from shared_sequences import CAUSAL, FULL, LENGTH, SPANS, compare, events, inputs, run, sent_bytes, sequence_dim, shard
from torch import Tensor

import torchops
from torchops.distributed import gather_sequence, sent_keys, shard_sequence, span_attention

pytestmark = needs_gloo
TESTS: list[ProcessTest] = []
in_four_processes = collected_in(TESTS)


def test_in_four_processes(tmp_path: Path) -> None:
    run_in_processes(4, TESTS, tmp_path)


@in_four_processes
def equals_one_process(rank: int) -> None:
    for span, group, zigzag in itertools.product(SPANS, groups(), (False, True)):
        try:
            compare(inputs(torch.float64), group, zigzag, SPANS[span], rtol=1e-11, atol=1e-12)
        except AssertionError as error:
            raise AssertionError(f"{span}, {dist.get_world_size(group)} ranks, zigzag={zigzag}") from error


@in_four_processes
def sixteen_bits(rank: int) -> None:
    """As far from float64 as one process is, give or take the rounding of partial results."""
    for dtype, group, zigzag in itertools.product((torch.bfloat16, torch.float16), groups(), (False, True)):
        for span in ("causal", "a window over several slices"):
            eps = torch.finfo(dtype).eps
            compare(inputs(dtype), group, zigzag, SPANS[span], rtol=4 * eps, atol=4 * eps)


@in_four_processes
def other_numbers_of_keys(rank: int) -> None:
    """The last query lies where the last key does."""
    for num_keys, options in itertools.product((16, 80), (FULL, CAUSAL, SPANS["a window within a slice"])):
        compare(inputs(torch.float64, num_keys=num_keys), groups()[1], False, options, rtol=1e-11, atol=1e-12)


@in_four_processes
def only_what_is_given(rank: int) -> None:
    """Without sides, with a factor, and with a batch of none."""
    whole = inputs(torch.float64)
    whole = {name: whole[name] for name in ("query", "key", "value", "grad_output")}
    compare(whole, groups()[1], True, {**CAUSAL, "scale": 0.3}, rtol=1e-11, atol=1e-12)
    compare({name: tensor[:0] for name, tensor in whole.items()}, groups()[1], False, CAUSAL)
    compare({name: tensor[:, :, :0] for name, tensor in whole.items()}, groups()[1], False, CAUSAL)


@in_four_processes
def scores_of_any_size(rank: int) -> None:
    """Far below zero in one row, and in the other one all keys are hidden."""
    whole = inputs(torch.float64)
    whole["key_bias"] = torch.stack([whole["key_bias"][1] - 1e5, torch.full((LENGTH,), -torch.inf).double()])
    del whole["sink"]
    for zigzag in (False, True):
        compare(whole, groups()[1], zigzag, CAUSAL, rtol=1e-8, atol=1e-8)


@in_four_processes
def only_gradients_that_are_asked_for(rank: int) -> None:
    slices = {name: shard(name, tensor, False, groups()[1]) for name, tensor in inputs(torch.float64).items()}
    grad_output = slices.pop("grad_output")
    expected = run(span_attention, {**slices, "grad_output": grad_output}, **CAUSAL)
    for names in (["query"], ["key"], ["value"], ["key_bias"], ["sink"], ["query", "value"]):
        leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in slices.items()}
        with sent_bytes() as sent:
            span_attention(**leaves, **CAUSAL).backward(grad_output)
        assert all((leaf.grad is not None) == (name in names) for name, leaf in leaves.items())
        for name in names:
            torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)
        if names == ["sink"]:  # made of the output: no key travels again
            assert sent == keys_sent(sent_keys(LENGTH, 4, **CAUSAL), rank, number_of_bytes(slices))


@in_four_processes
def same_bits(rank: int) -> None:
    for dtype, zigzag in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        slices = {name: shard(name, tensor, zigzag, groups()[1]) for name, tensor in inputs(dtype).items()}
        first, second = (run(span_attention, slices, **CAUSAL, zigzag=zigzag) for _ in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


@in_four_processes
def under_autocast(rank: int) -> None:
    slices = {name: shard(name, tensor, False, groups()[1]) for name, tensor in inputs(torch.float32).items()}
    lowered = {name: tensor.bfloat16() if tensor.dim() == 4 else tensor for name, tensor in slices.items()}
    expected = run(span_attention, lowered, **CAUSAL)
    with torch.autocast("cpu", torch.bfloat16):
        result = run(span_attention, {**slices, "grad_output": lowered["grad_output"]}, **CAUSAL)
    assert result["output"].dtype == torch.bfloat16
    assert torch.equal(result["output"], expected["output"])
    for name in ("query", "key", "value"):
        assert torch.equal(result[name], expected[name].float())


# ---- what is sent -----------------------------------------------------------------------------


def number_of_bytes(slices: dict[str, Tensor]) -> int:
    """Of a key, with its value and bias, in all rows of the batch."""
    return sum(slices[name].nbytes // slices[name].shape[sequence_dim(name)] for name in ("key", "value", "key_bias"))


def keys_sent(keys: Tensor, rank: int, size: int) -> Counter:
    return Counter({peer: count * size for peer, count in enumerate(keys[rank].tolist()) if count})


@in_four_processes
def sends_what_is_visible(rank: int) -> None:
    for (span, options), group, zigzag in itertools.product(SPANS.items(), groups(), (False, True)):
        whole = inputs(torch.bfloat16)
        slices = {name: shard(name, tensor, zigzag, group) for name, tensor in whole.items()}
        keys, me = sent_keys(LENGTH, dist.get_world_size(group), **options, zigzag=zigzag), dist.get_rank(group)
        forward, gradients = (keys_sent(k, me, number_of_bytes(slices)) for k in (keys, keys.T))
        with sent_bytes() as sent:
            span_attention(
                **{n: t for n, t in slices.items() if n != "grad_output"}, **options, zigzag=zigzag, group=group
            )
        assert sent == forward, f"{span}, {zigzag=}, forward"
        with sent_bytes() as sent:
            run(span_attention, slices, **options, zigzag=zigzag, group=group)
        assert sent == forward + forward + gradients, f"{span}, {zigzag=}, forward and backward"


def count_visible(length: int, ranks: int, zigzag: bool, **options: Any) -> Tensor:
    """Which keys of each rank some query of another one sees, pair by pair."""
    sees = torchops.reference.span_attention.visible(*torch.empty(2, 1, 1, length, 1), **options)[0]
    pieces = torch.arange(length).chunk(2 * ranks if zigzag else ranks)
    held = [torch.cat([pieces[r], pieces[-1 - r]]) if zigzag else pieces[r] for r in range(ranks)]
    keys = torch.tensor(
        [[sees[held[reader]][:, held[owner]].any(0).sum() for reader in range(ranks)] for owner in range(ranks)]
    )
    return keys.fill_diagonal_(0)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("span", SPANS)
def test_sent_keys(span: str, zigzag: bool) -> None:
    """Those that somebody sees, and no others, counted from the mask."""
    for ranks in (1, 2, 3, 4, 6):
        expected = count_visible(LENGTH, ranks, zigzag, **SPANS[span])
        assert sent_keys(LENGTH, ranks, **SPANS[span], zigzag=zigzag).tolist() == expected.tolist(), ranks


@in_four_processes
def messages_are_under_way_while_others_are_used(rank: int) -> None:
    slices = {name: shard(name, tensor, False, groups()[1]) for name, tensor in inputs(torch.float32).items()}
    grad_output = slices.pop("grad_output")
    leaves = {name: tensor.requires_grad_() for name, tensor in slices.items()}
    happened: list[str] = []
    with events(happened, Counter()):
        output = span_attention(**leaves)
        assert " ".join(happened) == "post compute wait post compute wait post compute wait compute"
        happened.clear()
        output.backward(grad_output)
    first = "post compute wait"  # own keys, while those of the next round come
    second = "post compute post wait"  # that round's gradients go
    third = "post compute wait post wait"  # gradients from the round before have come
    last = "compute wait post wait"
    assert " ".join(happened) == f"{first} {second} {third} {last} compute"  # at last the sink's


@in_four_processes
def blocks_of_a_slice_send_nothing(rank: int) -> None:
    slices = {name: shard(name, tensor, False, groups()[1]) for name, tensor in inputs(torch.float32).items()}
    happened: list[str] = []
    with events(happened, Counter()):
        run(span_attention, slices, **SPANS["blocks as slices"])
    assert happened == ["compute"] * 3


# ---- bad input --------------------------------------------------------------------------------


@in_four_processes
def ranks_that_differ(rank: int) -> None:
    query, key, value = torch.randn(3, 1, 2, 8, 4)
    with pytest.raises(
        ValueError, match="expected is_causal to be the same on all ranks, got False on rank 0 and True on"
    ):
        span_attention(query, key, value, is_causal=rank == 2)
    with pytest.raises(
        ValueError, match=r"expected query's shape to be the same .* \[1, 2, 8, 4\] on rank 0 and \[1, 2, 6, 4\]"
    ):
        span_attention(query[:, :, : 6 if rank == 1 else 8], key, value)
    with pytest.raises(
        ValueError, match="expected query's dtype to be the same .*float32 on rank 0 and .*float64 on rank 3"
    ):
        dtype = torch.float64 if rank == 3 else torch.float32
        span_attention(query.to(dtype), key.to(dtype), value.to(dtype))
    with pytest.raises(
        ValueError, match="expected key's requires_grad to be the same on all ranks, got True on rank 0 and False"
    ):
        span_attention(query, key.requires_grad_(rank == 0), value)
    with pytest.raises(ValueError, match="expected sink's shape to be the same on all ranks, got None on rank 0"):
        span_attention(query, key.detach(), value, sink=torch.zeros(2) if rank else None)


@in_four_processes
def mistakes_of_one_rank_are_errors_on_all(rank: int) -> None:
    query, key, value = torch.randn(3, 1, 2, 7, 4)
    elsewhere = "" if rank == 1 else ", on rank 1"
    with pytest.raises(ValueError, match=f"^span_attention: expected block_size >= 1, got 0{elsewhere}$"):
        span_attention(query, key, value, block_size=0 if rank == 1 else 1)
    with pytest.raises(ValueError, match="expected query's length to be even, got 7$"):
        span_attention(query, key, value, zigzag=True)
    with pytest.raises(ValueError, match="expected value on the device of query, cpu, got meta"):
        span_attention(query, key, value.to("meta"))
    with pytest.raises(ValueError, match="expected input's length in dimension 2 to be a multiple of 4, got 7"):
        shard_sequence(query, 2)
    with pytest.raises(ValueError, match="expected input's length in dimension 2 to be a multiple of 8, got 12"):
        shard_sequence(torch.empty(1, 1, 12), 2, zigzag=True)
    with pytest.raises(ValueError, match="expected input's length in dimension 2 to be even, got 7"):
        gather_sequence(query, 2, zigzag=True)


@in_four_processes
def outside_of_the_group(rank: int) -> None:
    group = dist.new_group([0, 2])
    query, key, value = torch.randn(3, 1, 2, 8, 4)
    if rank in (0, 2):
        span_attention(query, key, value, group=group)
    else:
        with pytest.raises(ValueError, match=f"expected group to have this process, got one without rank {rank}"):
            span_attention(query, key, value, group=group)


@in_four_processes
def a_group_of_one(rank: int) -> None:
    alone = dist.new_subgroups(group_size=1)[0]
    whole = inputs(torch.float32)
    expected, result = run(torchops.span_attention, whole, **CAUSAL), run(span_attention, whole, **CAUSAL, group=alone)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    for zigzag in (False, True):
        assert torch.equal(shard_sequence(whole["query"], 2, zigzag, alone), whole["query"])
        assert torch.equal(gather_sequence(whole["query"], 2, zigzag, alone), whole["query"])


@in_four_processes
def sequences_come_back(rank: int) -> None:
    whole = torch.arange(3 * 24 * 2).view(3, 24, 2)
    for group, zigzag in itertools.product(groups(), (False, True)):
        part = shard_sequence(whole, 1, zigzag, group)
        assert torch.equal(gather_sequence(part, 1, zigzag, group), whole)
    assert shard_sequence(torch.arange(16), 0, zigzag=True).tolist() == [
        2 * rank,
        2 * rank + 1,
        14 - 2 * rank,
        15 - 2 * rank,
    ]
    numbers = torch.ones(8, requires_grad=True)
    shard_sequence(numbers, 0).sum().backward()
    assert numbers.grad.tolist() == [float(number // 2 == rank) for number in range(8)]


@in_four_processes
def a_rank_that_does_not_call(rank: int) -> None:
    """The group's timeout ends the wait, for its keys in one pair, and for its configuration in the other."""
    query, key, value = torch.randn(3, 1, 2, 8, 4)
    pair = dist.new_subgroups(group_size=2, timeout=timedelta(seconds=3))[0]
    if rank < 2:
        span_attention(query, key, value, group=pair)
    if rank % 2:
        with pytest.raises(RuntimeError, match="[Tt]imed out"):
            span_attention(query, key, value, group=pair)
    dist.barrier()


def compiled(rank: int) -> None:
    """The function ends a graph, and another one begins behind it."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return span_attention(2 * query, key, value, is_causal=True) + 1

    slices = [tensor.requires_grad_() for tensor in torch.randn(3, 1, 2, 8, 4)]
    expected, result = attend(*slices), torch.compile(attend, backend="aot_eager")(*slices)
    assert torch.equal(result, expected)
    gradients = (torch.autograd.grad(output.square().sum(), slices) for output in (expected, result))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def dies(rank: int) -> None:
    query, key, value = torch.randn(3, 1, 2, 8, 4)
    span_attention(query, key, value)
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match="Connection closed by peer|Connection reset"):
        span_attention(query, key, value)
    os._exit(0)


def test_in_two_processes(tmp_path: Path) -> None:
    run_in_processes(2, [compiled, dies], tmp_path)
