"""Factored linear layers: forms, files, conversion of layers and of models."""

import copy
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchops
from torchops.nn import STFLinear, factorize_

# ---- STFLinear ----------------------------------------------------------------------------------

FORMS = ["factored", "straight_through", "pack"]


def small_layer(sparse_side: str = "output", **options: Any) -> STFLinear:
    return STFLinear(12, 20, basis_size=7, nnz=3, num_blocks=2, sparse_side=sparse_side, **options)


@pytest.mark.parametrize("sparse_side", ["output", "input"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_computes_with_its_dense_weight_in_every_form(sparse_side: str, bias: bool) -> None:
    layer = small_layer(sparse_side, bias=bias)
    input = torch.randn(3, 5, 12)
    expected = nn.functional.linear(input, layer.dense_weight(), layer.bias)
    weight = layer.dense_weight()
    for form in [*FORMS, *reversed(FORMS)]:
        assert getattr(layer, form)() is layer
        torch.testing.assert_close(layer(input), expected)
        assert torch.equal(layer.dense_weight(), weight), form


@pytest.mark.parametrize("form", FORMS)
def test_parameters_of_each_form(form: str) -> None:
    layer = getattr(small_layer(), form)()
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    factor = {"factored": {"values"}, "straight_through": {"latent"}}.get(form)
    assert trained == ({"basis", "bias"} | factor if factor else set())
    # Out of the packed form everything trains again.
    assert all(parameter.requires_grad for parameter in layer.straight_through().parameters())


def test_frozen_parameters_stay_frozen_when_the_choice_is_trained() -> None:
    layer = small_layer()
    layer.basis.requires_grad_(False)
    assert not layer.straight_through().basis.requires_grad


def test_a_dropped_entry_comes_back_in_training() -> None:
    torch.manual_seed(0)
    target = small_layer().dense_weight()
    layer = small_layer().straight_through()
    before = layer.sparse_factor()["indices"]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    errors = []
    for _ in range(60):
        input = torch.randn(64, 12)
        loss = nn.functional.mse_loss(layer(input), nn.functional.linear(input, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append((layer.dense_weight() - target).norm().item())
    assert not torch.equal(layer.sparse_factor()["indices"], before)
    assert errors[-1] < 0.6 * errors[0]


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("loading", FORMS)
def test_state_dict_is_loaded_in_the_form_in_which_it_was_saved(saved: str, loading: str) -> None:
    layer = nn.Sequential(getattr(small_layer(), saved)())
    other = nn.Sequential(getattr(small_layer(), loading)())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    input = torch.randn(4, 12)
    assert other[0].form() == layer[0].form()
    assert torch.equal(other(input), layer(input))


def test_state_dict_of_other_sizes_is_refused() -> None:
    state = STFLinear(12, 20, basis_size=7, nnz=4, num_blocks=2).pack().state_dict()
    with pytest.raises(RuntimeError, match="expected the state of a layer with .*nnz=3.*, got one with .*nnz=4"):
        small_layer().load_state_dict(state)


@pytest.mark.parametrize("form", FORMS)
def test_layer_scripts_exports_and_copies(form: str) -> None:
    layer = getattr(small_layer("input"), form)()
    input = torch.randn(2, 3, 12)
    expected = layer(input)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(input), expected)
    dynamic = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(layer, (input,), dynamic_shapes=dynamic)
    assert torch.equal(program.module()(input), expected)
    assert torch.equal(copy.deepcopy(layer)(input), expected)


@pytest.mark.parametrize("form", FORMS)
def test_layer_in_16_bits(form: str) -> None:
    layer = getattr(small_layer(), form)().to(torch.bfloat16)
    assert layer(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.sparse_factor()["indices"].dtype == torch.uint8


def test_int16_indices_of_a_large_basis() -> None:
    layer = STFLinear(600, 20, basis_size=300, nnz=100)
    input = torch.randn(3, 600)
    expected = layer(input)
    assert layer.sparse_factor()["indices"].dtype == torch.int16
    torch.testing.assert_close(layer.pack()(input), expected)
    torch.testing.assert_close(layer.factored()(input), expected)


def test_fresh_weights_vary_as_those_of_a_linear_layer() -> None:
    for sparse_side in ("output", "input"):
        weight = STFLinear(256, 512, 64, 32, num_blocks=4, sparse_side=sparse_side).dense_weight()
        assert weight.std().item() == pytest.approx(nn.Linear(256, 512).weight.std().item(), rel=0.05)


def test_num_bytes_is_that_of_the_tensors() -> None:
    layer = STFLinear(12, 21, basis_size=7, nnz=3, num_blocks=2, bias=False)
    for form in FORMS:
        getattr(layer, form)()
        assert layer.num_bytes() == sum(
            tensor.nbytes for name, tensor in layer.state_dict().items() if name != "layout"
        )
    assert layer.num_bytes("factored") == 4 * 2 * 7 * 6 + (4 + 1) * 21 * 2 * 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparse_side": "left"}, "expected sparse_side to be 'output' or 'input', got 'left'"),
        ({"nnz": 8}, "expected nnz in 0..basis_size = 7, got 8"),
        ({"num_blocks": 5}, "expected in_features to be a multiple of num_blocks = 5, got 12"),
        (
            {"num_blocks": 3, "sparse_side": "input"},
            "expected out_features to be a multiple of num_blocks = 3, got 20",
        ),
    ],
)
def test_impossible_layers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        STFLinear(**({"in_features": 12, "out_features": 20, "basis_size": 7, "nnz": 3} | options))
    assert str(error.value) == f"STFLinear: {message}"


# ---- from_linear --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 96), (64, 200), (200, 64)])
@pytest.mark.parametrize("compression", [1.5, 2.0, 2.8, 3.57])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear_is_as_small_as_asked_for(shape: tuple[int, int], compression: float, dtype: torch.dtype) -> None:
    linear = nn.Linear(*shape, dtype=dtype)
    layer = STFLinear.from_linear(linear, compression, num_iterations=1)
    reached = linear.weight.nbytes / layer.num_bytes("packed")
    assert compression <= reached < 1.08 * compression
    assert 2.5 < layer.basis_size / layer.nnz < 4
    assert layer.sparse_side == ("input" if shape[0] > shape[1] else "output")
    assert layer.basis.dtype == layer.values.dtype == dtype
    assert torch.equal(layer.bias, linear.bias)


def test_from_linear_comes_close_to_the_layer() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 128, bias=False)
    with torch.no_grad():
        linear.weight.copy_(STFLinear(48, 128, basis_size=24, nnz=4).dense_weight())
    before = linear.weight.clone()
    layer = STFLinear.from_linear(linear, 2.0).eval()
    assert (layer.dense_weight() - linear.weight).norm() < 0.35 * linear.weight.norm()
    assert torch.equal(linear.weight, before)


def test_from_linear_keeps_the_mode() -> None:
    assert not STFLinear.from_linear(nn.Linear(16, 32).eval(), num_iterations=1).training


@pytest.mark.parametrize(
    "linear, compression, message",
    [
        (nn.Linear(48, 100), 30.0, "expected compression in 1..18.01 for 100 x 48, got 30.0"),
        (nn.Linear(48, 100), 0.9, "expected compression in 1..18.01 for 100 x 48, got 0.9"),
        (nn.Linear(64, 1), 2.0, "expected a layer whose factors are smaller than it, got 64 x 1"),
    ],
)
def test_from_linear_refuses_an_impossible_compression(linear: nn.Linear, compression: float, message: str) -> None:
    with pytest.raises(ValueError) as error:
        STFLinear.from_linear(linear, compression)
    assert str(error.value) == f"STFLinear.from_linear: {message}"


@pytest.mark.parametrize("sparse_side", ["output", "input"])
def test_calibration_weighs_the_error_by_the_inputs(sparse_side: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 64) if sparse_side == "output" else nn.Linear(64, 32)
    inputs = torch.randn(4, 50, linear.in_features) * torch.logspace(0, -2, linear.in_features)

    def error(layer: nn.Module) -> float:
        return (layer(inputs) - linear(inputs)).norm().item()

    calibrated = STFLinear.from_linear(linear, 2.5, calibration=inputs)
    assert calibrated.sparse_side == sparse_side
    assert error(calibrated) < 0.9 * error(STFLinear.from_linear(linear, 2.5))


@pytest.mark.parametrize(
    "calibration, message",
    [
        (torch.randn(10, 63), r"calibration of shape \[..., in_features = 64\], got \[10, 63\]"),
        (torch.full((10, 64), torch.nan), "calibration of finite numbers, got NaN or infinity"),
    ],
    ids=["size", "NaN"],
)
@pytest.mark.parametrize("out_features", [32, 100])
def test_calibration_that_is_refused(calibration: torch.Tensor, message: str, out_features: int) -> None:
    with pytest.raises(ValueError, match=f"STFLinear.from_linear: expected {message}"):
        STFLinear.from_linear(nn.Linear(64, out_features), calibration=calibration)


# ---- factorize_ ---------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))
        self.again = self.up
        self.attention = nn.MultiheadAttention(32, 2)
        self.head = nn.Linear(32, 32)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.body(self.again(self.body(self.up(input)))))


