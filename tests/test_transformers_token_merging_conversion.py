"""Token merging in the image encoders of transformers: conversion, files, programs, and what is refused."""

import copy
import doctest
import importlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from module_state import state_of
from torch import Tensor, nn

from transformers_models import GROUPED, transformers  # isort: skip  # it says why where transformers is not there
from vision_models import ENCODERS, SIZE, images, layers_of, make_encoder  # isort: skip

from torchops.integrations._layer_halves import halves  # noqa: E402
from torchops.integrations.transformers import apply_span_attention  # noqa: E402
from torchops.integrations.transformers_token_merging import (  # noqa: E402
    apply_token_merging,
    remove_token_merging,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def features(model: Any) -> Tensor:
    return model(images().to(model.dtype)).last_hidden_state


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_remove_restores(name: str) -> None:
    model = make_encoder(name)
    expected, untouched = features(model), state_of(model)
    assert apply_token_merging(model, [0, 8, 8]) is model
    assert type(layers_of(name, model)[0]) is untouched[f"{ENCODERS[name].layers}.0"][0]
    assert remove_token_merging(model) is model
    assert state_of(model) == untouched
    assert torch.equal(features(model), expected)
    for r in (0, [0] * 3, (0, 0.0)):
        assert state_of(apply_token_merging(apply_token_merging(model, 8), r)) == untouched
    assert state_of(remove_token_merging(model)) == untouched


def test_calling_again_changes_r() -> None:
    model = apply_token_merging(make_encoder("ViT"), 8)
    apply_token_merging(model, [0, 3, 3], proportional_attention=False)
    fresh = apply_token_merging(make_encoder("ViT"), [0, 3, 3], proportional_attention=False)
    assert torch.equal(features(model), features(fresh))
    assert state_of(model) == state_of(fresh)


class Short(transformers.models.vit.modeling_vit.ViTLayer):
    """Written otherwise."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        """Both halves."""
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        tokens = hidden_states + self.dropout(update)
        return tokens + self.dropout(self.mlp(self.layernorm_after(tokens)))


def test_layers_written_otherwise() -> None:
    model = make_encoder("ViT")
    expected = features(apply_token_merging(make_encoder("ViT"), 8))
    for layer in model.layers:
        layer.__class__ = Short
    torch.testing.assert_close(features(apply_token_merging(model, 8)), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_halves_are_the_layer(name: str) -> None:
    """The same statements in the same order: the same bits, also where there is dropout."""
    layer = layers_of(name, make_encoder(name))[1].train()
    attention_half, mlp_half = halves(type(layer), ENCODERS[name].parts[1])
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    torch.manual_seed(1)
    expected = layer(x, None)
    torch.manual_seed(1)
    assert torch.equal(mlp_half(layer, attention_half(layer, x, None)), expected)


# ---- copies and files ----------------------------------------------------------------------------------


def test_copies_and_pickles() -> None:
    model = apply_token_merging(make_encoder("ViT"), 8)
    expected, names = features(model), list(make_encoder("ViT").state_dict())
    assert list(model.state_dict()) == names
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert state_of(other) == state_of(model)
        assert torch.equal(features(other), expected)
        assert state_of(remove_token_merging(other)) == state_of(make_encoder("ViT"))
    assert torch.equal(features(model), expected)


def test_saved_is_the_model_without_merging(tmp_path: Path) -> None:
    model = make_encoder("ViT")
    full = features(model)
    apply_token_merging(model, 8)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(features(loaded), full)
    assert loaded.config.architectures == ["ViTModel"]
    assert torch.equal(features(apply_token_merging(loaded, 8)), features(model))
    loaded.load_state_dict(make_encoder("ViT").state_dict())


# ---- programs ------------------------------------------------------------------------------------------


def test_compile() -> None:
    torch._dynamo.reset()
    model = apply_token_merging(make_encoder("Dinov2WithRegisters", num_hidden_layers=2), [9, 4])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(images(), output_hidden_states=True)
        outputs = [output.last_hidden_state, *output.hidden_states]
        sum(state.square().sum() for state in outputs).backward()
        results.append([*outputs, *(one.grad for one in model.parameters() if one.grad is not None)])
    torch.testing.assert_close(results[1], results[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["ViT", "CLIPVision"])
def test_export(name: str) -> None:
    model = apply_token_merging(make_encoder(name), [0, 9, 4])
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images(2),), dynamic_shapes={"pixel_values": {0: batch}}).module()
    torch.testing.assert_close(program(images(3)).last_hidden_state, model(images(3)).last_hidden_state)


# ---- what cannot be ------------------------------------------------------------------------------------


def with_patched_forward() -> nn.Module:
    model = make_encoder("ViT")
    model.layers[1].forward = model.layers[1].forward
    return model


def with_other_layers(layer: type[nn.Module]) -> nn.Module:
    model = make_encoder("ViT")
    for index in range(3):
        model.layers[index].__class__ = layer
    return model


ViTLayer = transformers.models.vit.modeling_vit.ViTLayer


class NoResidual(ViTLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        hidden_states, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        return self.mlp(self.layernorm_after(hidden_states))


class InPlace(ViTLayer):
    """The sum that is found is that behind the MLP."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        residual = hidden_states
        hidden_states, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states += residual
        update = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = hidden_states + update
        return hidden_states  # noqa: RET504


class Parallel(ViTLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        residual = hidden_states
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = residual + update
        return hidden_states + self.mlp(self.layernorm_after(residual))


class UsesMask(ViTLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + update
        return hidden_states + self.mlp(self.layernorm_after(hidden_states)) * (attention_mask is None)


class Positions(ViTLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, position=1, **kwargs)
        hidden_states = hidden_states + update
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


class Branch(ViTLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if self.training:
            return hidden_states
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + update
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


class Pair(ViTLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        update, weights = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + update
        return hidden_states + self.mlp(self.layernorm_after(hidden_states)), None


def with_convolution() -> nn.Module:
    model = make_encoder("ViT")
    model.layers[2].mlp = nn.Sequential(nn.Conv1d(24, 24, 3), model.layers[2].mlp)
    return model


def of_transformers(name: str, model_name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model_name)(getattr(transformers, f"{name}Config")(**SIZE | options))


MORE = "computes its MLP from more than the sum of attention and residual, or more than its output"


@pytest.mark.parametrize(
    ("make_model", "found"),
    [
        (lambda: nn.Linear(3, 3), r"model is a torch\.nn\.modules\.linear\.Linear"),
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**GROUPED)), "LlamaModel has none"),
        (of_transformers("DINOv3ViT", "DINOv3ViTModel"), "layer 0 of .*DINOv3ViTLayer, is given .*position_embeddings"),
        (of_transformers("Beit", "BeitModel"), r"BeitLayer, is given .*resolution"),
        (of_transformers("Yolos", "YolosModel", image_size=[32, 32]), r"YolosLayer, is given hidden_states, and not"),
        (
            lambda: transformers.SwinModel(transformers.SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[1, 1])),
            "Swin",
        ),
        (lambda: make_encoder("Dinov2").encoder, "Dinov2Encoder does not say which part of it embeds the patches"),
        (with_patched_forward, r"layer 1 of ViTModel\.layers, .*ViTLayer, has a forward of its own"),
        (with_convolution, "layer 2 of ViTModel.layers, .* mixes tokens by a Conv1d"),
        (lambda: with_other_layers(NoResidual), "does not add what attention returns to a residual"),
        (lambda: with_other_layers(InPlace), "does not add what attention returns to a residual"),
        (lambda: with_other_layers(Parallel), MORE),
        (lambda: with_other_layers(UsesMask), "does not give attention tokens and a mask, once and nothing besides"),
        (lambda: with_other_layers(Positions), "does not give attention tokens and a mask, once and nothing besides"),
        (lambda: with_other_layers(Branch), MORE),
        (lambda: with_other_layers(Pair), MORE),
    ],
)
def test_other_models_are_refused(make_model: Callable[[], nn.Module], found: str) -> None:
    model = make_model()
    before = state_of(model)
    with pytest.raises(TypeError, match=f"token merging: .*{found}.* Supported are image encoders"):
        apply_token_merging(model, 8)
    assert state_of(model) == before


def test_tokens_that_are_not_known_to_be_first_are_refused() -> None:
    model = make_encoder("ViT")
    model.embeddings.detection_tokens = nn.Parameter(torch.zeros(1, 5, 24))
    with pytest.raises(TypeError, match="ViTModel has detection_tokens, which are not known to stand before"):
        apply_token_merging(model, 8)


@pytest.mark.parametrize(("r", "error"), [(-1, ValueError), ([8, 8], ValueError), ("8", TypeError), (1.5, TypeError)])
def test_other_r_are_refused(r: Any, error: type[Exception]) -> None:
    model = apply_token_merging(make_encoder("ViT"), 8)
    before = state_of(model)
    with pytest.raises(error, match="token merging: expected r "):
        apply_token_merging(model, r)
    assert state_of(model) == before
    assert [layer.token_merger.r for layer in model.layers] == [8] * 3


def test_masks_are_refused() -> None:
    model = apply_token_merging(make_encoder("ViT"), [0, 8, 8])
    mask = torch.ones(2, 65, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask cannot be followed where tokens are merged"):
        model(images(), attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask cannot be followed"):
        torch.export.export(model, (images(),), {"attention_mask": mask})
    with pytest.raises(ValueError, match="attention_mask cannot be followed"):
        model.layers[1](torch.randn(2, 65, 24, dtype=torch.float64), mask)
    with pytest.raises(ValueError, match="token merging: position cannot be followed"):
        model.layers[1](torch.randn(2, 65, 24, dtype=torch.float64), position=mask)
    assert torch.equal(features(remove_token_merging(model)), features(make_encoder("ViT")))


def test_attentions_are_refused() -> None:
    model = apply_token_merging(make_encoder("ViT"), 8)
    with pytest.raises(ValueError, match="no output_attentions where tokens are merged"):
        model(images(), output_attentions=True)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="no output_attentions where tokens are merged"):
        model(images())
    assert len(remove_token_merging(model)(images()).attentions) == 3


def test_other_attention_is_refused() -> None:
    model = apply_token_merging(make_encoder("ViT"), [0, 8, 8])
    with pytest.raises(ValueError, match="token merging: attention cannot be span_attention's"):
        features(apply_span_attention(model))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="token merging: no causal attention"):
        model.layers[1](torch.randn(2, 65, 24, dtype=torch.float64), is_causal=True)
    with pytest.raises(RuntimeError, match="cannot be called by itself"):
        model.layers[1].attention(torch.randn(2, 65, 24, dtype=torch.float64))


@pytest.mark.parametrize(
    "hook", [lambda layer, args, output: output.clone(), lambda layer, args, output: output[:, 1:]]
)
def test_tokens_from_elsewhere_are_refused(hook: Callable[..., Tensor]) -> None:
    model = apply_token_merging(make_encoder("ViT"), 8)
    expected = features(model)
    handle = model.layers[0].register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="not what the layer before it returned"):
        features(model)
    handle.remove()
    assert torch.equal(features(model), expected)


def test_examples() -> None:
    module = importlib.import_module("torchops.integrations.transformers_token_merging")
    assert module.__all__ == ["apply_token_merging", "remove_token_merging"]
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
