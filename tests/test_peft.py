"""LoRA adapters on factored layers."""

import doctest
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import torchops
from torchops.nn import STFLinear, factorize_

peft = pytest.importorskip("peft")

import transformers  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers  # noqa: E402

from torchops.integrations.peft import LoraSTFLinear, linear_names, register_stf_linear  # noqa: E402


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(STFLinear(8, 20, 6, 3), nn.ReLU(), STFLinear(20, 8, 6, 3, sparse_side="input"))


def config(**options) -> "peft.LoraConfig":
    return register_stf_linear(peft.LoraConfig(r=2, target_modules=["0", "2"], **options))


def train(adapted: nn.Module, input: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input).square().sum().backward()
        optimizer.step()


def test_only_adapters_train() -> None:
    base, input = model(), torch.randn(4, 8)
    expected = base(input)
    adapted = peft.get_peft_model(base, config())
    torch.testing.assert_close(adapted(input), expected)  # adapters start at zero
    factors = {name: p.clone() for name, p in adapted.named_parameters() if "lora" not in name}
    assert {name.rsplit(".", 1)[1] for name in factors} == {"basis", "values", "bias"}
    train(adapted, input)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            assert parameter.grad.any(), name
        else:
            assert torch.equal(parameter, factors[name]), name
    assert not torch.allclose(adapted(input), expected)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(input), expected)


def test_output_is_that_of_layer_and_adapter() -> None:
    layer, input = STFLinear(8, 20, 6, 3), torch.randn(4, 8)
    adapted = LoraSTFLinear(layer, "default", config(init_lora_weights=False), r=2, lora_alpha=3)
    weight = layer.dense_weight() + adapted.get_delta_weight("default")
    torch.testing.assert_close(adapted(input), nn.functional.linear(input, weight, layer.bias))


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    input = torch.randn(4, 8)
    adapted = peft.get_peft_model(model(), config())
    train(adapted, input)
    adapted.save_pretrained(tmp_path)
    loaded_config = register_stf_linear(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path, config=loaded_config)
    assert torch.equal(loaded(input), adapted(input))


def test_merging_is_refused_and_unloading_is_not() -> None:
    base, input = model(), torch.randn(4, 8)
    expected = base(input)
    adapted = peft.get_peft_model(base, config())
    train(adapted, input)
    with pytest.raises(ValueError, match="cannot be merged into the factors"):
        adapted.merge_adapter()
    with pytest.raises(ValueError, match="cannot be merged into the factors"):
        adapted.merge_and_unload()
    plain = adapted.unload()
    assert isinstance(plain[0], STFLinear) and torch.equal(plain(input), expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_variants_that_look_at_the_weight_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="unsupported variant|for a factored layer has no weight"):
        peft.get_peft_model(model(), config(**options))


def test_packed_layers_are_refused() -> None:
    base = model()
    base[2].pack()
    with pytest.raises(ValueError, match="got a packed one: call its factored"):
        peft.get_peft_model(base, config())


def test_without_registration_peft_refuses() -> None:
    with pytest.raises(ValueError, match="STFLinear"):
        peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_mixed_model_is_not_left_half_merged(merge: str) -> None:
    base, input = model(), torch.randn(4, 8)
    base.insert(0, nn.Linear(8, 8))
    adapted = peft.get_peft_model(base, register_stf_linear(peft.LoraConfig(r=2, target_modules=["0", "1", "3"])))
    train(adapted, input)
    expected, weight = adapted(input), base[0].base_layer.weight.clone()
    with pytest.raises(ValueError, match="nothing was merged, for 1, 3 cannot be"):
        getattr(adapted, merge)()
    assert torch.equal(base[0].base_layer.weight, weight) and not base[0].merged
    assert torch.equal(adapted(input), expected)


def test_merging_without_factored_layers_stays_possible() -> None:
    adapted = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"]))
    adapted.merge_adapter()
    assert adapted.base_model.model[0].merged


def test_layers_that_peft_adapts_are_not_factored() -> None:
    base = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16))
    config = peft.LoraConfig(r=8, target_modules=["0"], modules_to_save=["2"])
    adapted = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match="peft adapts base_model.model.0: factor the model first") as error:
        factorize_(adapted, 1.2, num_iterations=1, verbose=False)
    assert "base_model.model.0.lora_A.default: " in str(error.value) and "model.2.original_module: " in str(error.value)
    factorize_(adapted, 1.2, skip=["base_model.model.0", "*.2"], num_iterations=1, verbose=False)
    assert [type(layer).__name__ for layer in base] == ["Linear", "STFLinear", "ModulesToSaveWrapper"]
    adapted.merge_adapter()


# ---- which layers ---------------------------------------------------------------------------------------


def language_model() -> nn.Module:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **size))


def classifier() -> nn.Module:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=11, num_labels=16, **size))


def gpt() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=11))


@pytest.mark.parametrize(
    ("make", "task_type"), [(language_model, "CAUSAL_LM"), (classifier, "SEQ_CLS"), (classifier, None), (gpt, None)]
)
def test_linear_names_are_peft_s_all_linear(make: Callable[[], nn.Module], task_type: str | None) -> None:
    """Of the dense model and of the factored one, with an adapter and without; peft itself sees the dense one only."""
    dense, factored = make(), make()
    names = linear_names(dense, task_type)
    expected = _maybe_include_all_linear_layers(
        peft.LoraConfig(target_modules="all-linear", task_type=task_type), dense
    ).target_modules
    assert set(names) == set(expected) and len(names) == len(expected)

    factorize_(factored, 1.2, num_iterations=1, verbose=False)
    assert linear_names(factored, task_type) == names
    assert any(isinstance(factored.get_submodule(name), STFLinear) for name in names)
    config = register_stf_linear(peft.LoraConfig(r=2, target_modules=names, task_type=task_type))
    adapted = peft.get_peft_model(factored, config)
    assert linear_names(adapted.base_model.model, task_type) == names
    for name in names:
        assert isinstance(adapted.base_model.model.get_submodule(name), BaseTunerLayer), name


def test_examples() -> None:
    module = importlib.import_module("torchops.integrations.peft")
    assert doctest.testmod(module, extraglobs={"nn": nn, "torchops": torchops}).failed == 0
