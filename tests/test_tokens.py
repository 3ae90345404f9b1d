"""What is special to the tokens family: copies, ties, sizes, gradients, and published figures."""

import math
from collections.abc import Callable

import pytest
import torch
from cases import ALL
from contract import FLOATS, assert_close, cotangents, gradients_of, random, require_grad, to_double
from torch import Tensor

import torchops
from torchops.nn import (
    TokenMerger,
    merge_schedule,
    mixture_of_depths_schedule,
)
from torchops.reference import tokens as reference

# ---- values -------------------------------------------------------------------------------------


def test_r_of_zero_is_the_identity() -> None:
    input = torch.randn(2, 9, 4)
    assign = torchops.bipartite_assignment(input, r=0)
    assert torch.equal(assign, torch.arange(9).expand(2, 9))
    assert torch.equal(torchops.merge_tokens(input, assign, 9)[0], input)


def test_tokens_equal_up_to_rounding_noise_tie(device: str) -> None:
    """On a flat background the same tokens merge whatever the noise, 50 times of 50."""
    token = torch.randn(64, device=device)
    flat = token.expand(1, 100, 64)
    expected = torchops.bipartite_assignment(flat, r=20)
    for _ in range(50):
        noisy = flat * (1 + 1e-7 * torch.randn(1, 100, 64, device=device))
        assert torch.equal(torchops.bipartite_assignment(noisy, r=20), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_group_of_one_is_a_copy_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    """(3 x) / 3 is not x for every seventh float."""
    input = torch.randn(1, 500, 7, device=device).to(dtype)
    weight = torch.full((1, 500), 3.0, device=device)
    merged, _ = torchops.merge_tokens(input, torch.arange(500, device=device)[None], 500, weight)
    assert torch.equal(merged, input)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "of_input, of_weight",
    [
        ([], [(0, math.inf), (1, -math.inf)]),
        ([], [(0, math.nan), (5, math.nan)]),
        ([(0, math.inf), (2, -math.inf), (5, math.nan)], []),
        ([(1, math.inf)], []),
        ([(3, math.inf), (6, math.nan)], [(4, math.inf), (5, math.inf)]),
    ],
    ids=["weights-inf", "weights-nan", "rows", "first-row", "both"],
)
def test_what_is_not_finite_matches_reference(
    dtype: torch.dtype, of_input: list[tuple[int, float]], of_weight: list[tuple[int, float]], device: str
) -> None:
    """Groups of one member and of several, and a dropped token. (opcheck and gradcheck take a NaN for a mistake.)"""
    assign = torch.tensor([[0, 1, 1, 2, 2, -1, 3]], device=device)
    input = random(1, 7, 6, dtype=dtype, device=device)
    weight = random(1, 7, dtype=dtype, device=device).abs() + 0.5
    for token, value in of_input:
        input[0, token, 1] = value
    for token, value in of_weight:
        weight[0, token] = value
    for normalize in (True, False):
        inputs = {"input": input, "assign": assign, "num_groups": 4, "weight": weight, "normalize": normalize}
        results = []
        for merge, of_dtype in ((torchops.merge_tokens, inputs), (reference.merge_tokens, to_double(inputs))):
            leaves = require_grad(of_dtype, ["input", "weight"])
            outputs = merge(**leaves)
            gradients = gradients_of(outputs, [leaves["input"], leaves["weight"]], cotangents(outputs))
            results.append([*(out.detach() for out in outputs), *gradients])
        for index, (one, other) in enumerate(zip(*results, strict=True)):
            assert_close(one, other, dtype, f"normalize={normalize}, result {index}")


def test_rows_are_added_in_ascending_order_and_rounding_follows(device: str) -> None:
    """In float32 1 vanishes in 2**24, and what is left of it depends on the order."""
    input = torch.tensor([1.0, 2.0**24, -(2.0**24)], device=device)
    for order, expected in [([0, 1, 2], 0.0), ([1, 2, 0], 1.0), ([2, 1, 0], 1.0)]:
        merged, _ = torchops.merge_tokens(
            input[order].reshape(1, 3, 1), torch.zeros(1, 3, dtype=torch.int64, device=device), 1, normalize=False
        )
        assert merged.item() == expected


def test_totals_are_counts_before_rounding(device: str) -> None:
    """A chain of float32 ones stands still at 2**24."""
    weight = torch.tensor([[2.0**24, 1, 1, 1, 1]], device=device)
    assign = torch.zeros(1, 5, dtype=torch.int64, device=device)
    assert torchops.merge_tokens(torch.ones(1, 5, 1, device=device), assign, 1, weight)[1].item() == 2**24 + 4


