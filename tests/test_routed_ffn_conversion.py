"""torchops.nn.route_ffn_: models whose feed-forward layers are routed."""

import copy
import io
from pathlib import Path

import pytest
import torch
from routed_models import EACH_MODEL, MODELS, convert, made, output, routed_layers, sequential
from torch import Tensor, nn

from torchops.nn import RoutedFFN, balance_loss, ignored_padding, route_ffn_


@pytest.mark.parametrize("lora_rank", [0, 2])
@EACH_MODEL
def test_all_blocks_are_the_dense_model(name: str, lora_rank: int) -> None:
    model, input = made(name)
    expected = output(model, input)
    report = convert(model, top_k=4, lora_rank=lora_rank, calibration=lambda model: model(input))
    torch.testing.assert_close(output(model, input), expected, rtol=1e-4, atol=1e-4)
    assert list(routed_layers(model)) == [layer.name for layer in report.layers] == MODELS[name][1]
    assert report.total().output_error < 1e-5 * report.total().output_norm


@EACH_MODEL
def test_a_converted_model_is_saved_loaded_copied_moved_and_frozen(name: str) -> None:
    model, input = made(name)
    other, _ = made(name)
    convert(model, calibration=lambda model: model(input))
    convert(other)
    expected = output(model, input)
    assert not torch.allclose(output(other, input), expected, atol=1e-3)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(output(other, input), expected)
    assert torch.equal(output(copy.deepcopy(model), input), expected)
    assert (
        output(copy.deepcopy(model).bfloat16(), input if input.dtype == torch.int64 else input.bfloat16())
        .isfinite()
        .all()
    )
    assert not any(parameter.requires_grad for parameter in model.requires_grad_(False).parameters())


@pytest.mark.parametrize("lora_rank", [0, 2])
@EACH_MODEL
def test_a_converted_model_trains(name: str, lora_rank: int) -> None:
    model, input = made(name)
    convert(model.train(), lora_rank=lora_rank)
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable()
    (output(model, input).float().square().mean() + balance_loss(model)).backward()
    for layer in routed_layers(model).values():
        assert layer.training
        for parameter_name, parameter in layer.named_parameters():
            frozen = bool(lora_rank) and not parameter_name.startswith(("lora", "router"))
            assert (parameter.grad is None) == frozen, parameter_name
            assert frozen or parameter_name in ("lora_a1", "lora_a2", "lora_b1") or parameter.grad.any()


@pytest.mark.parametrize("name", ["Sequential", "decoder", "timm"])
def test_a_converted_model_scripts(name: str) -> None:
    model, input = made(name)
    convert(model)
    torch.testing.assert_close(torch.jit.script(model)(input), output(model, input))


def test_calibration_makes_errors_smaller() -> None:
    model, input = made("Sequential")
    other, expected = copy.deepcopy(model), output(model, input)
    convert(model, calibration=lambda model: model(input))
    convert(other)
    assert (output(model, input) - expected).norm() < 0.9 * (output(other, input) - expected).norm()


def test_padding_does_not_count() -> None:
    model, _ = sequential()
    other = copy.deepcopy(model)
    tokens, padding = torch.randn(3, 50, 16), torch.arange(50) >= torch.tensor([[50], [7], [19]])

    def padded(given: nn.Module) -> None:
        with ignored_padding(padding):
            given(tokens.masked_fill(padding[..., None], 50.0))

    convert(model, calibration=padded)
    convert(other, calibration=lambda given: given(tokens[~padding]))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)


def test_modes_and_what_is_frozen_stay() -> None:
    model, input = sequential()
    model[5].eval()
    model[0].weight.requires_grad_(False)
    state = torch.get_rng_state()
    convert(model, calibration=lambda model: model(input))
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].training and not model[5].training and model[1].training
    assert not model[0].w1.requires_grad and model[0].w2.requires_grad and model[5].w1.requires_grad
    assert isinstance(model[1], nn.Dropout) and isinstance(model[2], nn.Identity) and isinstance(model[3], nn.Identity)


