"""The modules that merge, prune and route tokens."""

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchops
from torchops.nn import MixtureOfDepths, PyraModulation, TokenMerger, TokenPruner, group_padding_mask

# ---- as programs ------------------------------------------------------------------------------


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
    "pruner-all-fuse": (TokenPruner(20, fuse=True), (torch.randn(2, 12, 8), torch.rand(2, 12))),
    "depths": (MixtureOfDepths(nn.Linear(8, 8), dim=8, ratio=0.5), (torch.randn(2, 12, 8),)),
    "depths-dense": (MixtureOfDepths(nn.Linear(8, 8), dim=8, ratio=1.0), (torch.randn(2, 12, 8),)),
}


def outputs(module: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    output = module(*inputs)
    return (output,) if isinstance(output, Tensor) else output


def compiled_forms(module: nn.Module) -> Iterator[Callable[..., Any]]:
    yield scripted_copy(module)
    yield torch.compile(module, backend="aot_eager", fullgraph=True)
    # Of optional tensors the trace knows nothing, so that one graph is right with and without them.
    traced = torch.fx.symbolic_trace(module)
    yield traced
    yield scripted_copy(traced)


@pytest.mark.parametrize("name", MODULES)
def test_modules_script_compile_and_trace(name: str) -> None:
    module, inputs = MODULES[name]
    expected = outputs(module, inputs)
    for form in compiled_forms(module):
        for one, other in zip(outputs(form, inputs), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODULES)
def test_modules_export_with_any_number_of_tokens(name: str) -> None:
    module, inputs = MODULES[name]
    tokens = tuple({1: torch.export.Dim.DYNAMIC} for _ in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=tokens).module()
    for length in (5, 12, 31):
        other = [torch.cat([input] * 3, 1)[:, :length].contiguous() for input in inputs]
        for one, expected in zip(outputs(program, other), outputs(module, other), strict=True):
            assert torch.equal(one, expected)


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


# ---- TokenMerger and PyraModulation ----------------------------------------------------------------


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


# ---- TokenPruner ----------------------------------------------------------------------------------


def test_pruner_fuses_as_evit() -> None:
    input, scores = torch.randn(1, 6, 4), torch.tensor([[0.0, 0.4, 0.1, 0.3, 0.2, 0.0]])
    kept, assign = TokenPruner(2, fuse=True, num_protected=1)(input, scores)
    assert torch.equal(kept[:, :3], input[:, [0, 1, 3]])
    fused = (0.1 * input[:, 2] + 0.2 * input[:, 4]) / 0.3
    torch.testing.assert_close(kept[:, 3], fused)
    assert assign.tolist() == [[0, 1, 3, 2, 3, 3]]
    unnormalised, _ = TokenPruner(2, fuse=True, num_protected=1, normalize=False)(input, scores)
    torch.testing.assert_close(unnormalised[:, 3], fused * 0.3)


@pytest.mark.parametrize(
    ("keep", "tokens", "kept"),
    [
        (0.5, 7, 4),
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.07, 101, 8),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.0, 7, 0),
        (1.0, 7, 7),
        (0.5, 0, 0),
        (100, 7, 7),
        (0, 7, 0),
    ],
)
def test_how_many_a_pruner_keeps(keep: float, tokens: int, kept: int) -> None:
    input, scores = torch.randn(1, tokens + 1, 4), torch.rand(1, tokens + 1)
    assert TokenPruner(keep, num_protected=1)(input, scores)[0].shape == (1, 1 + kept, 4)
    fused = 1 if kept < tokens else 0
    output, assign = TokenPruner(keep, num_protected=1, fuse=True)(input, scores)
    assert output.shape == (1, 1 + kept + fused, 4)
    assert assign.max() == kept + fused


def test_tokens_behind_a_pruner_that_are_padding() -> None:
    """Kept padding, and the fused token of a row that has nothing to fuse."""
    padding = torch.tensor([[False, False, False, False], [False, False, True, True]])
    kept, assign = TokenPruner(3, fuse=True)(torch.randn(2, 4, 8), torch.rand(2, 4), padding)
    mask = group_padding_mask(assign, kept.shape[1], padding)
    assert mask.tolist() == [[False] * 4, [False, False, True, True]]
    assert kept[1, 3].tolist() == [0.0] * 8


