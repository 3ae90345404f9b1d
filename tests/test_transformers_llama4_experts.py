"""Llama 4's experts on torchops.routed_ffn."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", exc_type=ImportError)

from torchops.integrations import transformers_llama4_experts as integration  # noqa: E402
from torchops.integrations.transformers import apply_routed_experts  # noqa: E402
from torchops.ops.routed_ffn import routed_ffn  # noqa: E402

SIZE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 8}
SIZE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": None}
SIZE |= {"num_local_experts": 4, "num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": None}
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**SIZE | options)
    model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager").double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def results(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(TOKENS).logits
    logits.square().mean().backward()
    return logits, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def counted(*tensors: Any, **options: Any) -> Tensor:
        seen.append(options | {"index": tensors[1], "w1": tensors[3], "w2": tensors[4]})
        return routed_ffn(*tensors, **options)

    monkeypatch.setattr(integration, "routed_ffn", counted)
    return seen


def test_they_compute_what_they_did(calls: list[dict[str, Any]]) -> None:
    model = made()
    expected = results(model)
    model = apply_routed_experts(apply_routed_experts(model))
    torch.testing.assert_close(results(model), expected, rtol=1e-6, atol=1e-10)
    assert len(calls) == 2 and all(call["index"].shape == (18, 2) and call["gate_at"] == "input" for call in calls)
    experts = model.model.layers[0].feed_forward.experts
    assert calls[0]["w1"].data_ptr() == experts.gate_up_proj.data_ptr()
    assert calls[0]["w2"].data_ptr() == experts.down_proj.data_ptr()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(results(copy.deepcopy(model.train())), expected, rtol=1e-6, atol=1e-10)


def test_they_are_saved_as_before(tmp_path: Path) -> None:
    model = apply_routed_experts(made())
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.Llama4ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded.model.layers[0].feed_forward) is not integration.RoutedLlama4Moe
    torch.testing.assert_close(apply_routed_experts(loaded)(TOKENS).logits, expected, rtol=1e-6, atol=1e-8)


def test_they_compile() -> None:
    model = apply_routed_experts(made())
    moe, tokens = model.model.layers[0].feed_forward, torch.randn(2, 5, 16).double()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), moe(tokens))


@pytest.mark.parametrize("adapter_first", [False, True])
def test_what_stands_around_experts_is_called(adapter_first: bool, calls: list[dict[str, Any]]) -> None:
    peft = pytest.importorskip("peft")
    targets = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        return model

    expected, plain = results(adapted(made())), made()(TOKENS).logits
    assert not torch.allclose(expected[0], plain, atol=1e-3)
    model = apply_routed_experts(adapted(made())) if adapter_first else adapted(apply_routed_experts(made()))
    torch.testing.assert_close(results(model), expected, rtol=1e-6, atol=1e-10)
    assert not calls


def test_hooks_and_forwards_of_experts_are_called(calls: list[dict[str, Any]]) -> None:
    model = apply_routed_experts(made())
    experts, seen = [layer.feed_forward.experts for layer in model.model.layers], []
    experts[0].register_forward_hook(lambda *_: seen.append("hook"))
    forward = experts[1].forward
    experts[1].forward = lambda rows: (seen.append("forward"), forward(rows))[1]
    torch.testing.assert_close(model(TOKENS).logits, made()(TOKENS).logits)
    assert seen == ["hook", "forward"] and not calls


def test_experts_that_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a model whose experts .*, got Llama4ForCausalLM"):
        apply_routed_experts(made(hidden_act="tanh"))
    model = made()
    experts = model.model.layers[1].feed_forward.experts
    experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="expected experts in floating point, got Llama4TextExperts in"):
        apply_routed_experts(model)
    assert not any(isinstance(module, integration.RoutedLlama4Moe) for module in model.modules())