def test_modes_around_the_conversion_do_not_matter() -> None:
    model, input = sequential()
    others = [copy.deepcopy(model) for _ in range(2)]
    report = convert(model, calibration=lambda model: model(input))
    with torch.autocast("cpu", torch.bfloat16):
        # What the model computes is rounded then, what goes into its first layer is not.
        assert convert(others[0], calibration=lambda model: model(input)).layers[0] == report.layers[0]
    with torch.inference_mode():
        assert convert(others[1], calibration=lambda model: model(input)).layers == report.layers
    for other in others:
        assert torch.equal(other[0].w1, model[0].w1)
    others[1](input).sum().backward()


def test_hooks_of_modules_around_stay_and_a_gated_module_has_several_places() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, input: Tensor) -> Tensor:
            return self.down(self.up(input) * self.act(self.gate(input)))

        act = staticmethod(nn.functional.silu)

    module = Gated()
    module.act = nn.SiLU()
    model, called = nn.ModuleList([module, nn.ModuleDict({"again": module})]), []
    handle = module.register_forward_hook(lambda *_: called.append("after"))
    input = torch.randn(5, 8)
    expected = module(input)
    convert(model, top_k=4)
    assert model[0] is model[1]["again"] and isinstance(model[0], RoutedFFN)
    torch.testing.assert_close(model[0](input), expected)  # the second layer is the one with the activation
    handle.remove()
    model[0](input)
    assert called == ["after"] * 2


def test_fast_paths_of_torch_do_not_pass_by(tmp_path: Path) -> None:
    """In evaluation without gradients torch's encoders compute with the weights of their layers."""
    model, input = made("encoder")
    with torch.no_grad():
        expected = model(input)
        some = copy.deepcopy(model)
        convert(some, top_k=4, skip=["encoder.layers.1"])
        report = convert(model, top_k=4, calibration=lambda model: model(input))
        for routed in (some, model):
            torch.testing.assert_close(routed(input), expected, rtol=1e-4, atol=1e-4)
        assert report.total().output_error < 1e-5 * report.total().output_norm
        torch.save(model, tmp_path / "model.pt")
        assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(input), model(input))
    assert torch.backends.mha.get_fastpath_enabled()


def test_blocks_are_adapted_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, input = made("BART")
    convert(model)
    expected, saved = output(model, input), copy.deepcopy(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted = output(model, input)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(saved, tmp_path)
    torch.testing.assert_close(output(loaded, input), adapted)
    torch.testing.assert_close(output(loaded.merge_and_unload(), input), adapted, rtol=1e-4, atol=1e-4)


def test_functions_are_activations_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.functional.relu

        def forward(self, input: Tensor) -> Tensor:
            return self.two(self.act(self.one(input)))

    model, input = nn.Sequential(Plain()), torch.randn(5, 8)
    expected = model(input)
    convert(model, top_k=4)
    torch.testing.assert_close(model(input), expected)
    with pytest.raises(ValueError, match="expected a model with feed-forward layers in it, got Plain with none$"):
        convert(Plain().requires_grad_(False).apply(lambda module: setattr(module, "act", torch.tanh)))


def test_report_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model, input = sequential()
    report = route_ffn_(model, top_k=1, lora_rank=2, calibration=lambda model: model(input))
    lines = str(report).splitlines()
    assert lines[1].split()[:7] == ["0", "16", "x", "64", "1", "of", "4"] and lines[-1].startswith("2 layers")
    assert "16 x 64" in capsys.readouterr().out
    assert report.rows()[0][:4] == ["0", "gelu", "16 x 64", "1 of 4"]
    first, second = report.layers
    assert (first.weights, first.computed) == (2 * 16 * 64, 2 * 16 * 16)
    assert first.trained == 16 * 4 + 4 + 2 * 2 * (16 + 64) and 0.25 <= first.busiest <= 1
    assert report.total().weights == first.weights + second.weights
