"""torchops.nn.route_ffn_: models whose feed-forward layers are routed, or that say by name what is against it."""

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from torchops.nn import RoutedFFN, balance_loss, route_ffn_
from torchops.nn._activations import Activation, Gate, activation_of, gate_of

TOKENS = torch.arange(24).view(2, 12)
SIZE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SWIN = {"image_size": 32, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}
T5 = {"vocab_size": 40, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}


def sequential() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(16, 64), nn.Dropout(0.1), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16)]
    return nn.Sequential(*layers, nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(100, 16)


def hugging_face(model: str, config: str, **options: Any) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, config)(**options)
    return getattr(transformers, model)(config), torch.randn(2, 3, 32, 32) if "image_size" in options else TOKENS


def vision_transformer() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 5}
    return timm.models.VisionTransformer(**options), torch.randn(2, 3, 32, 32)


def gpt2() -> tuple[nn.Module, Tensor]:
    ids = {"bos_token_id": None, "eos_token_id": None}
    return hugging_face("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_head=2, n_layer=2, vocab_size=40, **ids)


# Models with what they are given, and the names of their routed layers.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], list[str]]] = {
    "Sequential": (sequential, ["0", "5"]),
    "BERT": (
        lambda: hugging_face("BertModel", "BertConfig", **SIZE),
        ["encoder.layer.0.intermediate.dense", "encoder.layer.1.intermediate.dense"],
    ),
    "Swin": (
        lambda: hugging_face("DonutSwinModel", "DonutSwinConfig", **SWIN),
        ["encoder.layers.0.blocks.0.intermediate.dense"],
    ),
    "Bloom": (
        lambda: hugging_face("BloomModel", "BloomConfig", vocab_size=40, hidden_size=32, n_layer=1, n_head=2),
        ["h.0.mlp.dense_h_to_4h"],
    ),
    "GPT-2": (gpt2, ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]),
    "Llama": (
        lambda: hugging_face("LlamaForCausalLM", "LlamaConfig", **SIZE),
        ["model.layers.0.mlp", "model.layers.1.mlp"],
    ),
    "T5": (
        lambda: hugging_face("T5EncoderModel", "T5Config", **T5),
        ["encoder.block.0.layer.1.DenseReluDense.wi"],
    ),
    "gated T5": (
        lambda: hugging_face("T5EncoderModel", "T5Config", **T5, dropout_rate=0.0, feed_forward_proj="gated-gelu"),
        ["encoder.block.0.layer.1.DenseReluDense"],
    ),
    "timm": (vision_transformer, ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def convert(model: nn.Module, **options: Any) -> Any:
    return route_ffn_(model, **{"verbose": False} | options)


def made(name: str) -> tuple[nn.Module, Tensor]:
    model, input = MODELS[name][0]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # their own start is so small that nearly nothing depends on anything
    return model.eval(), input


def output(model: nn.Module, input: Tensor) -> Tensor:
    result = model(input)
    return result if isinstance(result, Tensor) else result[0]


def routed_layers(model: nn.Module) -> dict[str, RoutedFFN]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedFFN)}


# ---- converted models ---------------------------------------------------------------------------------


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
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    (output(model, input).float().square().mean() + balance_loss(model)).backward()
    for layer in routed_layers(model).values():
        assert layer.training
        for parameter_name, parameter in layer.named_parameters():
            frozen = bool(lora_rank) and not parameter_name.startswith(("lora", "router"))
            assert (parameter.grad is None) == frozen, parameter_name
            assert frozen or parameter_name in ("lora_a1", "lora_a2", "lora_b1") or parameter.grad.any()


@pytest.mark.parametrize("name", ["Sequential", "timm"])
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
    assert lines[1].split()[:8] == ["0", "gelu", "16", "x", "64", "1", "of", "4"] and lines[-1].startswith("2 layers")
    assert "gelu" in capsys.readouterr().out
    first, second = report.layers
    assert (first.weights, first.computed) == (2 * 16 * 64, 2 * 16 * 16)
    assert first.trained == 16 * 4 + 4 + 2 * 2 * (16 + 64) and 0.25 <= first.busiest <= 1
    assert report.total().weights == first.weights + second.weights