def test_factorize_replaces_linear_layers() -> None:
    model = Model()
    head = model.head
    report = factorize_(model, 1.5, skip=["he*"], num_iterations=1, verbose=False)
    assert isinstance(model.up, STFLinear) and isinstance(model.body[1], STFLinear)
    assert model.again is model.up and model.head is head
    # A subclass, whose weight its module reads.
    assert isinstance(model.attention.out_proj, nn.Linear)
    assert model(torch.randn(5, 32)).shape == (5, 32)
    assert [layer.name for layer in report.layers] == ["up", "body.1"]


def test_report_adds_up() -> None:
    model = Model()
    dense_model = copy.deepcopy(model)
    report = factorize_(model, 1.5, skip=["again", "up"], num_iterations=1, verbose=False)
    row = next(layer for layer in report.layers if layer.name == "head")
    head, weight = model.head, dense_model.head.weight
    assert (row.sparse_side, row.basis_size, row.nnz) == (head.sparse_side, head.basis_size, head.nnz)
    assert row.dense_bytes == weight.nbytes
    assert row.indexed_bytes == head.num_bytes("factored") and row.packed_bytes == head.num_bytes("packed")
    assert row.error == pytest.approx((head.dense_weight() - weight).norm().item(), rel=1e-5)
    assert row.norm == pytest.approx(weight.norm().item(), rel=1e-5)
    total = report.total()
    assert total.packed_bytes == sum(layer.packed_bytes for layer in report.layers)
    assert total.error**2 == pytest.approx(sum(layer.error**2 for layer in report.layers))
    lines = str(report).splitlines()
    *lines, remark = lines
    assert len(lines) == 1 + 2 + 1 and len({len(line) for line in lines}) == 1
    assert f"{total.dense_bytes / total.packed_bytes:.2f} x" in lines[-1]
    assert remark.startswith("left dense: attention.out_proj (")


