"""What span attention refuses of transformers: calls, spans, and models that compute attention by themselves."""

from typing import Any

import pytest
import torch

from transformers_models import (  # isort: skip  # it says why where transformers is not there
    GROUPED,
    SIZE,
    TOKENS,
    TOLERANCE,
    make,
    pair,
    tokens,
    transformers,
)

from torchops.integrations._attention_interface import span_mask  # noqa: E402
from torchops.integrations.transformers import apply_span_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

NEO = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "dropout": ("Llama", {"attention_dropout": 0.1}, {}, r"no attention dropout \(here 0.1\)"),
    "4-D mask": (
        "Llama",
        {},
        {"attention_mask": torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)},
        r"no masks but those of padding, \[B, L\]; this one of shape \[2, 1, 13, 13\]",
    ),
    "packed": (
        "Llama",
        {},
        {"position_ids": torch.arange(TOKENS).remainder(7)[None], "use_cache": False},
        "no masks but full, sliding and chunked attention: no packed sequences",
    ),
    "output_attentions": ("Llama", {}, {"output_attentions": True}, "no output_attentions"),
    "empty window": ("Mistral", {"sliding_window": 0}, {}, "no masks but full, sliding and chunked attention"),
    "cumulative lengths": ("Llama", {}, {"cu_seq_lens_q": torch.tensor([0, 7, 13])}, "no packed sequences"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_are_refused(case: str) -> None:
    name, options, inputs, message = REFUSED[case]
    model = pair(name, **options)[1].train()
    with pytest.raises(ValueError, match=f"span_attention: {message}"):
        model(tokens(), **inputs)


def test_attentions_that_a_model_collects_itself_are_refused() -> None:
    model = apply_span_attention(make("Bert", "BertModel", SIZE, "sdpa"))
    with pytest.raises(ValueError, match="no output_attentions"):
        model(tokens(), output_attentions=True)
    with pytest.raises(ValueError, match=r"no masks but those of padding, \[B, L\]; this one has 3 dimensions"):
        model(tokens(), attention_mask=torch.ones(2, TOKENS, TOKENS))
    eager = make("Bert", "BertModel", SIZE | {"output_attentions": True}, "eager")
    with pytest.raises(ValueError, match="no output_attentions"):
        apply_span_attention(eager)


def test_a_mask_that_no_layer_uses_is_not_refused() -> None:
    """Qwen2-MoE as it is configured by default has a window of 0, for no layer."""
    options = GROUPED | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    options |= {"num_experts": 2, "num_experts_per_tok": 1}
    del options["head_dim"]
    model = make("Qwen2Moe", "Qwen2MoeForCausalLM", options, "eager")  # has no float64
    assert model.config.sliding_window == 0
    expected = model(tokens()).logits
    torch.testing.assert_close(apply_span_attention(model)(tokens()).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "Llama"])
def test_the_way_back_that_errors_name(name: str) -> None:
    model, ours = pair(name)
    with pytest.raises(ValueError, match=r'model.set_attn_implementation\("eager"\) goes back') as error:
        ours(tokens(), attention_mask=torch.ones(2, 1, TOKENS, TOKENS))
    exec(str(error.value).split("; ")[-1].split(" goes back")[0], {"model": ours})
    # "eager" computes masks in float32
    ours, model = ours.float(), model.float()
    torch.testing.assert_close(ours(tokens()).logits, model(tokens()).logits, **TOLERANCE)


def test_a_mask_of_another_cache_is_refused() -> None:
    model = pair("Llama")[1]
    mask = span_mask(2, TOKENS, TOKENS + 1)
    with pytest.raises(ValueError, match="expected as many keys as the mask has, 14, got 13"):
        model(tokens(), attention_mask=mask)


@pytest.mark.parametrize(
    ("spans", "error", "message"),
    [
        ([{}], ValueError, "expected spans for 3 layers or None, got 1"),
        (
            [None, {"block": 3}, None],
            ValueError,
            r"expected spans of block_size, is_causal, left, right, got \['block'\]",
        ),
        ([None, {"left": 2.0}, None], ValueError, "expected left of type int of at least -1, got 2.0"),
        ([None, {"right": -2}, None], ValueError, "expected right of type int of at least -1, got -2"),
        ([None, {"block_size": 0}, None], ValueError, "expected block_size of type int of at least 1, got 0"),
        ([None, {"left": True}, None], ValueError, "expected left of type int of at least -1, got True"),
        ([None, {"is_causal": 1}, None], ValueError, "expected is_causal of type bool, got 1"),
    ],
)
def test_spans_that_are_refused(spans: Any, error: type[Exception], message: str) -> None:
    model = pair("Llama")[0]
    with pytest.raises(error, match=f"span_attention: {message}"):
        apply_span_attention(model, spans)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "span_attention")


