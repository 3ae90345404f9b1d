"""Factored models in transformers' and accelerate's files."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchops
from torchops.nn import STFLinear, factorize_, restore_factored_

transformers = pytest.importorskip("transformers")

from torchops.integrations import transformers_stf  # noqa: E402
from torchops.integrations.transformers_stf import STFConfig, keep_factored  # noqa: E402

FORMS = ["factored", "straight_through", "pack"]
EACH_FORM = pytest.mark.parametrize("form", FORMS)
SIZE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TOKENS = torch.arange(12).view(2, 6)


def bert() -> Any:
    """With a head whose weight is the embedding's."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZE)).eval()


def factored_bert(form: str, model: Any = None) -> Any:
    model = model or bert()
    factorize_(model, 1.5, skip=["cls.predictions.decoder"], num_iterations=1, verbose=False)
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            getattr(layer, form)()
    return model


def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits


def same_state(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = keep_factored(factored_bert(form, bert().to(dtype)))
    model.save_pretrained(tmp_path)
    loaded, info = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same_state(loaded, model) and torch.equal(logits(loaded), logits(model))
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    # Saved again in another form, after casting.
    for layer in loaded.modules():
        if isinstance(layer, STFLinear):
            layer.factored()
    loaded.double().save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again")
    assert same_state(again, loaded) and torch.equal(logits(again), logits(loaded))
    assert all(layer.form() == "factored" for layer in again.modules() if isinstance(layer, STFLinear))


def test_the_configuration_says_what_was_factored(tmp_path: Path) -> None:
    keep_factored(factored_bert("pack")).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "torchops_stf"
    layer = written["layers"]["bert.encoder.layer.0.intermediate.dense"]
    assert layer["form"] == "packed" and layer["bias"] and (layer["in_features"], layer["out_features"]) == (32, 64)
    assert "cls.predictions.decoder" not in written["layers"]


def test_a_dense_model_is_factored_as_it_is_loaded(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "dense")
    config = STFConfig(compression=1.5, skip=["cls.predictions.decoder"])
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert isinstance(loaded.bert.pooler if loaded.bert.pooler else loaded.cls.predictions.transform.dense, STFLinear)
    difference = logits(loaded) - logits(model)
    assert difference.norm() < 0.5 * logits(model).norm()
    loaded.save_pretrained(tmp_path / "factored")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "factored")
    assert same_state(again, loaded) and torch.equal(logits(again), logits(loaded))


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    keep_factored(factored_bert("straight_through")).save_pretrained(tmp_path)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path).train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tensors_of_another_layer_are_refused(tmp_path: Path) -> None:
    model = keep_factored(factored_bert("straight_through"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["bert.encoder.layer.0.output.dense"]["nnz"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected the state of a layer with"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)


def test_what_cannot_be_kept() -> None:
    with pytest.raises(TypeError, match="keep_factored: expected model to be one of transformers, got a Sequential"):
        keep_factored(nn.Sequential(STFLinear(4, 4, 2, 1)))
    with pytest.raises(ValueError, match="expected a model with factored layers, got BertForMaskedLM with none"):
        keep_factored(bert())


@EACH_FORM
@pytest.mark.parametrize("place", ["cpu", "disk", "offloaded"])
def test_accelerate_fills_layers_on_the_meta_device(form: str, place: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    factorize_(model, 1.5, num_iterations=1, verbose=False)
    for layer in (model[0], model[2]):
        getattr(layer, form)()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        empty = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    restore_factored_(empty, safetensors.load_file(tmp_path / "model.safetensors"), load=False)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    options: dict[str, Any] = {"device_map": {"0": "cpu", "1": "cpu", "2": "disk" if place == "disk" else "cpu"}}
    if place == "disk":
        options |= {"offload_folder": tmp_path / "offloaded", "offload_buffers": True}
    filled = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), **options)
    if place == "offloaded":
        filled = accelerate.cpu_offload(filled, offload_buffers=True)
    input = torch.randn(5, 32)
    assert torch.equal(filled(input), model(input))


@EACH_FORM
def test_t5_reads_the_weight(form: str) -> None:
    size = {"vocab_size": 20, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    dense = transformers.T5Model(transformers.T5Config(**size)).eval()
    model = transformers.T5Model(dense.config).eval()
    model.load_state_dict(dense.state_dict())
    factorize_(model, 1.5, num_iterations=1, verbose=False)
    for name, layer in model.named_modules():
        if isinstance(layer, STFLinear):
            dense.get_submodule(name).weight.data = getattr(layer, form)().dense_weight()
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).last_hidden_state, dense(**inputs).last_hidden_state)


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(transformers_stf, extraglobs={"torch": torch, "torchops": torchops})
    assert result.failed == 0 and result.attempted > 5