def test_sizes_follow_from_the_dtype_in_which_the_model_is_stored() -> None:
    models = [nn.Sequential(nn.Linear(64, 256)) for _ in range(2)]
    models[1].bfloat16()
    reports = [
        factorize_(model, 2.0, verbose=False, num_iterations=1, stored_dtype=dtype)
        for model, dtype in zip(models, (torch.bfloat16, None), strict=True)
    ]
    assert models[0][0].sizes() == models[1][0].sizes() and models[0][0].basis.dtype == torch.float32
    of_layer = [report.layers[0] for report in reports]
    for name in ("dense_bytes", "indexed_bytes", "packed_bytes"):
        assert getattr(of_layer[0], name) == getattr(of_layer[1], name)
    assert of_layer[1].packed_bytes == models[1][0].pack().num_bytes()


def test_factorize_with_calibration_keeps_what_the_model_computes() -> None:
    torch.manual_seed(0)
    plain, model = Model(), Model()
    model.load_state_dict(plain.state_dict())
    model.train(), model.body.eval()
    batches = [torch.randn(20, 32) * torch.logspace(0, -2, 32) for _ in range(3)]
    seen = []
    expected = [plain(batch) for batch in batches]

    def run(given: nn.Module) -> None:
        seen.append((given.training, torch.is_grad_enabled()))
        for batch in batches:
            given(batch)

    def error(given: nn.Module) -> float:
        return sum((given(batch) - out).square().sum().item() for batch, out in zip(batches, expected, strict=True))

    down, outputs = plain.body[1], []
    hook = down.register_forward_hook(lambda module, inputs, output: outputs.append(output - down.bias))
    run(plain)
    hook.remove()
    seen.clear()

    calibrated = factorize_(model, 2.0, verbose=False, calibration=run)
    assert set(seen) == {(False, False)}
    assert model.training and model.head.training and not model.body.training
    uncalibrated = factorize_(plain, 2.0, verbose=False)
    assert error(model) < error(plain)
    assert len(outputs) == 2 * len(batches)  # the model runs that layer twice
    row = next(layer for layer in calibrated.layers if layer.name == "body.1")
    rows = torch.cat(outputs)
    assert row.output_norm == pytest.approx((rows - rows.mean(0)).norm().item(), rel=1e-4)
    for with_it, without in zip(calibrated.layers, uncalibrated.layers, strict=True):
        assert with_it.error > without.error and with_it.output_error < with_it.output_norm
        assert str(without.output_error) == "nan"
    assert f"{calibrated.total().output_error / calibrated.total().output_norm:.3f}" in str(calibrated)


def test_calibration_sees_inputs_that_are_given_by_name() -> None:
    class ByName(nn.Sequential):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self[0](input=rows)

    linear, rows = nn.Linear(16, 32), torch.randn(20, 16)
    by_position, by_name = nn.Sequential(copy.deepcopy(linear)), ByName(copy.deepcopy(linear))
    for model in (by_position, by_name):
        factorize_(model, 1.5, verbose=False, calibration=lambda given: given(rows))
    assert torch.equal(by_name(rows), by_position(rows))


