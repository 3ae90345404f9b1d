"""Models with routed feed-forward layers in transformers' files."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_models import convert, made, output, routed_layers
from torch import nn

import torchops
from torchops.nn import RoutedFFN, Router, balance_loss, factorize_

transformers = pytest.importorskip("transformers")

from torchops.integrations import transformers_routed_ffn  # noqa: E402
from torchops.integrations.transformers_routed_ffn import RoutedFFNConfig, keep_routed  # noqa: E402

# Two modules, one, one with a gate, blocks of which some stand in several places.
NAMES = ["BERT", "GPT-2", "Llama", "T5", "BART", "ALBERT"]


def kept(name: str, **options: Any) -> tuple[Any, torch.Tensor]:
    model, input = made(name)
    convert(model, calibration=lambda model: model(input), **options)
    return keep_routed(model), input


def saved_and_loaded(model: Any, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return loaded


def same_state(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_comes_back(name: str, tmp_path: Path) -> None:
    model, input = kept(name)
    expected = output(model, input)
    loaded = saved_and_loaded(model, tmp_path)
    assert same_state(loaded, model) and torch.equal(output(loaded, input), expected)
    assert list(map(str, loaded.modules())) == list(map(str, model.modules()))
    # Saved again with a setting that has changed.
    for layer in routed_layers(loaded).values():
        layer.router.top_k = 3
    again = saved_and_loaded(loaded, tmp_path / "again")
    assert torch.equal(output(again, input), output(loaded, input))
    assert not torch.equal(output(again, input), expected)


SETTINGS = [{"lora_rank": 2, "gate_at": "both", "lora_scale": 0.5}, {"recompute": True}]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_settings_come_back_and_a_loaded_model_trains(options: dict[str, Any], tmp_path: Path) -> None:
    model, input = kept("BART", **options)
    loaded = saved_and_loaded(model, tmp_path).train()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == names
    for layer, other in zip(routed_layers(loaded).values(), routed_layers(model).values(), strict=True):
        for setting in ("activation", "gate_at", "lora_scale", "recompute"):
            assert getattr(layer, setting) == getattr(other, setting)
    (output(loaded, input).square().mean() + balance_loss(loaded)).backward()
    assert all(layer.router.weight.grad.any() for layer in routed_layers(loaded).values())


def test_routers_keep_their_balance_in_float32(tmp_path: Path) -> None:
    model, input = kept("BERT")
    model.bfloat16()
    for layer in routed_layers(model).values():
        layer.router.update_balance(layer.router(torch.randn(9, 32))[0], rate=1e-3)
        assert layer.router.balance_bias.bfloat16().float().ne(layer.router.balance_bias).any()
    loaded = saved_and_loaded(model, tmp_path)
    assert same_state(loaded, model) and torch.equal(output(loaded, input), output(model, input))


def test_layers_without_biases_come_back(tmp_path: Path) -> None:
    model, input = kept("Llama")
    assert all(layer.b1 is None and layer.b2 is None for layer in routed_layers(model).values())
    assert same_state(saved_and_loaded(model, tmp_path), model)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "torchops_routed_ffn"
    assert written["layers"]["model.layers.0.mlp"]["biases"] == []


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_body_is_loaded_without_its_head_and_with_one(tmp_path: Path) -> None:
    config = made("BERT")[0].config
    model = transformers.BertForMaskedLM(config).eval()
    convert(model)
    tokens = torch.arange(8)[None]
    expected = keep_routed(model).bert(tokens).last_hidden_state
    body = transformers.BertModel.from_pretrained(saved(model, tmp_path / "whole"))
    assert torch.equal(body(tokens).last_hidden_state, expected)
    headed = transformers.BertForMaskedLM.from_pretrained(saved(body, tmp_path / "body"))
    assert torch.equal(headed.bert(tokens).last_hidden_state, expected)


def test_a_dense_model_is_routed_as_it_is_loaded(tmp_path: Path) -> None:
    model, input = made("BERT")
    config = RoutedFFNConfig(num_blocks=8, top_k=8, skip=["encoder.layer.1"])
    loaded = transformers.BertModel.from_pretrained(saved(model, tmp_path), quantization_config=config)
    assert [layer.router.num_blocks for layer in routed_layers(loaded).values()] == [8]
    torch.testing.assert_close(output(loaded, input), output(model, input), rtol=1e-4, atol=1e-4)
    assert torch.equal(output(saved_and_loaded(loaded, tmp_path / "routed"), input), output(loaded, input))


@pytest.mark.parametrize("attention_first", [False, True])
def test_attention_may_be_converted_too(attention_first: bool, tmp_path: Path) -> None:
    """Both halves of SPT."""
    from torchops.integrations.transformers_sparse_attention import apply_sparse_attention

    model, input = made("Llama")

    def convert_attention() -> None:
        apply_sparse_attention(model, keep=4, calibration=lambda model: model(input))

    if attention_first:
        convert_attention()
    convert(model)
    keep_routed(model)
    if not attention_first:
        convert_attention()
    assert torch.equal(output(saved_and_loaded(model, tmp_path), input), output(model, input))


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="keep_routed: expected model to be one of transformers, got a Sequential"):
        keep_routed(nn.Sequential(RoutedFFN(4, 8)))
    with pytest.raises(ValueError, match="expected a model with routed layers, got BertModel with none"):
        keep_routed(made("BERT")[0])
    model, _ = kept("BERT")
    routed = routed_layers(model)["encoder.layer.0.intermediate.dense"]
    routed.router = type("Other", (Router,), {})(32, 4)
    with pytest.raises(ValueError, match="expected router to be a Router to describe the layer, got Other"):
        keep_routed(model)
    model, _ = kept("BERT")
    factorize_(model, 1.5, num_iterations=1, verbose=False)
    from torchops.integrations.transformers_stf import keep_factored

    with pytest.raises(ValueError, match="keep_factored: expected .* room for factored .* got .* torchops_routed_ffn"):
        keep_factored(model)


@pytest.mark.parametrize(("change", "message"), [(("hidden_dim", 128), "32 x 128, got 32 x 64"), (None, "got none")])
def test_layers_of_another_model_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    model, _ = kept("BERT")
    file = saved(model, tmp_path) / "config.json"
    config = json.loads(file.read_text())
    layers = config["quantization_config"]["layers"]
    if change:
        layers["encoder.layer.0.intermediate.dense"][change[0]] = change[1]
    else:
        layers["encoder.layer.0"] = layers.pop("encoder.layer.0.intermediate.dense")
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"expected a model with a feed-forward layer encoder.layer.0.* {message}"):
        transformers.BertModel.from_pretrained(tmp_path)


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(transformers_routed_ffn, extraglobs={"torch": torch, "torchops": torchops})
    assert result.failed == 0 and result.attempted > 5
