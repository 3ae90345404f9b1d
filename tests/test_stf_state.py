"""What a factored layer holds: files, what is refused, what stays frozen, averages, and the weight it stands for."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torchops
from torchops.nn import STFLinear, factorize_, restore_factored_

FORMS = ["factored", "straight_through", "pack"]
EACH_FORM = pytest.mark.parametrize("form", FORMS)
WIDE = {"in_features": 600, "out_features": 20, "basis_size": 300, "nnz": 100}  # positions of 16 bits


def small_layer(sparse_side: str = "output", **options: Any) -> STFLinear:
    sizes = {"in_features": 12, "out_features": 20, "basis_size": 7, "nnz": 3, "num_blocks": 2}
    return STFLinear(**(sizes | {"sparse_side": sparse_side} | options))


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def as_older_versions_wrote(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions of 16 bits as such, and no layout."""
    return {
        name: tensor.view(torch.int16).squeeze(-1) if tensor.dtype == torch.uint8 and tensor.dim() == 4 else tensor
        for name, tensor in state.items()
        if not name.endswith("layout")
    }


# ---- files --------------------------------------------------------------------------------------


@EACH_FORM
@pytest.mark.parametrize(
    "sizes", [{"in_features": 12, "out_features": 20, "basis_size": 7, "nnz": 3}, WIDE], ids=["8 bits", "16 bits"]
)
def test_no_tensor_is_of_16_bit_integers(form: str, sizes: dict[str, int]) -> None:
    layer = getattr(STFLinear(**sizes), form)()
    assert torch.int16 not in {tensor.dtype for tensor in layer.state_dict().values()}


@EACH_FORM
def test_files_of_older_versions_load(form: str) -> None:
    layer, other = getattr(STFLinear(**WIDE), form)(), STFLinear(**WIDE).straight_through()
    state = as_older_versions_wrote(layer.state_dict())
    other.load_state_dict(state)
    assert same(other.state_dict(), layer.state_dict())
    on_meta = STFLinear(**WIDE, device="meta")
    on_meta.load_state_dict(state, assign=True)
    assert same(on_meta.state_dict(), layer.state_dict())
    input = torch.randn(2, 600)
    assert torch.equal(on_meta(input), layer(input))


@EACH_FORM
def test_modules_that_older_versions_pickled_load(form: str) -> None:
    layer, old = getattr(STFLinear(**WIDE), form)(), getattr(STFLinear(**WIDE), form)()
    old.load_state_dict(layer.state_dict())
    for name in ("indices", "mask"):
        if getattr(old, name) is not None:
            setattr(old, name, getattr(old, name).view(torch.int16).squeeze(-1))
    del old._buffers["layout"]
    again = pickle.loads(pickle.dumps(old))
    assert same(again.state_dict(), layer.state_dict())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in layer.parameters()]


@EACH_FORM
def test_safetensors(form: str, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(getattr(STFLinear(**WIDE), form)(), getattr(small_layer(in_features=20, nnz=3), form)())
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = nn.Sequential(STFLinear(**WIDE), small_layer(in_features=20))
    state = safetensors.load_file(tmp_path / "model.safetensors")
    other.load_state_dict(state)
    assert same(other.state_dict(), model.state_dict())


def test_bytes_that_start_anywhere_are_moved() -> None:
    layer = STFLinear(**WIDE).pack()
    state = layer.state_dict()
    buffer = torch.empty(state["mask"].numel() + 1, dtype=torch.uint8)
    buffer[1:] = state["mask"].flatten()
    # A tensor with an offset of its own, as those mapped from a file.
    state["mask"] = torch.from_numpy(buffer.numpy()[1:]).view(state["mask"].shape)
    assert state["mask"].data_ptr() % 2
    other = STFLinear(**WIDE)
    other.load_state_dict(state, assign=True)
    assert other.mask.data_ptr() % 2 == 0 and same(other.state_dict(), layer.state_dict())


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, one, other",
    [
        ("factored", small_layer(out_features=12), small_layer("input", out_features=12)),
        ("straight_through", small_layer(nnz=3), small_layer(nnz=4)),
        ("pack", small_layer(out_features=17, bias=False), small_layer(out_features=20, bias=False)),
        ("factored", small_layer("input", num_blocks=1, bias=False), small_layer(out_features=12, in_features=20)),
    ],
    ids=["side", "nnz", "rows", "features"],
)
def test_the_state_of_another_layer_is_refused_and_changes_nothing(form: str, one: Any, other: Any) -> None:
    getattr(one, form)()
    for own in FORMS:
        before = tensors(getattr(other, own)())
        for strict in (True, False):
            with pytest.raises(
                RuntimeError, match=r"STFLinear 0: expected the state of a layer with in_features=(12|20),"
            ):
                nn.Sequential(other).load_state_dict(nn.Sequential(one).state_dict(), strict=strict)
        assert same(tensors(other), before)