# ---- layers that stay dense ---------------------------------------------------------------------------


def test_what_stays_dense_stands_in_the_report() -> None:
    class Subclass(nn.Linear):
        pass

    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2, self.norm = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8)

    model, _ = sequential()
    model.append(nn.Sequential(Subclass(16, 32), nn.ReLU(), nn.Linear(32, 16)))
    model.append(nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)))
    model.append(Squeeze())
    tied = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    tied[0].weight = model[5].weight
    model.append(tied)
    model.append(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)))
    model.append(nn.Sequential(model[12][0], nn.GELU(), nn.Linear(32, 16)))
    assert convert(model).left == [
        ("5", "the first layer: its weight is that of 11.0, too"),
        ("8.0", "the first layer: a subclass of nn.Linear, Subclass"),
        ("9.0", "fewer hidden units (4) than features (16)"),
        ("10.fc1", "Squeeze holds more than that: norm"),
        ("11.0", "the first layer: its weight is that of 5, too"),
        ("12.0", "the first layer: it stands in another module, too"),
        ("13.0", "the first layer: it stands in another module, too"),
    ]


def test_skip_names_layers_and_modules_around_them() -> None:
    model, _ = sequential()
    convert(model, skip=["0"])
    assert isinstance(model[0], nn.Linear) and isinstance(model[5], RoutedFFN)
    with pytest.raises(ValueError, match="expected skip to name feed-forward layers of the model, got 'nothing'"):
        convert(sequential()[0], skip=["nothing"])
    with pytest.raises(ValueError, match="expected a model with .*, got Sequential with none that skip leaves"):
        convert(nn.Sequential(sequential()[0]), skip=["0"])


# ---- layers that are refused --------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def refused(model: nn.Module, message: str, **options: Any) -> list[str]:
    """The skip that the refusal names. The model is then as it was."""
    modules, modes = list(model.modules()), [module.training for module in model.modules()]
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        convert(model, **options)
    assert list(model.modules()) == modules and [module.training for module in modules] == modes
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(bits(tensor), bits(state[name]))
    skip = re.search(r"skip=(\[.*?\])", str(error.value))
    return re.findall("'(.*?)'", skip[1]) if skip else []


def replace_forward(layer: nn.Linear) -> None:
    layer.forward = lambda rows: nn.functional.linear(rows, layer.weight)


SPOILED: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "spectral_norm": (spectral_norm, "a hook computes its weight or bias"),
    "parametrize": (parametrizations.spectral_norm, "torch.nn.utils.parametrize computes its weight"),
    "forward": (replace_forward, "its forward was replaced"),
    "hook": (
        lambda layer: layer.register_forward_hook(lambda *_: None),
        "it has hooks, which would see something else",
    ),
    "meta": (lambda layer: layer.to("meta"), "on the meta device: load the weights first"),
    "dtype": (lambda layer: layer.to(torch.float8_e4m3fn), "its weight is float8_e4m3fn"),
    "another dtype": (lambda layer: layer.double(), "its layers have several devices or dtypes"),
    "NaN": (lambda layer: layer.weight.data.fill_(torch.nan), "the model computes something else here"),
}


@pytest.mark.parametrize("part", [5, 7])
@pytest.mark.parametrize("spoil, message", SPOILED.values(), ids=SPOILED)
def test_layers_that_cannot_be_routed_are_named(spoil: Callable[[nn.Linear], Any], message: str, part: int) -> None:
    model, _ = sequential()
    spoil(model[part])
    skip = refused(model, rf"^route_ffn_: expected layers that can be routed(.|\n)* 5: .*{message}")
    assert skip == ["5"]
    convert(model, skip=skip)
    assert isinstance(model[0], RoutedFFN) and not isinstance(model[5], RoutedFFN)


