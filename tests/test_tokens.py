"""What is special to the tokens family: copies, ties, sizes, and published figures."""

import pytest
import torch
from cases.tokens import CASES
from torch import Tensor

import torchops
from torchops.nn import TokenMerger, merge_schedule, mixture_of_depths_schedule

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
    launches = {case.name: case.launches for case in CASES}
    assert launches["bipartite_assignment"] + launches["merge_tokens"] <= 4


# ---- what is kept for the backward --------------------------------------------------------------


def saved_shapes(**inputs: Tensor) -> list[tuple[int, ...]]:
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torchops.merge_tokens(**inputs)
    return shapes


def test_rows_are_kept_only_for_the_gradient_to_weights() -> None:
    input = torch.randn(2, 9, 4, requires_grad=True)
    assign = torch.zeros(2, 9, dtype=torch.int64)
    weight = torch.ones(2, 9)
    assert (2, 9, 4) not in saved_shapes(input=input, assign=assign, num_groups=1, weight=weight)
    assert (2, 9, 4) in saved_shapes(input=input, assign=assign, num_groups=1, weight=weight.requires_grad_())


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