@pytest.mark.parametrize(
    ("name", "spans", "message"),
    [
        (
            "Llama",
            [None, None, {"left": 3, "is_causal": False}],
            "no is_causal=False for layer 2 of a model with is_causal=True",
        ),
        ("Gemma3Text", [None, None, {"left": 3}], "no span of one's own for layer 2, which sees .*left=4"),
    ],
)
def test_spans_that_do_not_fit_the_model_are_refused(name: str, spans: Any, message: str) -> None:
    model = apply_span_attention(pair(name)[0], spans)
    with pytest.raises(ValueError, match=f"span_attention: {message}"):
        model(tokens())


TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


# A mask that depends on values, keys that an indexer chose, positions added to the scores, all in place of the mask.
@pytest.mark.parametrize(
    ("config_name", "model_name", "attention", "options"),
    [
        ("Doge", "DogeModel", "DogeAttention", {"num_key_value_heads": 1, **TINY}),
        ("DeepseekV32", "DeepseekV32Model", "DeepseekV32Attention", {"n_routed_experts": 2, **TINY, **LATENT}),
        ("HYV4", "HYV4Model", "HYV4Attention", {"pad_token_id": 0, **TINY, **LATENT}),
        ("Swin", "SwinModel", "SwinAttention", {"embed_dim": 8, "depths": [1], "num_heads": [1], "image_size": 32}),
    ],
)
def test_models_that_make_the_mask_of_their_attention_are_refused(
    config_name: str, model_name: str, attention: str, options: dict[str, Any]
) -> None:
    refused_at_conversion(config_name, model_name, attention, options, "makes the mask of its attention itself")


def refused_at_conversion(config_name: str, model_name: str, layer: str, options: dict[str, Any], reason: str) -> None:
    with torch.device("meta"):
        model = getattr(transformers, model_name)(getattr(transformers, f"{config_name}Config")(**options))
    before = model.config._attn_implementation
    with pytest.raises(TypeError, match=rf"span_attention: {layer} \(.*\) {reason}"):
        apply_span_attention(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("config_name", "model_name", "layer", "options", "reason"),
    [
        ("Gemma2", "Gemma2Model", "Gemma2Attention", {"head_dim": 8, **TINY}, "has soft-capped scores"),
        ("Llama", "LlamaModel", "LlamaAttention", {**TINY, "head_dim": 264}, "has heads of 264 features, more than"),
        (
            "InklingText",
            "InklingTextModel",
            "InklingAttention",
            {"num_key_value_heads": 1, "head_dim": 8, **TINY},
            "adds position biases to the scores of its attention",
        ),
        ("LayoutLM", "LayoutLMModel", "LayoutLMModel", TINY, "makes the mask of attention itself"),
        (
            "PixtralVision",
            "PixtralVisionModel",
            "PixtralVisionModel",
            {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            "makes the mask of attention itself",
        ),
        (
            "LasrEncoder",
            "LasrEncoder",
            "LasrEncoderConvolutionModule",
            {key: size for key, size in TINY.items() if key != "vocab_size"},
            "computes with the mask of attention itself",
        ),
    ],
)
def test_layers_that_ask_for_more_are_refused(
    config_name: str, model_name: str, layer: str, options: dict[str, Any], reason: str
) -> None:
    refused_at_conversion(config_name, model_name, layer, options, reason)


@pytest.mark.parametrize(
    ("config_name", "model_name", "options"),
    [
        ("GPTNeo", "GPTNeoForCausalLM", NEO),
        # Its encoder adds the mask to scores of its own, and its decoder is inside the interface.
        ("BigBirdPegasus", "BigBirdPegasusModel", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}),
        ("Bloom", "BloomModel", {"hidden_size": 32, "n_layer": 1, "n_head": 4}),
        ("MaskFormerSwin", "MaskFormerSwinModel", {"embed_dim": 8, "depths": [1], "num_heads": [1]}),
    ],
)
def test_other_models_are_refused(config_name: str, model_name: str, options: dict[str, Any]) -> None:
    model = getattr(transformers, model_name)(getattr(transformers, f"{config_name}Config")(**options))
    for spans in (None, [None]):
        with pytest.raises(TypeError, match=f"{model_name} does not take attention implementations from outside"):
            apply_span_attention(model, spans)


def test_spans_need_layers_that_know_themselves() -> None:
    """ALBERT runs one layer several times."""
    options = {"hidden_size": 32, "num_attention_heads": 4, "embedding_size": 8}
    model = transformers.AlbertModel(transformers.AlbertConfig(**options))
    layers = model.config.num_hidden_layers
    with pytest.raises(TypeError, match="no span of one's own for layer 1 of AlbertModel, whose attention does not"):
        apply_span_attention(model, [None, {"left": 2}] + [None] * (layers - 2))
    apply_span_attention(model, [None] * layers)
    bart = transformers.BartModel(transformers.BartConfig(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1))
    with pytest.raises(TypeError, match="without cross-attention"):
        apply_span_attention(bart, [None])
