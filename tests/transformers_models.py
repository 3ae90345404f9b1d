"""Tiny random models of transformers, and what they are given."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers", exc_type=ImportError
)

from torchops.integrations.transformers import apply_span_attention  # noqa: E402

VOCABULARY = 50
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}
GROUPED = SIZE | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "eos_token_id": None}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CHUNKED = ["chunked_attention", "full_attention", "chunked_attention"]

# Windows and chunks are shorter than the sequences of the tests.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": VOCABULARY, "n_positions": 64}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 5}),
    "Gemma2": (
        "Gemma2ForCausalLM",
        GROUPED | {"sliding_window": 5, "layer_types": SLIDING, "attn_logit_softcapping": None},
    ),
    "Gemma3Text": ("Gemma3ForCausalLM", GROUPED | {"sliding_window": 5, "layer_types": SLIDING}),
    "GptOss": (
        "GptOssForCausalLM",
        GROUPED | {"sliding_window": 5, "layer_types": SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "Llama4Text": (
        "Llama4ForCausalLM",
        GROUPED
        | {
            "attention_chunk_size": 4,
            "layer_types": CHUNKED,
            "no_rope_layers": [1, 0, 1],
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
        },
    ),
}
# These have no "sdpa" to compare with.
EAGER = {"Gemma2", "GptOss"}
# Models compute in float64, but for parts that they have in float32: rotations, logits, the eager ones as a whole.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = 13
PADDINGS = {
    "none": None,
    "left": torch.arange(TOKENS) >= torch.tensor([[0], [6]]),
    "right": torch.arange(TOKENS) < torch.tensor([[13], [7]]),
}


def make(config_name: str, model_name: str, options: dict[str, Any], implementation: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_name}Config")(**options)
    model = getattr(transformers, model_name)._from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # their own start is so small that nearly nothing depends on anything
    # The eager softmax takes the smallest float64, which stands for -inf, to float32.
    return model if implementation == "eager" else model.double()


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model with its own attention, and a copy with span attention."""
    model_name, defaults = DECODERS[name]
    model = make(name, model_name, defaults | options, "eager" if name in EAGER else "sdpa")
    return model, apply_span_attention(copy.deepcopy(model))


def tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def padding_mask(padding: str) -> Tensor:
    """bool [2, TOKENS], True for tokens that are there."""
    mask = PADDINGS[padding]
    return torch.ones(2, TOKENS, dtype=torch.bool) if mask is None else mask


def generate(model: Any, cache: str, padding: str) -> Any:
    """Twelve tokens and their logits, token by token."""
    return model.generate(
        tokens(),
        attention_mask=padding_mask(padding),
        max_new_tokens=12,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )


def in_one_pass(model: Any, sequences: Tensor, padding: str) -> Tensor:
    """The logits that led to the generated tokens, computed at once."""
    prompt = padding_mask(padding)
    seen = torch.cat([prompt, prompt.new_ones(2, 12)], dim=1)
    position_ids = (seen.cumsum(-1) - 1).clamp(min=0)
    return model(sequences, attention_mask=seen, position_ids=position_ids).logits[:, TOKENS - 1 : -1].float()


def call_counter(monkeypatch: pytest.MonkeyPatch, integration: str, operator: Callable[..., Tensor]) -> list[Any]:
    """The keyword arguments of every call that an integration makes of an operator."""
    calls: list[dict[str, Any]] = []

    def counted(*args: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return operator(*args, **options)

    monkeypatch.setattr(f"torchops.integrations.{integration}.{operator.__name__}", counted)
    return calls