# ---- MixtureOfDepths ----------------------------------------------------------------------------


def test_mixture_of_depths_rounds_down_but_not_noise() -> None:
    """0.29 * 100 is 28.999999999999996."""
    for ratio, selected in ((0.29, 29), (0.295, 29), (0.0, 0)):
        layer = MixtureOfDepths(nn.Linear(4, 4), dim=4, ratio=ratio)
        input = torch.randn(1, 100, 4)
        assert (layer(input) != input).any(-1).sum() == selected


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
    for parameter in (modulation.b, modulation.norm.bias):
        nn.init.normal_(parameter)
    output = modulation(input, sources, destinations)
    dropped = sources[destinations < 0]
    assert len(dropped) == 2 and torch.equal(output[0, dropped], input[0, dropped])
    # Nor are they pairs that the others' modulation counts.
    torch.testing.assert_close(modulation(input, sources[:, :2], destinations[:, :2]), output)


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_pyra_keeps_padding_to_itself(junk: float) -> None:
    """Forward, and in the gradients of tokens and parameters."""
    padding = torch.arange(10)[None].expand(2, -1) > torch.tensor([[2], [8]])
    clean = torch.randn(2, 10, 6).masked_fill(padding.unsqueeze(-1), 0)
    merger = TokenMerger(4, modulation=PyraModulation(6, 4))
    nn.init.normal_(merger.modulation.b)

    def run(input: Tensor) -> list[Tensor]:
        input.requires_grad_()
        merged, size, _ = merger(input, padding_mask=padding)
        real = merged[size > 0]
        gradients = torch.autograd.grad(real.square().sum(), [input, *merger.parameters()])
        return [real, gradients[0][~padding], *gradients[1:]]

    expected = run(clean.clone())
    for given, other in zip(run(clean.masked_fill(padding.unsqueeze(-1), junk)), expected, strict=True):
        assert torch.equal(given, other)


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


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenMerger(-1), "TokenMerger: expected r >= 0, got -1"),
        (lambda: TokenMerger(1, -1), "TokenMerger: expected num_protected >= 0, got -1"),
        (lambda: PyraModulation(8, -1), "PyraModulation: expected r >= 0, got -1"),
        (lambda: TokenPruner(1.5), "TokenPruner: expected keep to be a number of tokens or a share in 0..1, got 1.5"),
        (lambda: TokenPruner(-3), "TokenPruner: expected keep to be a number of tokens or a share in 0..1, got -3"),
        (lambda: TokenPruner(math.nan), "TokenPruner: expected keep to be .* got nan"),
        (lambda: TokenPruner(3, num_protected=-1), "TokenPruner: expected num_protected >= 0, got -1"),
        (
            lambda: MixtureOfDepths(nn.Identity(), 8, -0.5),
            "MixtureOfDepths: expected ratio to be a share of 0 or more, got -0.5",
        ),
        (lambda: MixtureOfDepths(nn.Identity(), 8, math.nan), "MixtureOfDepths: expected ratio .* got nan"),
        (lambda: MixtureOfDepths(nn.Identity(), 8, 0.5, -1), "MixtureOfDepths: expected num_protected >= 0, got -1"),
    ],
)
def test_construction_refuses(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "module",
    [
        TokenMerger(2, num_protected=9),
        TokenPruner(3, num_protected=9),
        TokenPruner(0.5, num_protected=9, fuse=True),
        MixtureOfDepths(nn.Identity(), 8, 0.5, num_protected=9),
    ],
)
def test_more_protected_tokens_than_there_are(module: nn.Module) -> None:
    inputs = torch.randn(1, 7, 8), torch.rand(1, 7)
    with pytest.raises(ValueError, match="_assignment: expected num_protected <= N = 7, got 9"):
        module(*(inputs if isinstance(module, TokenPruner) else inputs[:1]))


def test_more_pairs_than_pyra_was_made_for() -> None:
    merger = TokenMerger(5, modulation=PyraModulation(8, 3))
    merger(torch.randn(1, 6, 8))
    with pytest.raises(
        ValueError, match=r"PyraModulation: expected sources of shape \[B, R\] with R <= r = 3, got R = 5"
    ):
        merger(torch.randn(1, 20, 8))
