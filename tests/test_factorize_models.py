"""Models as people have them: a factored one is used as before, or the conversion says by name what is against it."""

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from torchops.nn import STFLinear, factorize_


def convert(model: nn.Module, **options: Any) -> Any:
    return factorize_(model, **{"compression": 1.5, "num_iterations": 1, "verbose": False} | options)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


def refused(model: nn.Module, message: str, **options: Any) -> list[str]:
    """The skip that the refusal names. The model is then as it was."""
    modules = list(model.modules())
    state = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    modes = [module.training for module in modules]
    with pytest.raises(ValueError, match=message) as error:
        convert(model, **options)
    assert list(model.modules()) == modules and [module.training for module in modules] == modes
    if not any(tensor.is_meta for tensor in state.values()):
        assert all(torch.equal(bits(tensor), state[name]) for name, tensor in model.state_dict().items())
    skip = re.search(r"skip=(\[.*?\])", str(error.value))
    return re.findall("'(.*?)'", skip[1]) if skip else []


# ---- what stays as it was -----------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.bias"], ["0.weight", "0.bias"], []], ids=str)
def test_what_is_frozen_stays_frozen(frozen: list[str]) -> None:
    model = two_layers()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    convert(model)
    layer = model[0]
    assert layer.basis.requires_grad == layer.values.requires_grad == ("0.weight" not in frozen)
    assert layer.bias.requires_grad == ("0.bias" not in frozen)
    assert all(parameter.requires_grad for parameter in model[2].parameters())


def test_mode_dtype_and_attributes_stay() -> None:
    model = two_layers().to(torch.bfloat16)
    model[0].eval()
    model[0].group = "first"
    convert(model)
    assert not model[0].training and model[2].training and model[0].group == "first"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_random_generator_is_not_drawn_from() -> None:
    model, before = two_layers(), torch.get_rng_state()
    convert(model, calibration=lambda given: given(torch.ones(3, 16)))
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_stay_and_their_handles_remove_them() -> None:
    model, called = two_layers(), []
    handles = [
        model[0].register_forward_pre_hook(lambda layer, inputs: called.append("before")),
        model[0].register_forward_hook(
            lambda layer, inputs, named, output: called.append("after"), with_kwargs=True, always_call=True
        ),
        model[0].register_full_backward_hook(lambda layer, gradients, outputs: called.append("backward")),
        model[0].register_full_backward_pre_hook(lambda layer, gradients: called.append("before backward")),
    ]
    convert(model)
    model(torch.randn(3, 16)).sum().backward()
    assert called == ["before", "after", "before backward", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.randn(3, 16)).sum().backward()
    assert len(called) == 4


def test_tied_biases_stay_tied() -> None:
    model = two_layers()
    model.append(nn.Linear(16, 32))
    model[3].bias = model[0].bias
    bias = model[0].bias
    convert(model)
    assert model[0].bias is bias and model[3].bias is bias


@pytest.mark.parametrize("skipped", ["first", "second"])
def test_a_layer_with_two_names_stays_one_layer_when_one_is_skipped(skipped: str) -> None:
    layer = nn.Linear(16, 32)
    model = nn.ModuleDict({"first": layer, "second": layer, "other": nn.Linear(16, 32)})
    convert(model, skip=[skipped])
    assert model["first"] is layer and model["second"] is layer and isinstance(model["other"], STFLinear)


def test_a_factored_model_copies_saves_moves_freezes_and_trains() -> None:
    model, input = two_layers(), torch.randn(5, 16)
    convert(model)
    expected = model(input)
    assert torch.equal(copy.deepcopy(model)(input), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(input), expected)
    torch.testing.assert_close(copy.deepcopy(model).double()(input.double()), expected.double())
    assert copy.deepcopy(model).to("meta")(input.to("meta")).shape == expected.shape
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(input), expected)
    assert not any(parameter.requires_grad for parameter in model.requires_grad_(False).parameters())


def test_conversion_does_not_depend_on_modes_around_it() -> None:
    model, input = two_layers(), torch.randn(50, 16)
    others = [copy.deepcopy(model) for _ in range(2)]
    convert(model, calibration=lambda given: given(input))
    with torch.autocast("cpu", torch.bfloat16):
        # What the model computes is rounded then, what is summed up of the first layer's inputs is not.
        convert(others[0], calibration=lambda given: given(input))
    with torch.inference_mode():
        convert(others[1], calibration=lambda given: given(input))
    for other in others:
        assert torch.equal(other[0].basis, model[0].basis) and torch.equal(other[0].values, model[0].values)
    others[1](input).sum().backward()


# ---- layers that stay dense ---------------------------------------------------------------------


def test_shared_weights_stay_dense_and_stand_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(100, 32), "up": nn.Linear(32, 64), "head": nn.Linear(32, 100)})
    model["head"].weight = model["embedding"].weight
    report = convert(model)
    assert model["head"].weight is model["embedding"].weight and isinstance(model["up"], STFLinear)
    assert report.left == [("head", "its weight is that of embedding, too")]
    assert str(report).splitlines()[-1] == "left dense: head (its weight is that of embedding, too)"
    model["up"] = nn.Linear(32, 64)
    convert(model, verbose=True)
    assert "left dense: head" in capsys.readouterr().out


def test_weights_that_share_memory_are_shared() -> None:
    model = nn.Sequential(*[nn.Linear(16, 32) for _ in range(3)])
    model[1].weight.data = model[0].weight.data
    assert [name for name, _ in convert(model).left] == ["0", "1"]


