"""What is special to the tokens family: copies, ties, sizes, published figures, and the modules."""

import io
import math

import pytest
import torch
from cases.tokens import CASES
from torch import Tensor, nn

import torchops
from torchops.nn import (
    MixtureOfDepths,
    PyraModulation,
    TokenMerger,
    TokenPruner,
    merge_schedule,
    mixture_of_depths_schedule,
)

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


# ---- modules ------------------------------------------------------------------------------------


def scripted_copy(module: nn.Module) -> torch.jit.ScriptModule:
    """Scripted, saved and loaded."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


MODULES = {
    "merger": (TokenMerger(3, 1), (torch.randn(2, 12, 8),)),
    "merger-metric-size-padding": (
        TokenMerger(3, 1),
        (torch.randn(2, 12, 8), torch.randn(2, 12, 5), torch.rand(2, 12) + 1, torch.arange(12).expand(2, 12) > 9),
    ),
    "merger-pyra": (TokenMerger(3, 1, PyraModulation(8, 3)), (torch.randn(2, 12, 8),)),
    "pruner": (TokenPruner(5, num_protected=1), (torch.randn(2, 12, 8), torch.rand(2, 12))),
    "pruner-share-fuse": (TokenPruner(0.5, fuse=True), (torch.randn(2, 12, 8), torch.rand(2, 12))),
    "depths": (MixtureOfDepths(nn.Linear(8, 8), dim=8, ratio=0.5), (torch.randn(2, 12, 8),)),
    "depths-dense": (MixtureOfDepths(nn.Linear(8, 8), dim=8, ratio=1.0), (torch.randn(2, 12, 8),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_script_save_load_and_compile(name: str) -> None:
    module, inputs = MODULES[name]
    expected = module(*inputs)
    expected = (expected,) if isinstance(expected, Tensor) else expected
    for copy in (scripted_copy(module), torch.compile(module, backend="aot_eager", fullgraph=True)):
        actual = copy(*inputs)
        for one, other in zip((actual,) if isinstance(actual, Tensor) else actual, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in MODULES if name != "merger-metric-size-padding"])
def test_modules_in_low_precision(name: str, dtype: torch.dtype) -> None:
    """module.to(dtype) must not break a model."""
    module, inputs = MODULES[name]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    module = torch.load(buffer, weights_only=False).to(dtype)
    output = module(*[value.to(dtype) for value in inputs])
    assert (output if isinstance(output, Tensor) else output[0]).dtype == dtype


def test_merger_hides_padding_by_size() -> None:
    padding = torch.tensor([[False, False, False, False, True, True]])
    merged, size, _ = TokenMerger(1)(torch.randn(1, 6, 4), padding_mask=padding)
    assert merged.shape == (1, 5, 4)
    assert sorted(size[0].tolist()) == [0, 0, 1, 1, 2]
    bias = torchops.nn.proportional_attention_bias(size)
    assert torch.equal(bias == -math.inf, size == 0)
    assert bias[size == 2].item() == pytest.approx(math.log(2))


def test_merger_averages_by_size() -> None:
    input = torch.tensor([[[2.0], [4.0], [-2.0], [5.0]]])
    merged, size, assign = TokenMerger(1)(input, size=torch.tensor([[3.0, 1.0, 1.0, 1.0]]))
    assert assign.tolist() == [[0, 0, 1, 2]]
    assert size.tolist() == [[4.0, 1.0, 1.0]]
    assert merged.flatten().tolist() == [(3 * 2.0 + 4.0) / 4, -2.0, 5.0]


def test_pruner_fuses_as_evit() -> None:
    input, scores = torch.randn(1, 6, 4), torch.tensor([[0.0, 0.4, 0.1, 0.3, 0.2, 0.0]])
    kept, assign = TokenPruner(2, fuse=True, num_protected=1)(input, scores)
    assert torch.equal(kept[:, :3], input[:, [0, 1, 3]])
    fused = (0.1 * input[:, 2] + 0.2 * input[:, 4]) / 0.3
    torch.testing.assert_close(kept[:, 3], fused)
    assert assign.tolist() == [[0, 1, 3, 2, 3, 3]]
    unnormalised, _ = TokenPruner(2, fuse=True, num_protected=1, normalize=False)(input, scores)
    torch.testing.assert_close(unnormalised[:, 3], fused * 0.3)


def test_pruner_share_is_rounded_up_and_checked() -> None:
    assert TokenPruner(0.5)(torch.randn(1, 7, 4), torch.rand(1, 7))[0].shape == (1, 4, 4)
    assert TokenPruner(100)(torch.randn(1, 7, 4), torch.rand(1, 7))[0].shape == (1, 7, 4)
    with pytest.raises(ValueError, match="expected keep to be a number of tokens or a share in 0..1, got 1.5"):
        TokenPruner(1.5)


def test_mixture_of_depths_by_hand() -> None:
    layer = MixtureOfDepths(nn.Linear(6, 6), dim=6, ratio=0.4).double()
    input = torch.randn(2, 10, 6, dtype=torch.float64)
    output = layer(input)
    scores = layer.router(input).squeeze(-1)
    for row in range(2):
        selected = scores[row].topk(4).indices
        expected = input[row].clone()
        weight = 0.2 * torch.tanh(scores[row, selected]) + 1
        expected[selected] += weight[:, None] * layer.block(input[row, selected])
        torch.testing.assert_close(output[row], expected)
    output.square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0, "the router learns through the weights"


def test_mixture_of_depths_always_runs_protected_tokens() -> None:
    layer = MixtureOfDepths(nn.Linear(6, 6), dim=6, ratio=0.5, num_protected=2)
    nn.init.zeros_(layer.router.weight)
    nn.init.zeros_(layer.router.bias)
    input = torch.randn(1, 8, 6)
    padding = torch.tensor([[False, False, True, True, False, False, False, False]])
    changed = (layer(input, padding) != input).any(-1)
    assert changed.tolist() == [[True, True, False, False, True, True, True, False]]


def test_pyra_starts_as_the_identity_and_follows_its_formula() -> None:
    modulation = PyraModulation(6, 3).double()
    input = torch.randn(2, 10, 6, dtype=torch.float64)
    sources, destinations = torchops.bipartite_pairs(input, 3)
    assert torch.equal(modulation(input, sources, destinations), input)
    nn.init.normal_(modulation.b)
    output = modulation(input, sources, destinations)
    for row in range(2):
        source, destination = input[row, sources[row]], input[row, destinations[row]]
        pairs = modulation.norm(source + destination)
        w1 = 2 * torch.sigmoid(modulation.a @ pairs)
        w2 = 2 * torch.sigmoid(pairs @ modulation.b) - 1
        expected = input[row].clone()
        expected[sources[row]] = source + source * w1 * w2[:, None]
        torch.testing.assert_close(output[row], expected)


def test_pyra_leaves_dropped_padding_alone() -> None:
    padding = torch.arange(10)[None] > 2
    input = torch.randn(1, 10, 6)
    sources, destinations = torchops.bipartite_pairs(input, 4, padding_mask=padding)
    modulation = PyraModulation(6, 4)
    nn.init.normal_(modulation.b)
    output = modulation(input, sources, destinations)
    dropped = sources[destinations < 0]
    assert len(dropped) == 2 and torch.equal(output[0, dropped], input[0, dropped])


def test_a_model_with_merging_learns() -> None:
    torch.manual_seed(0)
    merger, head = TokenMerger(4, modulation=PyraModulation(8, 4)), nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*merger.parameters(), *head.parameters()], lr=0.02)
    input = torch.randn(64, 12, 8)
    target = (input.mean(dim=(1, 2)) > 0).long()
    losses = []
    for _ in range(60):
        merged, size, _ = merger(input)
        logits = head((merged * size.unsqueeze(-1)).sum(1) / size.sum(1, keepdim=True))
        losses.append(nn.functional.cross_entropy(logits, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
