"""Token merging in the image encoders of transformers: what comes out, and training."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchops.reference import tokens as reference

from transformers_models import GROUPED, transformers  # isort: skip  # it says why where transformers is not there
from vision_models import ENCODERS, IMPLEMENTATIONS, images, layers_of, make_encoder, mlp_lengths  # isort: skip

from torchops.integrations.transformers_token_merging import apply_token_merging  # noqa: E402

EVERY_ENCODER = pytest.mark.parametrize("name", ENCODERS)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the whole pass, in eager PyTorch ------------------------------------------------------------


def eager_attention(attention: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    heads = attention.config.num_attention_heads
    q, k, v = (
        getattr(attention, f"{name}_proj")(x).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v")
    )
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    if size is not None:
        scores = scores + size.log()[:, None, None, :]
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    project = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    return project(out), k.mean(1)


def eager_hidden_states(
    name: str, model: nn.Module, x: Tensor, r: list[int], proportional_attention: bool = True
) -> list[Tensor]:
    """What the layers return, [B, N, C] each, for the tokens x that enter the first."""
    encoder = ENCODERS[name]
    norm1, attention, norm2, mlp = encoder.parts
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    way_back = torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    hidden_states = []
    for layer, removed in zip(layers_of(name, model), r, strict=True):
        scale1, scale2 = (getattr(layer, f"layer_scale{index}", nn.Identity()) for index in (1, 2))
        update, metric = eager_attention(
            getattr(layer, attention), getattr(layer, norm1)(x), size if proportional_attention else None
        )
        x = x + scale1(update)
        assign = reference.bipartite_assignment(metric, removed, encoder.prefix)
        groups = reference.num_groups(x.shape[1], removed, encoder.prefix)
        x, size = reference.merge_tokens(x, assign, groups, size)
        way_back = way_back @ F.one_hot(assign, groups).to(x.dtype)
        x = x + scale2(getattr(layer, mlp)(getattr(layer, norm2)(x)))
        hidden_states.append(way_back @ x)
    return hidden_states


@EVERY_ENCODER
@pytest.mark.parametrize(
    ("r", "proportional_attention"),
    [([8, 8, 8], True), ([8, 8, 8], False), ([0, 9, 4], True), ([100, 0, 3], True)],  # 100 is clamped
)
def test_equals_eager(name: str, r: list[int], proportional_attention: bool) -> None:
    model = make_encoder(name)
    before = model(images(), output_hidden_states=True)
    expected = eager_hidden_states(name, model, before.hidden_states[0], r, proportional_attention)
    apply_token_merging(model, r, proportional_attention=proportional_attention)
    output = model(images(), output_hidden_states=True)
    torch.testing.assert_close(list(output.hidden_states[1:]), expected)
    norm = getattr(model, ENCODERS[name].norm or "", nn.Identity())
    torch.testing.assert_close(output.last_hidden_state, norm(expected[-1]))
    assert (output.last_hidden_state - before.last_hidden_state).abs().max() > 1e-2
    # Asked for after the first pass, and not at all.
    assert torch.equal(model(images()).last_hidden_state, output.last_hidden_state)


@pytest.mark.parametrize("name", ["ViT", "Dinov2WithRegisters"])
def test_gradients_equal_eager(name: str) -> None:
    model = make_encoder(name)
    tokens = model(images(), output_hidden_states=True).hidden_states[0].detach()
    parameters = list(layers_of(name, model).parameters())
    expected = torch.autograd.grad(eager_hidden_states(name, model, tokens, [8] * 3)[-1].square().sum(), parameters)
    apply_token_merging(model, 8)
    output = model(images(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), parameters), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_gives_the_same(name: str) -> None:
    model = apply_token_merging(make_encoder("ViT"), 8)
    expected = model(images()).last_hidden_state
    model.set_attn_implementation(name)
    assert torch.equal(model(images()).last_hidden_state, expected)
    # Conversions do not depend on it either.
    other = make_encoder("ViT")
    other.set_attn_implementation(name)
    assert torch.equal(apply_token_merging(other, 8)(images()).last_hidden_state, expected)


# ---- how many tokens, and where ---------------------------------------------------------------------


@EVERY_ENCODER
def test_tokens_of_each_layer(name: str) -> None:
    model = apply_token_merging(make_encoder(name), [0, 9, 4])
    tokens = 64 + ENCODERS[name].prefix
    lengths = mlp_lengths(name, model)
    output = model(images(), output_hidden_states=True)
    assert lengths == [tokens, tokens - 9, tokens - 13]
    assert [state.shape[1] for state in output.hidden_states] == [tokens] * 4


@EVERY_ENCODER
def test_layers_before_the_first_merge_stay(name: str) -> None:
    model = make_encoder(name)
    expected = model(images(), output_hidden_states=True).hidden_states
    apply_token_merging(model, [0, 0, 9])
    hidden_states = model(images(), output_hidden_states=True).hidden_states
    assert all(torch.equal(*pair) for pair in zip(hidden_states[:3], expected[:3], strict=True))
    assert not torch.allclose(hidden_states[3], expected[3])


@pytest.mark.parametrize("name", ["ViT", "Dinov2WithRegisters"])
def test_prefix_tokens_stay(name: str) -> None:
    """Whatever merges, each of them stands for itself alone, and the patches are few."""
    prefix = ENCODERS[name].prefix
    state = apply_token_merging(make_encoder(name), 100)(images(), output_hidden_states=True).hidden_states[-1]
    for image in range(2):
        rows = [tuple(row.tolist()) for row in state[image]]
        assert all(rows.count(row) == 1 for row in rows[:prefix])
        assert len(set(rows)) == prefix + 8
        assert len(set(rows[prefix:])) == 8


# ---- models around an encoder -------------------------------------------------------------------------


def classifier(name: str) -> Callable[[], nn.Module]:
    return lambda: make_encoder(name, f"{name}ForImageClassification", num_labels=5)


def clip() -> nn.Module:
    text = {**ENCODERS["CLIPVision"].options, "vocab_size": 20, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=ENCODERS["CLIPVision"].options, projection_dim=8)
    return transformers.CLIPModel(config).eval().double()


@pytest.mark.parametrize(
    ("make", "run", "encoder"),
    [
        (classifier("ViT"), lambda model: model(images()).logits, lambda model: model.vit),
        (classifier("Dinov2"), lambda model: model(images()).logits, lambda model: model.dinov2),
        (clip, lambda model: model.get_image_features(images()).pooler_output, lambda model: model.vision_model),
    ],
    ids=["ViT", "Dinov2", "CLIP"],
)
def test_models_with_an_encoder(make: Callable[[], Any], run: Callable[[Any], Tensor], encoder: Any) -> None:
    torch.manual_seed(0)
    model = make()
    full = run(model)
    alone = copy.deepcopy(model)
    apply_token_merging(encoder(alone), 16)
    output = run(apply_token_merging(model, 16))
    assert torch.equal(output, run(alone))
    assert not torch.allclose(output, full)


@pytest.mark.parametrize("vision", ["CLIPVision", "SiglipVision"])
@pytest.mark.parametrize("layer", [-2, [-3, -1]], ids=str)
def test_llava(vision: str, layer: Any) -> None:
    """Its language model takes the hidden states of a layer of the encoder, with every patch in its place."""
    strategy = "default" if vision == "CLIPVision" else "full"
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED).to_dict(),
        vision_config=ENCODERS[vision].options
        | {"model_type": "clip_vision_model" if vision == "CLIPVision" else "siglip_vision_model"},
        image_token_id=3,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[3] * 64, 5, 7]] * 2)
    full = model(input_ids=ids, pixel_values=images().float()).logits
    apply_token_merging(model, 9)
    lengths = mlp_lengths(vision, model.model.vision_tower)
    merged = model(input_ids=ids, pixel_values=images().float()).logits
    prefix = ENCODERS[vision].prefix
    assert lengths == [55 + prefix, 46 + prefix, 37 + prefix]
    assert merged.shape == full.shape and not torch.allclose(merged, full)

    tower = model.model.vision_tower
    states = tower(images().float(), output_hidden_states=True).hidden_states
    chosen = torch.cat([states[index][:, prefix:] for index in ([layer] if isinstance(layer, int) else layer)], -1)
    features = model.model.get_image_features(pixel_values=images().float()).pooler_output
    torch.testing.assert_close(torch.stack(list(features)), model.model.multi_modal_projector(chosen))
    step = model.generate(input_ids=ids, pixel_values=images().float(), max_new_tokens=2, do_sample=False)
    assert step.shape == (2, 69)


# ---- training ----------------------------------------------------------------------------------------


def test_training() -> None:
    torch.manual_seed(0)
    options = {**ENCODERS["ViT"].options, "num_labels": 5}
    model = apply_token_merging(transformers.ViTForImageClassification(transformers.ViTConfig(**options)), 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(model(images(8).float(), labels=torch.arange(8) % 5).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Also when two passes come before the backward: a layer run again must find its own pass's sizes."""
    options = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.2}
    model = apply_token_merging(make_encoder("Dinov2WithRegisters", **options), [0, 9, 4]).train()

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        first, second = model(images(seed=1)).last_hidden_state, model(images(seed=2)).last_hidden_state
        (first.square().sum() + second.sin().sum()).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    lengths = mlp_lengths("Dinov2WithRegisters", model)
    assert all(torch.equal(*pair) for pair in zip(gradients(), expected, strict=True))
    assert len(lengths) == 2 * 2 * 3  # each layer again for each pass


def test_attention_dropout() -> None:
    """Too rare to be seen, it leads another way."""
    model = make_encoder("ViT", attention_probs_dropout_prob=1e-9)
    apply_token_merging(model, 8)
    expected = model(images()).last_hidden_state
    torch.testing.assert_close(model.train()(images()).last_hidden_state, expected)


def test_passes_do_not_depend_on_each_other() -> None:
    model = apply_token_merging(make_encoder("CLIPVision"), 8)
    first = model(images()).last_hidden_state
    model(images(3, seed=1))
    assert torch.equal(model(images()).last_hidden_state, first)


def test_half_precision() -> None:
    model = apply_token_merging(make_encoder("ViT"), 8).float()
    expected = model(images().float()).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(images().float()).last_hidden_state
    converted = model.bfloat16()(images().bfloat16()).last_hidden_state
    for output in (lowered, converted):
        # Pairs to merge may differ.
        assert F.cosine_similarity(output.float(), expected, dim=-1).mean() > 0.97