@EACH_FORM
def test_tensors_of_other_shapes_are_refused_and_change_nothing(form: str) -> None:
    state = as_older_versions_wrote(getattr(small_layer(nnz=4, basis_size=8), form)().state_dict())
    layer = small_layer()
    before = tensors(layer)
    with pytest.raises(RuntimeError, match="size mismatch for basis"):
        layer.load_state_dict(state)
    assert same(tensors(layer), before)


def test_a_factor_that_is_not_all_there_changes_nothing() -> None:
    state, layer = small_layer().pack().state_dict(), small_layer()
    before = tensors(layer)
    del state["mask"]
    assert layer.load_state_dict(state, strict=False).missing_keys == ["mask"]
    assert same(tensors(layer), before)
    with pytest.raises(RuntimeError, match='Missing key.* "mask"'):
        layer.load_state_dict(state)
    assert same(tensors(layer), before)


def test_parameters_alone_load_into_the_same_form() -> None:
    layer, other = small_layer(), small_layer()
    other.load_state_dict(layer.state_dict())
    nn.init.normal_(layer.values)
    loaded = other.load_state_dict(dict(layer.named_parameters()), strict=False)
    assert loaded.missing_keys == ["indices"] and torch.equal(other.values, layer.values)


# ---- forms --------------------------------------------------------------------------------------


@EACH_FORM
def test_a_form_turned_to_itself_keeps_its_tensors(form: str) -> None:
    layer = getattr(small_layer(), form)()
    before = dict(layer.named_parameters()) | dict(layer.named_buffers())
    getattr(layer, form)()
    assert all(tensor is before[name] for name, tensor in [*layer.named_parameters(), *layer.named_buffers()])


@EACH_FORM
@pytest.mark.parametrize("frozen", ["basis", "factor", "bias", "all"])
def test_what_is_frozen_stays_frozen(form: str, frozen: str) -> None:
    layer = small_layer()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in ("all", name, {"values": "factor"}.get(name)))
    was = [parameter.requires_grad for parameter in (layer.basis, layer.values, layer.bias)]
    layer.eval()
    hook = layer.register_forward_hook(lambda *args: None)

    def now() -> list[bool]:
        return [layer.basis.requires_grad, layer.values.requires_grad, layer.bias.requires_grad]

    getattr(layer, form)().factored()
    assert now() == was and not layer.training and hook.id in layer._forward_hooks
    state = getattr(small_layer(), form)().state_dict()
    layer.load_state_dict(state)
    assert not (form == "pack" and any(parameter.requires_grad for parameter in layer.parameters()))
    assert [p.requires_grad for p in (layer.basis, layer.bias)] == ([False] * 2 if form == "pack" else [was[0], was[2]])
    assert copy.deepcopy(layer).factored().values.requires_grad == was[1]
    layer.factored()
    assert now() == was


def test_from_linear_passes_on_what_is_frozen_and_draws_nothing() -> None:
    linear = nn.Linear(16, 64)
    linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    layer = STFLinear.from_linear(linear, 1.5, num_iterations=1)
    assert torch.equal(torch.get_rng_state(), state)
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"bias"}