def test_zeros_keep_their_sign_in_copies_and_sums(device: str) -> None:
    zeros = torch.full((1, 3, 5), -0.0, device=device)
    assign = torch.tensor([[0, 1, 1]], device=device)
    for normalize in (True, False):
        assert torchops.merge_tokens(zeros, assign, 2, normalize=normalize)[0].signbit().all()
        weight = torch.full((1, 3), 2.0, device=device)
        assert torchops.merge_tokens(zeros, assign, 2, weight, normalize)[0].signbit().all()
    assert torchops.unmerge_tokens(zeros, assign).signbit().all()
    assert torchops.unmerge_tokens(zeros, assign, zeros).signbit().all()
    assert torchops.unmerge_tokens(zeros, torch.full_like(assign, -1), zeros).signbit().all()


def test_num_groups_refuses_what_the_operators_refuse() -> None:
    for numbers, message in [
        ((3, 2, 5), "num_groups: expected num_protected <= num_tokens = 3, got 5"),
        ((3, -1, 0), "num_groups: expected r >= 0, got -1"),
        ((3, 1, -1), "num_groups: expected num_protected >= 0, got -1"),
        ((-3, 1, 0), "num_groups: expected num_tokens >= 0, got -3"),
    ]:
        with pytest.raises(ValueError) as error:
            torchops.num_groups(*numbers)
        assert str(error.value) == message
        with pytest.raises(torch.jit.Error, match=message):
            torch.jit.script(torchops.num_groups)(*numbers)


def test_meta_tensors_of_two_dtypes_under_autocast() -> None:
    """They have no autocast key of their own, and take the wider dtype as others do."""
    assign = torch.zeros(1, 3, dtype=torch.int64)
    merged, residual = torch.ones(1, 2, 4, dtype=torch.bfloat16), torch.ones(1, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        real = torchops.unmerge_tokens(merged, assign, residual)
        meta = torchops.unmerge_tokens(merged.to("meta"), assign.to("meta"), residual.to("meta"))
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype) == (residual.shape, torch.float32)
    with pytest.raises(ValueError, match="expected residual of merged's dtype"):
        torchops.unmerge_tokens(merged.to("meta"), assign.to("meta"), residual.to("meta"))


# ---- matching -----------------------------------------------------------------------------------


def test_backgrounds_that_are_flat_but_for_noise_match_by_position() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        base = torch.randn(1, 1, 64)
        first, second = (
            torchops.bipartite_assignment(base * (1 + 1e-7 * torch.randn(2, 197, 64)), 16, 1) for _ in range(2)
        )
        assert torch.equal(first, second)


