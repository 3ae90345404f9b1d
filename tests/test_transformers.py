"""Span attention in transformers' models, against their own attention."""

import copy
import doctest
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchops
from torchops.nn import mixed_span

from transformers_models import (  # isort: skip  # it says why where transformers is not there
    DECODERS,
    EAGER,
    GROUPED,
    PADDINGS,
    SIZE,
    SLIDING,
    TOKENS,
    TOLERANCE,
    VOCABULARY,
    call_counter,
    generate,
    in_one_pass,
    make,
    padding_mask,
    tokens,
    transformers,
)

from transformers import DynamicCache, StaticCache, masking_utils  # noqa: E402

from torchops.integrations._attention_interface import span_mask  # noqa: E402
from torchops.integrations.transformers import apply_span_attention, register_span_attention  # noqa: E402

EVERY_DECODER = pytest.mark.parametrize("name", DECODERS)
DROPOUTS = ["attention_probs_dropout_prob", "hidden_dropout_prob"]

NEO = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}
pytestmark = pytest.mark.usefixtures("one_thread")


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model with its own attention, and a copy with span attention."""
    model_name, defaults = DECODERS[name]
    model = make(name, model_name, defaults | options, "eager" if name in EAGER else "sdpa")
    return model, apply_span_attention(copy.deepcopy(model))


# ---- decoders ---------------------------------------------------------------------------------------


@EVERY_DECODER
@pytest.mark.parametrize("padding", PADDINGS)
def test_decoders_and_their_gradients(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = call_counter(monkeypatch, "transformers", torchops.span_attention)
    attention_mask, real = PADDINGS[padding], padding_mask(padding)
    results = []
    for model in pair(name):
        logits = model(tokens(), attention_mask=attention_mask).logits[real]
        logits.sin().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
    assert len(calls) == model.config.num_hidden_layers
    spans = {"sliding_attention": (1, 4), "chunked_attention": (4, 0), "full_attention": (1, -1)}
    full = ["full_attention"] * len(calls)
    layers = ["sliding_attention"] * 3 if name == "Mistral" else getattr(model.config, "layer_types", full)
    assert [(call["block_size"], call["left"]) for call in calls] == [spans[layer] for layer in layers]


@EVERY_DECODER
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["left", "none"])
def test_generate(name: str, cache: str, padding: str) -> None:
    """Token by token, to more than twice the window, so that caches are trimmed and rolled."""
    expected, actual = (generate(model, cache, padding) for model in pair(name))
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, **TOLERANCE)


@pytest.mark.parametrize("name", ["Mistral", "Gemma3Text", "Llama4Text"])
def test_generate_with_beams(name: str) -> None:
    expected, actual = (
        model.generate(
            tokens(),
            attention_mask=PADDINGS["left"],
            max_new_tokens=8,
            num_beams=3,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        for model in pair(name)
    )
    assert torch.equal(actual, expected)


@EVERY_DECODER
@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_a_cache_that_grows_by_several_tokens(name: str, make_cache: Callable[..., Any]) -> None:
    """Pieces that end before, at and behind the ends of windows and chunks, with left padding."""
    ids, attention_mask = tokens(length=24), torch.arange(24) >= torch.tensor([[0], [6]])
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    model, ours = pair(name)
    whole = model(ids, attention_mask=attention_mask, position_ids=positions).logits
    for pieces in ([7, 1, 1, 5, 2, 8], [3, 4, 4, 13]):
        past = make_cache(config=ours.config, **({"max_cache_len": 30} if make_cache is StaticCache else {}))
        end = 0
        for piece in pieces:
            begin, end = end, end + piece
            output = ours(
                ids[:, begin:end],
                attention_mask=attention_mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=past,
                use_cache=True,
            )
            real = attention_mask[:, begin:end]
            torch.testing.assert_close(output.logits[real], whole[:, begin:end][real], **TOLERANCE)
        assert end == 24


# ---- encoders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("config_name", "model_name", "options"),
    [
        ("Bert", "BertModel", SIZE),
        ("ModernBert", "ModernBertModel", SIZE | {"local_attention": 8, "pad_token_id": 0, "cls_token_id": 1}),
        (
            "Gemma3Text",  # as EmbeddingGemma has it
            "Gemma3TextModel",
            GROUPED | {"sliding_window": 6, "layer_types": SLIDING, "use_bidirectional_attention": True},
        ),
        ("DistilBert", "DistilBertModel", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 32, "n_heads": 4}),
        ("Esm", "EsmModel", SIZE | {"pad_token_id": 0, "position_embedding_type": "rotary"}),
    ],
)
def test_encoders(config_name: str, model_name: str, options: dict[str, Any], padding: str) -> None:
    model = make(config_name, model_name, options, "sdpa")
    ours = apply_span_attention(copy.deepcopy(model))
    attention_mask = PADDINGS[padding]
    real = slice(None) if attention_mask is None else attention_mask
    expected = model(tokens(), attention_mask=attention_mask).last_hidden_state[real]
    actual = ours(tokens(), attention_mask=attention_mask).last_hidden_state[real]
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_vision_transformer() -> None:
    options = {**SIZE, "image_size": 16, "patch_size": 4}
    del options["vocab_size"], options["max_position_embeddings"]
    model = make("ViT", "ViTModel", options, "sdpa")
    ours = apply_span_attention(copy.deepcopy(model))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(images).last_hidden_state, model(images).last_hidden_state, **TOLERANCE)


def test_encoder_and_decoder() -> None:
    """With cross-attention to padded keys."""
    options = {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        options |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 32}
    model = make("Bart", "BartForConditionalGeneration", options, "sdpa")
    ours = apply_span_attention(copy.deepcopy(model))
    for padding in ("left", "right"):
        inputs = {"input_ids": tokens(), "attention_mask": PADDINGS[padding]}
        expected = model(**inputs, decoder_input_ids=tokens(length=7)).logits
        torch.testing.assert_close(ours(**inputs, decoder_input_ids=tokens(length=7)).logits, expected)
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(ours.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


# ---- mixed spans ------------------------------------------------------------------------------------

LOCAL_SPANS = {
    "blocks": {"block_size": 4, "left": 0, "right": 0},
    "blocks-and-left": {"block_size": 3, "left": 1, "right": 0},
    "window": {"left": 4, "right": 0},
}


def masked(model: nn.Module, layers: list[int], span: dict[str, int], left_padding: Tensor) -> nn.Module:
    """Gives these layers of a model with torch's attention a mask by hand."""
    size = span.get("block_size", 1)

    def replace_mask(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        position = torch.arange(options["hidden_states"].shape[1]) - left_padding[:, None]
        block = position // size
        keep = (position[:, None] <= position[..., None]) & (block[:, None] >= block[..., None] - span["left"])
        keep &= position[:, None] >= 0
        return args, options | {"attention_mask": keep[:, None]}

    for layer in layers:
        model.model.layers[layer].self_attn.register_forward_pre_hook(replace_mask, with_kwargs=True)
    return model


@pytest.mark.parametrize("span", LOCAL_SPANS)
def test_mixed_spans(span: str) -> None:
    model = pair("Llama")[0]
    ours = apply_span_attention(
        copy.deepcopy(model), mixed_span(3, full_layers=[1], **LOCAL_SPANS[span], is_causal=True)
    )
    attention_mask = PADDINGS["left"]
    full = model(tokens(), attention_mask=attention_mask).logits[attention_mask]
    masked(model, [0, 2], LOCAL_SPANS[span], left_padding=(~attention_mask).sum(1))
    expected = model(tokens(), attention_mask=attention_mask).logits[attention_mask]
    actual = ours(tokens(), attention_mask=attention_mask).logits[attention_mask]
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert (full - expected).abs().max() > 0.1, "the spans matter"
    apply_span_attention(ours, False)
    torch.testing.assert_close(ours(tokens(), attention_mask=attention_mask).logits[attention_mask], full)


@pytest.mark.parametrize("span", LOCAL_SPANS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_mixed_spans_generate_what_they_see_in_one_pass(span: str, cache: str) -> None:
    model = apply_span_attention(pair("Llama")[0], [None, LOCAL_SPANS[span], LOCAL_SPANS[span]])
    output = generate(model, cache, "left")
    whole = in_one_pass(model, output.sequences, "left")
    torch.testing.assert_close(torch.stack(output.logits, 1), whole, **TOLERANCE)


def test_spans_are_saved_with_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = apply_span_attention(pair("Llama")[0], mixed_span(3, [0], left=2, is_causal=True))
    line = "from_pretrained(..., attn_implementation=register_span_attention())"
    assert capsys.readouterr().out == f"span_attention: a saved copy loads with {line}\n"
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path / "0")
    load = transformers.AutoModelForCausalLM.from_pretrained
    for generation in range(3):
        loaded = load(tmp_path / str(generation), attn_implementation=register_span_attention(), dtype=torch.float64)
        torch.testing.assert_close(loaded(tokens()).logits, expected)
        # Also one that has not computed anything knows what loads it.
        again = load(tmp_path / str(generation), dtype=torch.float64)
        again.save_pretrained(tmp_path / str(generation + 1))
    # The config names the implementation, and another one has to be asked for.
    torch.testing.assert_close(load(tmp_path / "3", dtype=torch.float64)(tokens()).logits, expected)
    full = load(tmp_path / "3", dtype=torch.float64, attn_implementation="eager")
    assert (full(tokens()).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(apply_span_attention(full)(tokens()).logits, expected)
    taken_out = {"span_attention", "attn_implementation", "quantization_config"}
    assert not taken_out & apply_span_attention(full, False).config.to_dict().keys()


def test_a_config_with_spans_does_not_run_as_full_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_span_attention(pair("Llama")[0], mixed_span(3, [0], left=2, is_causal=True)).save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "span_attention")
    with pytest.raises(ValueError, match='attn_implementation="span_attention"` is not supported'):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_spans_of_the_text_part_of_a_model(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED).to_dict(),
        vision_config=vision | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    full = model(tokens()).logits
    expected = apply_span_attention(model, mixed_span(3, [0], left=2, is_causal=True))(tokens()).logits
    assert not torch.allclose(expected, full)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, expected)


