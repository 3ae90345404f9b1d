"""LoRA adapters on factored layers."""

from pathlib import Path

import pytest
import torch
from torch import nn

from torchops.nn import STFLinear

peft = pytest.importorskip("peft")

from torchops.integrations.peft import LoraSTFLinear, register_stf_linear  # noqa: E402


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