def test_subclasses_stay_dense_and_stand_in_the_report() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 32))
    assert convert(model).left == [("0.out_proj", "a subclass of nn.Linear, NonDynamicallyQuantizableLinear")]


def test_a_model_of_shared_weights_alone_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(16, 32))
    model[1].weight = model[0].weight
    refused(model, r"with none that can be factored:\n  0: its weight is that of 1, too\n  1: ")


# ---- layers that are refused --------------------------------------------------------------------


def replace_forward(layer: nn.Linear) -> None:
    layer.forward = lambda rows: nn.functional.linear(rows, layer.weight)


class Wrapped(Tensor):
    """A tensor that is not a plain one, as those of quantized weights are."""


SPOILED: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "spectral_norm": (spectral_norm, "a hook computes its weight or bias"),
    "weight_norm": (weight_norm, "a hook computes its weight or bias"),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "a hook computes its weight or bias"),
    "pruned bias": (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "a hook computes its weight or bias"),
    "parametrize": (parametrizations.spectral_norm, "torch.nn.utils.parametrize computes its weight"),
    "orthogonal": (parametrizations.orthogonal, "torch.nn.utils.parametrize computes its weight"),
    "forward": (replace_forward, "its forward was replaced"),
    "buffer": (lambda layer: layer.register_buffer("scale", torch.ones(1)), "more than weight and bias: scale"),
    "hook on the weight": (lambda layer: layer.weight.register_hook(lambda gradient: gradient), "its weight has hooks"),
    "hook after its gradient": (
        lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda weight: None),
        "its weight has hooks",
    ),
    "hook on its state": (lambda layer: layer.register_state_dict_post_hook(lambda *state: None), "hooks on its state"),
    "meta": (lambda layer: layer.to("meta"), "on the meta device: load the weights first"),
    "subclass": (
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().as_subclass(Wrapped))),
        "its weight is a Wrapped, no plain tensor",
    ),
    "dtype": (lambda layer: layer.to(torch.float8_e4m3fn), "its weight is float8_e4m3fn"),
    "NaN": (lambda layer: layer.weight.data.fill_(torch.nan), "expected weight .*NaN"),
}


@pytest.mark.parametrize("spoil, message", SPOILED.values(), ids=SPOILED)
def test_layers_that_cannot_be_factored_are_named(spoil: Callable[[nn.Linear], Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 16)))
    spoil(model[1][0])
    skip = refused(model, rf"^factorize_: (.|\n)*\b1\.0\b.*: .*{message}")
    convert(model, skip=skip)
    assert isinstance(model[0], STFLinear) and not isinstance(model[1][0], STFLinear)


def test_a_layer_in_a_plain_list_is_refused() -> None:
    model = two_layers()
    model.order = {"first": [model[0]]}
    assert refused(model, "0: the plain dict order holds it, too") == ["0"]
    model.order = [model]  # whose layers are replaced there, too
    convert(model)


@pytest.mark.parametrize("inside", [False, True])
def test_a_wrapped_model_is_refused(inside: bool) -> None:
    wrapped = nn.DataParallel(two_layers())
    refused(nn.Sequential(wrapped) if inside else wrapped, "factored before it is wrapped, got DataParallel")


def test_the_skip_that_an_error_names_is_short() -> None:
    blocks = [nn.ModuleDict({"up": nn.Linear(16, 32), "gate": nn.Linear(16, 1)}) for _ in range(3)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(32, 2), "last": nn.Linear(32, 1)})
    assert refused(model, r"blocks.0.gate: .*\n  blocks.1.gate: ", skip=["last"]) == ["blocks.*.gate", "head"]
    model.blocks[1]["gate"] = nn.Linear(16, 32)
    assert refused(model, "blocks.0.gate") == ["blocks.0.gate", "blocks.2.gate", "head", "last"]


def test_skip_names_modules_around_layers() -> None:
    model = nn.ModuleDict({"encoder": two_layers(), "decoder": two_layers()})
    convert(model, skip=["enc*er"])
    assert isinstance(model["encoder"][0], nn.Linear) and isinstance(model["decoder"][0], STFLinear)


# ---- calibration --------------------------------------------------------------------------------


def test_calibration_with_nan_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)))
    hidden = torch.randn(5, 16)
    hidden[2, 3] = torch.nan

    def run(given: nn.Sequential) -> None:
        given[1][0](given[0](torch.randn(5, 16)))
        given[1][1](hidden)

    refused(model, "factorize_: 1.1 cannot be factored .*: .*calibration of finite numbers", calibration=run)


def test_calibrated_sparse_factor_on_the_input_is_that_of_the_whole_gram_matrix() -> None:
    linear, inputs = nn.Linear(64, 32), torch.randn(200, 64) * torch.logspace(0, -2, 64)
    model = nn.Sequential(copy.deepcopy(linear))
    convert(model, calibration=lambda given: given(inputs))
    layer = STFLinear.from_linear(linear, 1.5, calibration=inputs, num_iterations=1)
    assert layer.sparse_side == "input"
    assert torch.equal(model[0].dense_weight(), layer.dense_weight())


# ---- modules that read the weight ---------------------------------------------------------------


def test_a_transformer_encoder_computes_in_both_modes() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), 2)
    input = torch.randn(2, 5, 32)
    convert(model)
    expected = model(input)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input), expected)
