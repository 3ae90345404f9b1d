"""Layers fitted to what a model computes: sums over inputs and outputs, and the order in which layers are replaced."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchops
from torchops.nn import STFLinear, factorize_, ignored_padding
from torchops.nn._plan import Plan
from torchops.nn.stf_calibration import Moments


def outputs_of(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Those that another model has, which are near."""
    return layer(inputs + 0.1 * torch.randn_like(inputs)).detach()


# ---- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bias_is_free", [True, False])
def test_sums_are_those_of_least_squares(bias: bool, bias_is_free: bool) -> None:
    torch.manual_seed(0)
    bias_is_free &= bias
    layer = nn.Linear(6, 4, bias=bias).double()
    inputs = torch.randn(50, 6).double() @ torch.randn(6, 6).double() + 3
    outputs = outputs_of(layer, inputs)
    moments = Moments()
    for rows in (inputs[:0], inputs[:20], inputs[20:]):
        moments.add(rows, {layer: outputs[len(inputs) - len(rows) :] if len(rows) == 30 else outputs[: len(rows)]})
    fit = moments.fit(layer, bias_is_free)

    if bias_is_free:
        x, y = inputs - inputs.mean(0), outputs - outputs.mean(0)
        torch.testing.assert_close(fit.input_mean, inputs.mean(0))
    else:
        x, y = inputs, outputs - (layer.bias.detach() if bias else 0)
    torch.testing.assert_close(fit.gram, x.T @ x)
    torch.testing.assert_close(fit.cross, x.T @ y)
    assert fit.norm(layer.weight.detach()) == pytest.approx(y.norm().item())
    other = torch.randn(4, 6).double()
    assert fit.error(layer.weight.detach(), other) == pytest.approx((y - x @ other.T).norm().item())
    # The solution of least squares, but for the ridge.
    solved = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(fit.target(layer.weight.detach()), solved, rtol=0.05, atol=0.01)
    if bias_is_free:
        missed = outputs - inputs @ other.T - fit.bias(layer, other)
        torch.testing.assert_close(missed.mean(0), torch.zeros(4).double(), atol=1e-10, rtol=0)


