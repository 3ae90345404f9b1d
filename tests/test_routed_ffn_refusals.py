"""torchops.nn.route_ffn_: layers that stay dense or are refused, by name, with what is against it."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from routed_models import convert, made, sequential
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from torchops.nn import RoutedFFN

# ---- layers that stay dense ---------------------------------------------------------------------------


def test_what_stays_dense_stands_in_the_report() -> None:
    class Subclass(nn.Linear):
        pass

    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2, self.norm = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8)

    class Between(Squeeze):
        def forward(self, input: Tensor) -> Tensor:
            return self.fc2(nn.functional.normalize(self.act(self.fc1(self.norm(input)))))

    model, _ = sequential()
    model.append(nn.Sequential(Subclass(16, 32), nn.ReLU(), nn.Linear(32, 16)))
    model.append(nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)))
    model.append(Squeeze())
    tied = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    tied[0].weight = model[5].weight
    model.append(tied)
    model.append(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)))
    model.append(nn.Sequential(model[12][0], nn.GELU(), nn.Linear(32, 16)))
    model.append(Between())
    assert convert(model).left == [
        ("5", "the first layer: its weight is that of 11.0, too"),
        ("8.0", "the first layer: a subclass of nn.Linear, Subclass"),
        ("9.0", "fewer hidden units (4) than features (16)"),
        ("10.fc1", "Squeeze holds more than that: norm, and it does not compute with tokens alone"),
        ("11.0", "the first layer: its weight is that of 5, too"),
        ("12.0", "the first layer: it stands in another module, too"),
        ("13.0", "the first layer: it stands in another module, too"),
        ("14.fc1", "Between holds more than that: norm, and computes something else between its two linear layers"),
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


def test_hooks_of_activations_are_refused() -> None:
    model, _ = sequential()
    model[6].register_forward_hook(lambda *_: None)
    assert refused(model, "5: its activation has hooks, which would see something else") == ["5"]
    model, _ = made("Llama")
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    refused(model, "layers.0.mlp: its activation has hooks, which would be lost")


def test_a_layer_that_torch_copies_wrong_is_refused() -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 64, activation=nn.GELU())
    assert copy.deepcopy(layer).activation is nn.functional.relu  # it is torch's, and no business of the conversion
    assert refused(nn.Sequential(layer), "0.linear1: torch copies such a layer with relu") == ["*.linear1"]
    # In a decoder it is a copy already.
    convert(nn.TransformerDecoder(layer, 1))


def test_adapted_layers_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made("Llama")[0], peft.LoraConfig(target_modules=["up_proj"]))
    refused(model, r"layers.0.mlp: the first layer: peft adapts .*up_proj: route the model first, then adapt it")