def test_factorize_refuses_a_calibration_that_misses_layers() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"factorize_: expected calibration to run .* got none of body.1, head: let"):
        factorize_(model, 1.5, verbose=False, calibration=lambda given: given.up(torch.randn(5, 32)))
    assert unchanged(model)


def test_factorize_shows_progress_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    rich = pytest.importorskip("rich")
    rich.reconfigure(width=120)  # of the console that all share, and that an earlier test may have made
    factorize_(nn.Sequential(nn.Linear(16, 32)), 1.5, num_iterations=1)
    shown = capsys.readouterr().out
    rich.reconfigure()
    assert "Factoring layers" in shown and "packed kB" in shown


def test_factorize_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    report = factorize_(nn.Sequential(nn.Linear(16, 32)), 1.5, num_iterations=1)
    assert capsys.readouterr().out == f"Factoring layer 1 of 1: 0\n{report}\n"


def unchanged(model: nn.Module) -> bool:
    return not any(isinstance(module, STFLinear) for module in model.modules())


def test_factorize_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    made = []
    fitted = STFLinear._fitted

    def fails_at_the_second(*args: Any, **options: Any) -> STFLinear:
        if made:
            raise RuntimeError("interrupted")
        made.append(fitted(*args, **options))
        return made[0]

    monkeypatch.setattr(STFLinear, "_fitted", fails_at_the_second)
    with pytest.raises(RuntimeError, match="interrupted"):
        factorize_(model, 1.5, num_iterations=1, verbose=False)
    assert unchanged(model)


def test_factorize_names_every_layer_that_cannot_be_that_small() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 1), nn.Linear(1, 3))
    with pytest.raises(ValueError, match=r"skip=\['1', '2'\]\):\n  1: .*64 x 1\n  2: .*3 x 1"):
        factorize_(model, verbose=False)
    assert unchanged(model)


def test_factorize_refuses_a_skip_that_names_nothing() -> None:
    with pytest.raises(ValueError, match="expected skip to name linear layers of the model, got 'classifier'"):
        factorize_(Model(), skip=["head", "classifier"], verbose=False)


@pytest.mark.parametrize("model", [nn.Linear(32, 64), nn.Sequential(nn.ReLU())], ids=["a layer", "no layer"])
def test_factorize_refuses_a_model_without_layers_inside(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected a model with layers of class nn.Linear in it, got"):
        factorize_(model, verbose=False)


# ---- STFProjectedLinear -------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_side", ["output", "input"])
def test_projected_layer_trains_its_weight_and_becomes_a_factored_one(sparse_side: str) -> None:
    torch.manual_seed(0)
    target, start = nn.Linear(16, 24), nn.Linear(16, 24)
    layer = torchops.nn.STFProjectedLinear(start, basis_size=12, nnz=4, sparse_side=sparse_side)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        input = torch.randn(64, 16)
        loss = nn.functional.mse_loss(layer(input), target(input))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.refresh()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    factored, input = layer.factored(), torch.randn(5, 16)
    assert factored.sparse_side == sparse_side
    torch.testing.assert_close(factored(input), layer(input), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.script(layer)(input), layer(input))


@pytest.mark.parametrize("sparse_side", ["output", "input"])
@pytest.mark.parametrize("rank", [1, 5, 48])
def test_factored_layer_has_the_code_of_the_projection(rank: int, sparse_side: str) -> None:
    """Also where basis vectors depend on each other, so that one product has many codes."""
    linear = nn.Linear(48, 96, bias=False)
    linear.weight.data = torch.randn(96, rank) @ torch.randn(rank, 48)
    layer = torchops.nn.STFProjectedLinear(linear, 16, 4, sparse_side)
    input = torch.randn(20, 48)
    expected = layer(input)
    assert (layer.factored()(input) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("sparse_side", ["output", "input"])
def test_projected_layer_leaves_zero(sparse_side: str) -> None:
    """As adapters start."""
    target, start = nn.Linear(16, 24), nn.Linear(16, 24)
    nn.init.zeros_(start.weight)
    layer = torchops.nn.STFProjectedLinear(start, basis_size=12, nnz=4, sparse_side=sparse_side)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    input = torch.randn(64, 16)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(layer(input), target(input))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.refresh()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(layer.factored()(input), layer(input), rtol=1e-5, atol=1e-5)


def test_projected_layer_refuses_more_vectors_than_features() -> None:
    with pytest.raises(
        ValueError, match="expected basis_size of at most the smaller of the layer's features = 16, got 17"
    ):
        torchops.nn.STFProjectedLinear(nn.Linear(16, 24), basis_size=17, nnz=4)