def test_sums_without_outputs_are_those_of_the_layer() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 4), torch.randn(50, 6) + 1
    moments = Moments()
    moments.add(inputs)
    fit = moments.fit(layer, True)
    weight, other = layer.weight.detach(), torch.randn(4, 6)
    x = inputs - inputs.mean(0)
    assert torch.equal(fit.target(weight), weight)
    assert fit.norm(weight) == pytest.approx((x @ weight.T).norm().item(), rel=1e-5)
    assert fit.error(weight, other) == pytest.approx((x @ (other - weight).T).norm().item(), rel=1e-5)
    missed = layer(inputs) - inputs @ other.T - fit.bias(layer, other)
    torch.testing.assert_close(missed.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


def test_a_large_mean_leaves_the_sums_exact() -> None:
    torch.manual_seed(0)
    small = torch.randn(500, 6)
    moments = Moments()
    for rows in (1e4 + small).split(100):
        moments.add(rows)
    x = (1e4 + small).double()
    x = x - x.mean(0)
    torch.testing.assert_close(moments.fit(nn.Linear(6, 4), True).gram.double(), x.T @ x, rtol=1e-3, atol=0.1)


# ---- order ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Self-attention of sorts and a feed-forward layer, with a residual that is written in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, scale: float = 1.0, cache: Any = None) -> tuple[Tensor, Tensor]:
        hidden += scale * torch.tanh(self.query(hidden)) * self.key(hidden)
        return hidden[:1], hidden + self.down(torch.relu(self.up(hidden)))


class Model(nn.Module):
    def __init__(self, width: int = 16, layers: int = 3, chained: bool = True, cache: Callable[[], Any] = lambda: None):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 8)
        self.chained, self.cache = chained, cache

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.embed(input)
        for index, block in enumerate(self.layers):
            hidden = block(hidden, 1.0 if self.chained else 1.0 + 1e-9 * index, cache=self.cache())[1]
        return self.head(hidden)


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    return {module: [name] for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_layers_are_taken_in_the_order_of_the_forward() -> None:
    model = Model(layers=2)
    names = names_of(model)
    plan = Plan(model, dict(reversed(names.items())), lambda: model(torch.randn(5, 8)))
    assert [[names[layer][0] for layer in stage.layers] for stage in plan.stages] == [
        ["embed"],
        ["layers.0.query", "layers.0.key"],
        ["layers.0.up"],
        ["layers.0.down"],
        ["layers.1.query", "layers.1.key"],
        ["layers.1.up"],
        ["layers.1.down"],
        ["head"],
    ]
    blocks = [None, *[model.layers[0]] * 3, *[model.layers[1]] * 3, None]
    assert [stage.block for stage in plan.stages] == blocks
    flow = plan.flows[model.layers[1]]
    assert flow.source is model.layers[0] and len(plan.flows) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "change",
    [{"chained": False}, {"cache": object}, {"cache": lambda: torch.zeros(1)}],
    ids=["blocks-with-other-arguments", "a-cache", "tensors-of-their-own"],
)
def test_blocks_by_themselves_and_whole_models_give_the_same(change: dict[str, Any]) -> None:
    """A block that follows another runs by itself; one that does not is looked at in runs of the whole model."""
    torch.manual_seed(0)
    model = Model()
    other = Model(**change)
    other.load_state_dict(model.state_dict())
    batches = torch.randn(3, 100, 8)
    runs = []
    for one in (model, other):
        count = [0]

        def run(given: nn.Module, count: list[int] = count) -> None:
            count[0] += 1
            for batch in batches:
                given(batch)

        factorize_(one, 1.5, verbose=False, calibration=run, num_iterations=2)
        runs.append(count[0])
    assert runs[0] < runs[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_layers_make_up_for_those_before() -> None:
    torch.manual_seed(0)
    model = Model()
    inputs = torch.randn(2000, 8)
    expected, errors = model(inputs), []
    for sequential in (False, True):
        converted = copy.deepcopy(model)
        factorize_(converted, 1.5, verbose=False, calibration=lambda given: given(inputs), sequential=sequential)
        errors.append((converted(inputs) - expected).norm() / expected.norm())
    assert errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_a_block_runs_by_itself_in_the_mode_in_which_the_model_ran(mode: str) -> None:
    model, seen = Model(), []
    model.layers[1].register_forward_hook(
        lambda block, args, output: seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
    )

    def run(given: nn.Module) -> None:
        with torch.inference_mode() if mode == "inference" else torch.autocast("cpu", torch.bfloat16):
            given(torch.randn(100, 8))

    factorize_(model, 1.5, verbose=False, calibration=run, num_iterations=1)
    assert len(seen) > 2 and set(seen) == {(mode == "inference", mode == "autocast")}


def test_a_calibration_that_changes_is_refused() -> None:
    model, batches = Model(chained=False), iter([[torch.randn(50, 8)] * count for count in (2, 3, 1, 4, 2, 3)])

    def run(given: nn.Module) -> None:
        for batch in next(batches):
            given(batch)

    with pytest.raises(ValueError, match="factorize_: expected calibration to compute the same each time"):
        factorize_(model, 1.5, verbose=False, calibration=run, num_iterations=1)
    assert not any(isinstance(module, STFLinear) for module in model.modules())


def test_experts_that_get_other_tokens_are_fitted_to_those_they_get() -> None:
    """What a router sends an expert depends on the layers before: outputs of the dense model belong to other tokens."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.router = nn.Linear(16, 16), nn.Linear(16, 2)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, input: Tensor) -> Tensor:
            hidden = self.first(input)
            chosen, output = self.router(hidden).argmax(1), torch.zeros_like(hidden)
            for index, expert in enumerate(self.experts):
                output[chosen == index] = expert(hidden[chosen == index])
            return output

    torch.manual_seed(0)
    model, inputs = Experts(), torch.randn(400, 16)
    report = factorize_(model, 1.5, skip=["router"], verbose=False, calibration=lambda given: given(inputs))
    assert all(0 < layer.output_error < layer.output_norm for layer in report.layers)


def test_an_expert_that_only_gets_tokens_behind_factored_layers() -> None:
    """One run of its block calls it in the factored model alone."""

    class Sometimes(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.expert, self.before = nn.Linear(16, 16), lambda: model.first

        def forward(self, hidden: Tensor, always: bool) -> Tensor:
            return self.expert(hidden) if always or isinstance(self.before(), STFLinear) else hidden

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.layers = nn.ModuleList([Sometimes(self)])

        def forward(self, input: Tensor, always: bool) -> Tensor:
            return self.layers[0](self.first(input), always)

    torch.manual_seed(0)
    model, inputs = Model(), torch.randn(200, 16)
    run = lambda given: [given(inputs, always) for always in (False, True)]  # noqa: E731
    report = factorize_(model, 1.5, verbose=False, calibration=run)
    assert all(0 < layer.output_error < layer.output_norm for layer in report.layers)


# ---- padding --------------------------------------------------------------------------------------


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    padding = torch.arange(30) >= torch.tensor([[30], [7], [19]])
    tokens = torch.randn(3, 30, 8)
    models = [Model(layers=2)]
    models.append(copy.deepcopy(models[0]))
    filled = tokens.masked_fill(padding[..., None], 50.0)

    def run(given: nn.Module) -> None:
        with ignored_padding(padding):
            given(filled)

    factorize_(models[0], 1.5, verbose=False, calibration=run, num_iterations=1)
    factorize_(models[1], 1.5, verbose=False, calibration=lambda given: given(tokens[~padding]), num_iterations=1)
    # Not the factors: of a basis vector and its values both signs are right, and rounding may choose.
    for (name, layer), other in zip(models[0].named_modules(), models[1].modules(), strict=True):
        if isinstance(layer, STFLinear):
            torch.testing.assert_close(layer.dense_weight(), other.dense_weight(), rtol=1e-3, atol=1e-4, msg=name)
            torch.testing.assert_close(layer.bias, other.bias, rtol=1e-3, atol=1e-4, msg=name)


# ---- biases ---------------------------------------------------------------------------------------


def test_the_bias_takes_the_mean_error() -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(32, 64), torch.randn(500, 32) + 2
    layer = STFLinear.from_linear(linear, 3.0, calibration=inputs)
    missed = (layer(inputs) - linear(inputs)).mean(0)
    assert missed.abs().max() < 1e-4
    plain = STFLinear.from_linear(linear, 3.0)
    assert (plain(inputs) - linear(inputs)).mean(0).abs().max() > 0.1
    assert torch.equal(plain.bias, linear.bias)


def test_a_bias_that_is_shared_stays_what_it_is() -> None:
    model = Model()
    model.layers[1].query.bias = model.layers[0].query.bias
    model.layers[2].query.bias.requires_grad_(False)
    shared, frozen = model.layers[0].query.bias, model.layers[2].query.bias
    before = shared.clone()
    factorize_(model, 1.5, verbose=False, calibration=lambda given: given(torch.randn(300, 8)), num_iterations=1)
    assert model.layers[0].query.bias is shared and model.layers[1].query.bias is shared
    assert torch.equal(shared, before)
    new = model.layers[2].query.bias
    assert new is not frozen and not new.requires_grad and model.layers[2].up.bias.requires_grad
    assert model.layers[0].key.bias is None


# ---- rows that count together -----------------------------------------------------------------------


def test_rows_that_count_together_make_up_for_each_other() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(600, 12) @ torch.randn(12, 64) + 0.1 * torch.randn(600, 64)
    weight, gram = torch.randn(64, 24), inputs.T @ inputs
    errors = []
    for row_gram in (torch.diag(gram.diagonal()), gram):
        factors = torchops.stf_factorize(weight, 18, 6, row_gram=row_gram)
        errors.append((inputs @ (weight - torchops.reference.stf.dense(*factors))).norm().item())
    assert errors[1] < 0.5 * errors[0], errors


@pytest.mark.parametrize("nnz", [3, 20])
def test_error_of_rows_that_count_together_never_rises(nnz: int) -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(300, 48) @ torch.randn(48, 48), torch.randn(48, 40)
    gram = inputs.T @ inputs
    root = torch.linalg.cholesky(gram + 1e-3 * gram.diagonal().mean() * torch.eye(48))
    errors = []
    for iterations in range(8):
        factors = torchops.stf_factorize(weight, 30, nnz, 1, iterations, row_gram=gram)
        errors.append((root.T @ (weight - torchops.reference.stf.dense(*factors))).norm().item())
    # But for the last round of conjugate gradients, which each of these ends with.
    assert all(after <= 1.001 * before for before, after in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 0.97 * errors[0]