@EACH_FORM
def test_parameters_are_reset_in_place(form: str) -> None:
    torch.manual_seed(0)
    layer = getattr(STFLinear(256, 512, 64, 20, num_blocks=2), form)()
    before, tensors_before = tensors(layer), dict(layer.named_parameters()) | dict(layer.named_buffers())
    pointers = {name: tensor.data_ptr() for name, tensor in tensors_before.items()}
    layer.reset_parameters()
    assert all(tensor is tensors_before[name] for name, tensor in [*layer.named_parameters(), *layer.named_buffers()])
    for name, tensor in layer.state_dict().items():
        assert tensor.data_ptr() == pointers[name]
        assert torch.equal(tensor, before[name]) == (name == "layout")
    std = nn.Linear(256, 512).weight.std().item()
    assert layer.dense_weight().std().item() == pytest.approx(std, rel=0.1)


@EACH_FORM
def test_an_empty_layer_refuses_to_run_until_it_is_reset(form: str) -> None:
    layer = getattr(small_layer(), form)().to("meta").to_empty(device="cpu")
    layer.layout.zero_()
    with pytest.raises(ValueError, match="expected positions as they were made"):
        layer(torch.randn(2, 12))
    layer.reset_parameters()
    assert layer(torch.randn(2, 12)).isfinite().all()


@EACH_FORM
def test_layer_is_copied_pickled_moved_and_compiled(form: str) -> None:
    layer, input = getattr(STFLinear(**WIDE), form)(), torch.randn(3, 600)
    expected = layer(input)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(input), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(input), expected)
    half = copy.deepcopy(layer).half()
    torch.testing.assert_close(half(input.half()), expected.half(), rtol=2e-2, atol=2e-2)
    assert torch.equal(half.layout, layer.layout)
    assert torch.equal(copy.deepcopy(layer).double().float()(input), expected)


# ---- averages -----------------------------------------------------------------------------------

AVERAGED = "expected positions as they were made, got such as an average was taken of"


@pytest.mark.parametrize("form", ["factored", "pack"])
@pytest.mark.parametrize("training", [True, False])
def test_averaged_buffers_are_refused(form: str, training: bool) -> None:
    model = nn.Sequential(getattr(small_layer(), form)()).train(training)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True).train(training)
    input = torch.randn(2, 12)
    averaged(input)
    for _ in range(2):
        averaged.update_parameters(model)
    for use in (averaged, lambda _: averaged.module[0].dense_weight(), copy.deepcopy(averaged)):
        with pytest.raises(ValueError, match=AVERAGED):
            use(input)
    with pytest.raises(RuntimeError, match=AVERAGED):
        model.load_state_dict(averaged.module.state_dict())
    assert torch.isfinite(model(input)).all()


def test_averages_of_parameters_run() -> None:
    model, input = nn.Sequential(small_layer()), torch.randn(2, 12)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(2):
        averaged.update_parameters(model)
    torch.testing.assert_close(averaged(input), model(input))


def test_moving_averages_of_timm() -> None:
    utils = pytest.importorskip("timm.utils")
    model, input = nn.Sequential(small_layer()), torch.randn(2, 12)
    for make in (utils.ModelEma, utils.ModelEmaV2):
        average = make(model, decay=0.9)
        average.update(model)
        with pytest.raises(ValueError, match=AVERAGED):
            (average.ema if hasattr(average, "ema") else average.module)(input)
    average = utils.ModelEmaV3(model, decay=0.9)
    average.update(model)
    torch.testing.assert_close(average.module(input), model(input))


# ---- the weight ---------------------------------------------------------------------------------


@EACH_FORM
@pytest.mark.parametrize("sparse_side", ["output", "input"])
def test_weight_is_the_dense_one(form: str, sparse_side: str) -> None:
    layer, input = getattr(small_layer(sparse_side), form)(), torch.randn(5, 12)
    assert "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())
    weight = layer.weight
    assert isinstance(weight, Tensor) and weight.shape == (20, 12) and weight.dtype == torch.float32
    torch.testing.assert_close(weight + 0, layer.dense_weight())
    if form == "pack":
        return
    layer(input).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    nn.functional.linear(input, layer.weight, layer.bias).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_what_a_weight_says_about_itself_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small_layer(dtype=torch.bfloat16)
    monkeypatch.setattr(layer, "_multiplied_out", lambda: pytest.fail("multiplied out"))
    weight = layer.weight
    assert weight.dtype == torch.bfloat16 and weight.device == torch.device("cpu")
    assert weight.size(0) == weight.shape[0] == 20 and weight.dim() == weight.ndim == 2 and weight.numel() == 240
    assert weight.is_floating_point() and weight.layout == torch.strided and weight.element_size() == 2