# ---- training and compilers -------------------------------------------------------------------------


def test_training_with_checkpoints() -> None:
    model = apply_span_attention(pair("Llama")[0], mixed_span(3, [0], block_size=4, is_causal=True)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(tokens(), attention_mask=PADDINGS["right"], labels=tokens(), use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(model(tokens(), labels=tokens(), use_cache=False).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", ["GPT2", "Bert"])
def test_checkpoints_that_enter_autograd_again(name: str) -> None:
    """use_reentrant detaches the mask. The first forward, without gradients, has another kernel for few queries."""
    model = (
        pair("GPT2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)[1]
        if name == "GPT2"
        else apply_span_attention(make("Bert", "BertModel", SIZE | dict.fromkeys(DROPOUTS, 0.0), "sdpa"))
    ).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": True})
        model.zero_grad()
        model(tokens(), attention_mask=PADDINGS["left"])[0].sin().sum().backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_half_precision() -> None:
    model, ours = pair("Gemma3Text")
    expected = model(tokens(), attention_mask=PADDINGS["right"]).logits[PADDINGS["right"]]
    ours = ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = ours(tokens(), attention_mask=PADDINGS["right"]).logits
    converted = ours.bfloat16()(tokens(), attention_mask=PADDINGS["right"]).logits
    assert lowered.dtype == converted.dtype == torch.bfloat16
    for logits in (lowered, converted):
        similarity = nn.functional.cosine_similarity(logits[PADDINGS["right"]].double(), expected, dim=-1)
        assert similarity.min() > 0.98


@pytest.mark.parametrize("name", ["Mistral", "Llama4Text"])
def test_compile_and_export(name: str) -> None:
    torch._dynamo.reset()
    model = pair(name)[1]
    inputs = {"input_ids": tokens(), "attention_mask": PADDINGS["left"].long(), "use_cache": False}
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected)
    exported = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(exported(**inputs).logits, expected)
    # `generate` makes masks of its own accord where it compiles the model, and passes them in.
    made_before = masking_utils.create_masks_for_generate(
        model.config, torch.empty(2, TOKENS, 0), PADDINGS["left"], past_key_values=None
    )
    torch.testing.assert_close(compiled(**inputs | {"attention_mask": made_before}).logits, expected)
    torch._dynamo.reset()


# ---- what cannot be ---------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("config_name", "model_name", "options"),
    [
        ("ViT", "ViTModel", {"hidden_size": 32, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}),
        ("Albert", "AlbertModel", {"hidden_size": 32, "num_attention_heads": 4, "embedding_size": 8}),
        ("DistilBert", "DistilBertModel", {"dim": 32, "hidden_dim": 32, "n_heads": 4}),
    ],
)
def test_spans_need_layers_that_know_themselves(config_name: str, model_name: str, options: dict[str, Any]) -> None:
    model = getattr(transformers, model_name)(getattr(transformers, f"{config_name}Config")(**options))
    layers = model.config.num_hidden_layers
    with pytest.raises(TypeError, match=f"no span of one's own for layer 1 of {model_name}, whose attention does not"):
        apply_span_attention(model, [None, {"left": 2}] + [None] * (layers - 2))
    apply_span_attention(model, [None] * layers)
    bart = transformers.BartModel(transformers.BartConfig(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1))
    with pytest.raises(TypeError, match="without cross-attention"):
        apply_span_attention(bart, [None])


@pytest.mark.parametrize("installed", ["none", "old"])
def test_what_to_install(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed == "none":
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position: None)
    for module in ("transformers", "_attention_interface"):
        monkeypatch.delitem(sys.modules, f"torchops.integrations.{module}")
    with pytest.raises(ImportError, match="needs transformers 5.23 or newer: pip install transformers"):
        importlib.import_module("torchops.integrations.transformers")


def test_examples() -> None:
    module = importlib.import_module("torchops.integrations.transformers")
    assert module.__all__ == ["apply_routed_experts", "apply_span_attention", "register_span_attention"]
    assert doctest.testmod(module, extraglobs={"torch": torch, "torchops": torchops}).failed == 0
