"""Spans of one's own in encoders of transformers whose attention is not told which layer it is."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformers_models import TOLERANCE, VOCABULARY, make, tokens, transformers  # isort: skip
from vision_models import ENCODERS, images, layers_of, make_encoder  # isort: skip

from torchops.integrations.transformers import apply_span_attention, register_span_attention  # noqa: E402

SPANS = [{"left": 3, "right": 3}, None, {"block_size": 4, "left": 1, "right": 0}]

pytestmark = pytest.mark.usefixtures("one_thread")


def keep(span: dict[str, int], length: int) -> Tensor:
    block = torch.arange(length) // span.get("block_size", 1)
    return (block >= block[:, None] - span["left"]) & (block <= block[:, None] + span["right"])


def masked(layers: Any, attention: str) -> None:
    """Gives torch's attention the masks of the spans."""

    def replace_mask(module: nn.Module, args: Any, options: dict[str, Any], span: dict[str, int]) -> Any:
        hidden_states = args[0] if args else options.pop("hidden_states")
        mask = keep(span, hidden_states.shape[1])[None, None]
        return (hidden_states,), options | {"attention_mask": mask}

    for layer, span in zip(layers, SPANS, strict=True):
        if span is not None:
            layer.get_submodule(attention).register_forward_pre_hook(
                lambda module, args, options, span=span: replace_mask(module, args, options, span), with_kwargs=True
            )


@pytest.mark.parametrize("name", ENCODERS)
def test_image_encoders(name: str) -> None:
    model = make_encoder(name)
    ours = apply_span_attention(copy.deepcopy(model), SPANS)
    full = model(images()).last_hidden_state
    torch.testing.assert_close(apply_span_attention(copy.deepcopy(ours), False)(images()).last_hidden_state, full)
    masked(layers_of(name, model), ENCODERS[name].parts[1])
    expected = model(images()).last_hidden_state
    torch.testing.assert_close(ours(images()).last_hidden_state, expected, **TOLERANCE)
    assert (full - expected).abs().max() > 0.01, "the spans matter"


def test_text_encoder() -> None:
    options = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 32, "n_heads": 4, "n_layers": 3}
    model = make("DistilBert", "DistilBertModel", options, "sdpa")
    ours = apply_span_attention(copy.deepcopy(model), SPANS)
    masked(model.transformer.layer, "attention")
    torch.testing.assert_close(ours(tokens()).last_hidden_state, model(tokens()).last_hidden_state, **TOLERANCE)


def test_spans_are_loaded_with_the_model(tmp_path: Path) -> None:
    model = apply_span_attention(make_encoder("ViT"), SPANS)
    expected = model(images()).last_hidden_state
    model.save_pretrained(tmp_path)
    load = transformers.ViTModel.from_pretrained
    loaded = load(tmp_path, attn_implementation=register_span_attention(), dtype=torch.float64)
    torch.testing.assert_close(loaded(images()).last_hidden_state, expected)
    assert list(loaded.state_dict()) == list(make_encoder("ViT").state_dict())
    eager = load(tmp_path, attn_implementation="eager", dtype=torch.float32)
    torch.testing.assert_close(apply_span_attention(eager.double())(images()).last_hidden_state, expected, **TOLERANCE)


def test_spans_are_not_for_layers_with_token_merging() -> None:
    from torchops.integrations.transformers_token_merging import apply_token_merging

    model = apply_token_merging(make_encoder("ViT"), [0, 0, 8])
    with pytest.raises(TypeError, match="no span of one's own for layer 2 of ViTModel"):
        apply_span_attention(model, SPANS)