@pytest.mark.parametrize("norm_first", [True, False])
@EACH_FORM
def test_transformer_encoder_in_evaluation(norm_first: bool, form: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    factorize_(model, 1.5, num_iterations=1, verbose=False)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in dense.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, STFLinear):
            state |= {f"{name}.weight": module.dense_weight(), f"{name}.bias": module.bias}
            getattr(module, form)()
    dense.load_state_dict(state)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    input = torch.randn(2, 7, 32)
    with torch.no_grad():
        output, expected = (m(input, src_key_padding_mask=padding)[~padding] for m in (model, dense))
    torch.testing.assert_close(output, expected)


# ---- restore_factored_ --------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64, **options)
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(64, 32, bias=False, **options))
        self.again = self.up
        self.head = nn.Linear(32, 32, **options)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.body(self.again(self.body(self.up(input)))))


def factored_model(form: str) -> Model:
    model = Model()
    factorize_(model, 1.5, skip=["head"], num_iterations=1, verbose=False)
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            getattr(layer, form)()
    return model


@EACH_FORM
@pytest.mark.parametrize("built_on", ["cpu", "meta"])
def test_a_factored_model_comes_back(form: str, built_on: str) -> None:
    model, input = factored_model(form), torch.randn(5, 32)
    plain = Model(device=built_on).eval()
    again = restore_factored_(plain, model.state_dict())
    assert again is plain and plain.again is plain.up and not plain.up.training
    assert same(plain.state_dict(), model.state_dict()) and torch.equal(plain(input), model(input))
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == trained


@pytest.mark.parametrize("form", ["factored", "pack"])
def test_a_model_of_an_older_version_comes_back(form: str) -> None:
    model, input = factored_model(form), torch.randn(5, 32)
    plain = restore_factored_(Model(), as_older_versions_wrote(model.state_dict()))
    assert torch.equal(plain(input), model(input))


def test_an_older_version_does_not_say_how_many_entries_of_a_latent_count() -> None:
    state = as_older_versions_wrote(factored_model("straight_through").state_dict())
    with pytest.raises(ValueError, match="says how many entries of up.latent count"):
        restore_factored_(Model(), state)


def test_frozen_layers_come_back_frozen() -> None:
    plain = Model()
    plain.up.requires_grad_(False)
    restore_factored_(plain, factored_model("straight_through").state_dict())
    trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert trained == {"body.1.basis", "body.1.latent", "head.weight", "head.bias"}


def test_a_model_that_cannot_come_back_is_left_as_it_was() -> None:
    state = factored_model("factored").state_dict()
    for change, error, message in [
        ({"head.weight": torch.zeros(3, 3)}, RuntimeError, "size mismatch for head.weight"),
        ({"up.layout": torch.zeros(7, dtype=torch.int64)}, ValueError, "expected positions as they were made"),
    ]:
        plain = Model()
        before = tensors(plain)
        with pytest.raises(error, match=message):
            restore_factored_(plain, state | change)
        assert type(plain.up) is type(plain.again) is nn.Linear
        assert tensors(plain).keys() == before.keys()
    with pytest.raises(ValueError, match="a model with a linear layer up, got none"):
        restore_factored_(nn.Sequential(nn.Linear(3, 3)), state)
    with pytest.raises(ValueError, match="got one with none"):
        restore_factored_(Model(), Model().state_dict())
    plain = Model()
    plain.up = nn.Linear(64, 32)
    with pytest.raises(ValueError, match="up to have in_features=32, out_features=64 .*, got 64, 32"):
        restore_factored_(plain, state)


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 10), (48, 100), (7, 9), (33, 17)])
def test_the_highest_compression_that_is_named_is_accepted(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError) as error:
        STFLinear.from_linear(nn.Linear(*shape), 1000.0)
    highest = float(str(error.value).split("1..")[1].split(" ")[0])
    STFLinear.from_linear(nn.Linear(*shape), highest, num_iterations=1)
    with pytest.raises(ValueError):
        STFLinear.from_linear(nn.Linear(*shape), highest + 0.01)


def test_exported_names() -> None:
    assert torchops.nn.restore_factored_ is restore_factored_
