"""Span attention in transformers' models, against their own attention."""

import copy
import doctest
import importlib
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
    pair,
    tokens,
    transformers,
)

from transformers import DynamicCache, StaticCache, masking_utils  # noqa: E402

from torchops.integrations.transformers import apply_span_attention, register_span_attention  # noqa: E402

EVERY_DECODER = pytest.mark.parametrize("name", DECODERS)
DROPOUTS = ["attention_probs_dropout_prob", "hidden_dropout_prob"]

pytestmark = pytest.mark.usefixtures("one_thread")


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


# ---- installing, and examples -----------------------------------------------------------------------


def test_examples() -> None:
    module = importlib.import_module("torchops.integrations.transformers")
    assert module.__all__ == ["apply_routed_experts", "apply_span_attention", "register_span_attention"]
    assert doctest.testmod(module, extraglobs={"torch": torch, "torchops": torchops}).failed == 0
