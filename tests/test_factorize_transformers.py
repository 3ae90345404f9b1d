"""Models of transformers with their linear layers factored, by tools/try_models.py, which knows all of them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torchops.nn import STFLinear, factorize_

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def try_models() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "try_models.py"
    spec = importlib.util.spec_from_file_location("try_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# How each is unlike the others: an encoder, Conv1D and a tied head, shared blocks, an encoder and a decoder, code that
# reads a layer's weight, grouped queries, images, sound.
@pytest.mark.parametrize(
    "name",
    ["bert", "gpt2", "albert", "bart", "t5", "llama", "vit", "whisper"],
)
def test_models_convert_and_compute(try_models: ModuleType, name: str) -> None:
    result = try_models.attempt(name, try_models.class_of(name))
    assert result["outcome"] == "converted", result
    assert result["factored"] > 0


def test_gpt2_factors_its_transposed_layers_and_keeps_its_tied_head() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    layer = model.transformer.h[0].mlp.c_fc
    tokens, weight = torch.arange(10)[None], layer.weight.detach().T
    with torch.no_grad():
        expected = model(tokens).logits
        report = factorize_(model, 1.2, verbose=False, calibration=lambda given: given(tokens))
        logits = model(tokens).logits
    assert [row.name for row in report.layers] == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert report.left == [("lm_head", "its weight is that of transformer.wte, too")]
    factored = model.transformer.h[0].mlp.c_fc
    assert isinstance(factored, STFLinear) and factored.bias is not None
    assert (factored.dense_weight() - weight).norm() < 0.6 * weight.norm()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (logits - expected).norm() < 0.1 * expected.norm()


def test_a_tied_llama_keeps_its_head() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert [name for name, _ in factorize_(model, 1.2, num_iterations=1, verbose=False).left] == ["lm_head"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
