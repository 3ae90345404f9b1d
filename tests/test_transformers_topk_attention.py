"""The lists that models of transformers choose themselves, against their own attention under masks."""

import copy
import doctest
from typing import Any

import pytest
import torch

import torchops

from transformers_models import (  # isort: skip  # it says why where transformers is not there
    PADDINGS,
    TOLERANCE,
    call_counter,
    generate,
    make,
    padding_mask,
    tokens,
    transformers,
)

from torchops.integrations import transformers_topk_attention  # noqa: E402
from torchops.integrations.transformers_topk_attention import apply_topk_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": None,
}
DSA = SIZE | {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 4,  # less than keys have, as in DSA's models
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
}
MINIMAX = SIZE | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "dense_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "rotary_dim": 4,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_block_size": 3,
    "index_topk_blocks": 2,
    "index_local_blocks": 1,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepseekV32": ("DeepseekV32ForCausalLM", DSA),
    "GlmMoeDsa": ("GlmMoeDsaForCausalLM", DSA),
    "MiniMaxM3VLText": ("MiniMaxM3VLForCausalLM", MINIMAX),
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def pair(name: str, padding: str = "none") -> tuple[Any, Any]:
    """The model, and a copy that hands its lists over.

    MiniMax's indexer takes padding on the left for tokens, of which every implementation makes something else: there
    the layer that chooses comes before any that attends."""
    model_name, options = MODELS[name]
    if name.startswith("MiniMax") and padding == "left":
        options = options | {"num_hidden_layers": 1, "layer_types": ["minimax_m3_sparse"]}
    model = make(name, model_name, options, "eager")
    return model, apply_topk_attention(copy.deepcopy(model))


@EACH_MODEL
@pytest.mark.parametrize("padding", PADDINGS)
def test_outputs_and_gradients(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = call_counter(monkeypatch, "transformers_topk_attention", torchops.topk_attention)
    mask, real = PADDINGS[padding], padding_mask(padding)
    results = []
    for model in pair(name, padding):
        logits = model(tokens(), attention_mask=mask).logits[real]
        logits.square().sum().backward()
        gradients = {part: weight.grad for part, weight in model.named_parameters() if weight.grad is not None}
        results.append((logits, gradients))
    expected, actual = results
    torch.testing.assert_close(actual[0], expected[0], **TOLERANCE)
    scale = max(gradient.abs().max().item() for gradient in expected[1].values())
    assert actual[1].keys() == expected[1].keys()
    for part, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][part], gradient, rtol=1e-3, atol=1e-5 * scale, msg=part)
    assert len(calls) == sum(hasattr(layer, "indexer") and layer.indexer is not None for layer in model.modules())


@EACH_MODEL
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["left", "none"])
def test_generate(name: str, cache: str, padding: str) -> None:
    expected, actual = (generate(model, cache, padding) for model in pair(name, padding))
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, **TOLERANCE)


def test_models_that_choose_nothing_are_refused() -> None:
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    )
    with pytest.raises(TypeError, match="topk_attention: expected a model that chooses keys itself, got LlamaModel"):
        apply_topk_attention(llama)


@EACH_MODEL
def test_calls_that_are_refused(name: str) -> None:
    model = pair(name)[1]
    for layer in model.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.1
    with pytest.raises(ValueError, match="topk_attention: no attention dropout"):
        model.train()(tokens())


def test_examples() -> None:
    result = doctest.testmod(transformers_topk_attention, extraglobs={"torch": torch, "torchops": torchops})
    assert result.failed == 0 and result.attempted > 3