def test_a_module_that_computes_something_else_is_refused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)

        def forward(self, input: Tensor) -> Tensor:
            return input * self.fc2(self.act(self.fc1(input)) ** 2)

    class Reads(Residual):
        def forward(self, input: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(input.to(self.fc2.weight.dtype))))

    model = nn.Sequential(Residual(), sequential()[0])
    assert refused(model, "0.fc1: the model computes something else here than a feed-forward layer") == ["*.fc1"]
    model = nn.Sequential(Reads(), sequential()[0])
    refused(model, "0.fc1: the model does not compute with a routed layer in its place: AttributeError")


def test_sizes_and_settings_that_are_refused() -> None:
    model, input = sequential()
    refused(model, "5: 64 blocks do not divide its 32 hidden units", num_blocks=64)
    refused(model, "route_ffn_: expected top_k in 1..num_blocks = 4, got 5", top_k=5)
    refused(model, "expected calibration to run every layer to route, got none of 0, 5", calibration=lambda model: None)
    refused(model, "0: RoutedFFN.from_mlp: .*finite", calibration=lambda model: model(input * torch.nan))
    refused(nn.DataParallel(model), "expected a model that is routed before it is wrapped, got DataParallel")
    model.order = [model[5]]
    assert refused(model, "5: the plain list order holds it, too") == ["5"]


def test_gated_modules_that_are_refused() -> None:
    model, _ = made("Llama")
    refused(model.model.layers[0].mlp, "expected a model with feed-forward layers in it, got LlamaMLP with none")
    model.order = [model.model.layers[0].mlp]
    assert refused(model, "layers.0.mlp: the plain list order holds it, too") == ["model.layers.0.mlp"]
    del model.order
    model.model.layers[0].mlp.drop = nn.Dropout(0.1)
    assert refused(model, "layers.0.mlp: its dropout would be lost: set p to 0") == ["model.layers.0.mlp"]


def test_adapted_layers_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made("Llama")[0], peft.LoraConfig(target_modules=["up_proj"]))
    refused(model, r"layers.0.mlp: the first layer: peft adapts .*up_proj: route the model first, then adapt it")


# ---- activations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU("tanh"), Activation("gelu_tanh")),
        (nn.functional.silu, Activation("silu")),
        (lambda rows: rows * torch.sigmoid(1.702 * rows), Activation("silu", 1.702)),
        (lambda rows: rows.float().relu() ** 2, Activation("relu2")),
        (nn.ReLU6(), None),
        (nn.LeakyReLU(), None),
        (nn.Tanh(), None),
        (nn.PReLU(), None),
        (lambda rows: rows.gelu(), None),
        (lambda: None, None),
        (lambda rows: "gelu", None),
    ],
)
def test_activations_are_known_by_their_values(function: Any, expected: Activation | None) -> None:
    assert activation_of(function) == expected


def gpt_oss(pairs: Tensor, interleaved: bool) -> Tensor:
    gate, up = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def clipped_outside(pairs: Tensor) -> Tensor:
    gate, up = pairs.chunk(2, -1)
    return nn.functional.silu(gate).clamp(max=7) * up.clamp(-7, 7)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda pairs: gpt_oss(pairs, True), Gate("silu", "interleaved", 1.702, 7.0, 1.0)),
        (lambda pairs: gpt_oss(pairs, False), Gate("silu", "concat", 1.702, 7.0, 1.0)),
        (lambda pairs: nn.functional.silu(pairs.chunk(2, -1)[0]) * pairs.chunk(2, -1)[1], Gate("silu", "concat")),
        (lambda pairs: nn.functional.gelu(pairs[..., ::2]) * pairs[..., 1::2], Gate("gelu", "interleaved")),
        (lambda pairs: pairs.chunk(2, -1)[0].relu() * pairs.chunk(2, -1)[1], Gate("relu", "concat")),
        (lambda pairs: pairs.chunk(2, -1)[1].relu() * pairs.chunk(2, -1)[0], None),
        (clipped_outside, None),
        (lambda pairs: pairs, None),
    ],
)
def test_gates_are_known_by_their_values(function: Any, expected: Gate | None) -> None:
    assert gate_of(function) == expected