@pytest.mark.numeric
def test_matching_finds_the_most_similar_pairs() -> None:
    """Beside the definition by integers: no pair that is left out is more similar, by more than a step and a half."""
    for noise in (1.0, 0.03):
        torch.manual_seed(0)
        metric = torch.randn(1, 1, 64) + noise * torch.randn(8, 100, 64)
        unit = torch.nn.functional.normalize(metric.double(), dim=-1)
        similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        sources, destinations = torchops.bipartite_pairs(metric, 20)
        chosen = similarity.gather(1, (sources // 2).unsqueeze(-1).expand(-1, -1, 50))
        chosen = chosen.gather(2, (destinations // 2).unsqueeze(-1)).squeeze(-1)
        best = similarity.amax(-1).sort(descending=True).values[:, :20]
        tolerance = 1.5 / 2**16 + 1e-4 * noise
        torch.testing.assert_close(chosen, best, rtol=0, atol=tolerance)


# ---- gradients ----------------------------------------------------------------------------------


def test_a_loss_on_one_output_leaves_the_other_out() -> None:
    """An infinity in a row is not met by a gradient of zeros."""
    assign = torch.tensor([[0, 0, -1]])
    input = torch.randn(1, 3, 4)
    input[0, 0, 0] = math.inf
    input.requires_grad_()
    weight = torch.ones(1, 3, requires_grad=True)
    for normalize in (True, False):
        merged, total = torchops.merge_tokens(input, assign, 1, weight, normalize)
        gradients = torch.autograd.grad(total.sum(), [input, weight], allow_unused=True)
        assert gradients[0] is None and gradients[1].tolist() == [[1.0, 1.0, 0.0]]
    finite = torch.randn(1, 3, 4, requires_grad=True)
    merged, total = torchops.merge_tokens(finite, assign, 1, weight)
    of_merged = torch.autograd.grad(merged.sum(), [finite, weight], retain_graph=True)
    of_both = torch.autograd.grad(merged.sum() + 0 * total.sum(), [finite, weight])
    for one, other in zip(of_merged, of_both, strict=True):
        assert torch.equal(one, other)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_to_weights_of_tokens_that_are_alike(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assign = torch.randint(0, 8, (4, 32))
    for noise in (0.02, 0.005):
        input = (torch.randn(1, 1, 768) + noise * torch.randn(4, 32, 768)).to(dtype)
        grad = torch.randn(4, 8, 768).to(dtype)
        gradients = []
        for precision in (dtype, torch.float64):
            weight = torch.ones(4, 32, dtype=torch.float64, requires_grad=True)
            merged, _ = torchops.merge_tokens(input.to(precision), assign, 8, weight)
            gradients += torch.autograd.grad(merged, weight, grad.to(precision))
        assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_rows_of_more_than_2_to_the_31_elements(device: str) -> None:
    """Offsets beyond 32 bits: the last rows of an output of 2**31 + 2**16 numbers, and back."""
    tokens, channels = 2**15 + 1, 2**16
    merged = torch.arange(4 * channels, dtype=torch.float32).remainder(251).bfloat16().reshape(1, 4, channels)
    merged = merged.to(device)
    assign = torch.arange(tokens, device=device).remainder(4)[None]
    try:
        output = torchops.unmerge_tokens(merged, assign)
    except torch.cuda.OutOfMemoryError:
        pytest.skip("needs 4.3 GB of the GPU's memory")
    assert output.numel() > 2**31
    for token in (0, 1, tokens - 2, tokens - 1):
        assert torch.equal(output[0, token], merged[0, token % 4])
    # From the far end of the input: the last token alone in its group.
    last = torch.full((1, tokens), -1, device=device)
    last[0, -1] = 0
    assert torch.equal(torchops.merge_tokens(output, last, 1)[0], output[:, -1:])


def test_matching_and_merging_launch_at_most_four_kernels() -> None:
    """Where eager ToMe has 22 and more. test_launches.py counts what the table says."""
    launches = {case.name: case.launches for case in ALL}
    assert launches["bipartite_assignment"] + launches["merge_tokens"] <= 4


# ---- what is kept for the backward --------------------------------------------------------------


def saved_shapes(op: Callable, **inputs: object) -> list[tuple[int, ...]]:
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op(**inputs)
    return shapes


def test_only_what_the_gradients_need_is_kept() -> None:
    rows, per_token, per_group = (2, 9, 4), (2, 9), (2, 1)
    for of_input, of_weight, normalize, expected in [
        (True, False, True, [per_token, per_token, per_group]),
        (True, False, False, [per_token, per_token]),
        (False, True, True, [rows, per_token, per_token, per_group]),
        (False, True, False, [rows, per_token]),
        (True, True, True, [rows, per_token, per_token, per_group]),
    ]:
        input = torch.randn(rows, requires_grad=of_input)
        weight = torch.ones(per_token, requires_grad=of_weight)
        assign = torch.zeros(per_token, dtype=torch.int64)
        merge = {"input": input, "assign": assign, "num_groups": 1, "weight": weight, "normalize": normalize}
        assert saved_shapes(torchops.merge_tokens, **merge) == expected
    for of_merged, expected in [(True, [per_token]), (False, [])]:
        merged = torch.randn(2, 1, 4, requires_grad=of_merged)
        residual = torch.randn(rows, requires_grad=True)
        assert saved_shapes(torchops.unmerge_tokens, merged=merged, assign=assign, residual=residual) == expected


def test_total_has_a_gradient_only_through_the_weights() -> None:
    input = torch.randn(2, 9, 4, requires_grad=True)
    assign = torch.zeros(2, 9, dtype=torch.int64)
    merged, total = torchops.merge_tokens(input, assign, 1)
    assert merged.requires_grad and not total.requires_grad
    _, total = torchops.merge_tokens(input, assign, 1, torch.ones(2, 9, requires_grad=True))
    assert total.requires_grad


# ---- published figures --------------------------------------------------------------------------


def token_counts(schedule: list[int], tokens: int = 197) -> list[int]:
    """Through real mergers, with their sizes."""
    input, size, counts = torch.randn(1, tokens, 8), None, []
    for r in schedule:
        input, size, assign = TokenMerger(r, num_protected=1)(input, size=size)
        assert size.sum().item() == tokens and assign.max().item() == input.shape[1] - 1
        counts.append(input.shape[1])
    return counts


def test_token_counts_of_tome() -> None:
    assert token_counts(merge_schedule(16, 12)) == [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]
    assert token_counts(merge_schedule(13, 12))[-1] == 41
    falling = merge_schedule(16, 12, inflection=-1.0)
    assert falling == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert token_counts(falling)[-1] == 10
    assert merge_schedule(16, 12, inflection=1.0) == falling[::-1]
    assert token_counts(merge_schedule(8, 24))[-1] == 7


def test_token_counts_of_p_mod() -> None:
    schedule = mixture_of_depths_schedule(32)
    assert [int(schedule[layer] * 576) for layer in (8, 16, 23)] == [486, 273, 89]
    assert {int(share * 576) for share in schedule[24:]} == {86}
    assert schedule[:8] == [1.0] * 8
    assert sum(schedule) / 32 == pytest.approx(0.5375, abs=5e-5)
