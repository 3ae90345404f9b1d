"""Token merging in timm's Vision Transformers: what comes out, for every kind of model and pass."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchops.reference import tokens as reference

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm", exc_type=ImportError)

from timm.layers.attention import Attention  # noqa: E402
from timm.models import vision_transformer as vit  # noqa: E402
from timm_models import block_outputs, counts, images, make  # noqa: E402

from torchops.integrations.timm import TokenMergingAttention, apply_token_merging  # noqa: E402

# ---- the whole pass, in eager PyTorch ------------------------------------------------------------


def eager_attention(attn: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = x.shape
    q, k, v = attn.qkv(x).view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    if size is not None:
        scores = scores + size.log()[:, None, None, :]
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = attn.norm(out)
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj(out), k.mean(1)


def eager_features(
    model: nn.Module, input: Tensor, r: list[int], proportional_attention: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged tokens before the last norm [B, M, C], their sizes [B, M], and the way back [B, N, M]."""
    num_protected = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(input)))
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    way_back = torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    for block, removed in zip(model.blocks, r, strict=True):
        update, metric = eager_attention(block.attn, block.norm1(x), size if proportional_attention else None)
        x = x + block.ls1(update)
        assign = reference.bipartite_assignment(metric, removed, num_protected)
        groups = reference.num_groups(x.shape[1], removed, num_protected)
        x, size = reference.merge_tokens(x, assign, groups, size)
        way_back = way_back @ F.one_hot(assign, groups).to(x.dtype)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, size, way_back


def with_gates(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attn.gate = nn.Linear(24, 24)
    return model


def unfused(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


EVERY_NORM = {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.5, "pre_norm": True}


@pytest.mark.parametrize(
    ("options", "r", "proportional_attention"),
    [
        ({}, [8, 8, 8, 8], True),
        ({}, [8, 8, 8, 8], False),
        ({}, [0, 9, 0, 7], True),
        ({}, [0, 9, 0, 7], False),
        ({}, [100, 0, 3, 100], True),  # clamped
        ({"reg_tokens": 4}, [8, 8, 8, 8], True),
        (EVERY_NORM, [8, 8, 8, 8], True),
        ({"cls": lambda **options: with_gates(vit.VisionTransformer(**options))}, [8, 8, 8, 8], True),
        ({"cls": lambda **options: unfused(vit.VisionTransformer(**options))}, [8, 8, 8, 8], True),
        ({"class_token": False, "global_pool": "avg"}, [8, 8, 8, 8], True),
        ({"cls": timm.models.deit.VisionTransformerDistilled}, [8, 8, 8, 8], True),
    ],
)
def test_equals_eager(options: dict[str, Any], r: list[int], proportional_attention: bool) -> None:
    model = make(**options).double()
    input = images(dtype=torch.float64)
    merged, _, way_back = eager_features(model, input, r, proportional_attention)
    features = model.norm(way_back @ merged)
    logits = model.forward_head(features)
    unmerged = model(input)

    apply_token_merging(model, r, proportional_attention=proportional_attention)
    outputs = block_outputs(model)
    torch.testing.assert_close(model(input), logits)
    torch.testing.assert_close(outputs[-1], merged)
    torch.testing.assert_close(model.forward_features(input), features)
    assert (unmerged - logits).abs().max() > 1e-3


def test_gradients_equal_eager() -> None:
    model = make().double()
    parameters = list(model.parameters())
    input = images(dtype=torch.float64)
    merged, _, way_back = eager_features(model, input, [8] * 4)
    expected = torch.autograd.grad(model.forward_head(model.norm(way_back @ merged)).square().sum(), parameters)
    apply_token_merging(model, 8)
    torch.testing.assert_close(torch.autograd.grad(model(input).square().sum(), parameters), expected)


def test_average_pooling_counts_patches() -> None:
    """As ToMe does for MAE: weighted by size."""
    model = make(global_pool="avg").double()
    input = images(dtype=torch.float64)
    merged, size, _ = eager_features(model, input, [12] * 4)
    pooled = (merged * size.unsqueeze(-1))[:, 1:].sum(1) / 64
    expected = model.head(model.fc_norm(pooled))
    torch.testing.assert_close(apply_token_merging(model, 12)(input), expected)


@pytest.mark.parametrize("global_pool", ["", "avg", "avgmax", "max", "token", "map", "prr"])
def test_every_pooling(global_pool: str) -> None:
    model = make(global_pool=global_pool).double()
    input = images(dtype=torch.float64)
    merged, _, way_back = eager_features(model, input, [8] * 4)
    expected = model.forward_head(model.norm(way_back @ merged))
    torch.testing.assert_close(apply_token_merging(model, 8)(input), expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_models_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=96, depth=3, num_classes=7).eval()
    input = images(size=96)
    merged, _, way_back = eager_features(model, input, [8] * 3)
    expected = model.forward_head(model.norm(way_back @ merged))
    tokens = 36 + model.num_prefix_tokens
    apply_token_merging(model, 8)
    assert counts(model, input) == [tokens - 8, tokens - 16, tokens - 24]
    torch.testing.assert_close(model(input), expected)


# ---- how many tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (16, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
        ((16, 0), [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
        ((16, -1.0), [165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10]),
        ([16] + [0] * 10 + [5], [181] * 11 + [176]),
    ],
)
def test_published_token_counts(r: Any, expected: list[int]) -> None:
    model = make(img_size=224, patch_size=16, embed_dim=8, num_heads=1, depth=12)
    assert counts(apply_token_merging(model, r), images(1, 224)) == expected


def test_prefix_tokens_stay() -> None:
    """Whatever merges, the prefix is not part of it: each of its tokens stands for itself alone."""
    model = apply_token_merging(make(reg_tokens=2), 100)
    outputs = block_outputs(model)
    features = model.forward_features(images())
    assert outputs[-1].shape[1] < 10
    torch.testing.assert_close(features[:, :3], model.norm(outputs[-1][:, :3]))


# ---- nothing is left of a pass -----------------------------------------------------------------


def test_passes_do_not_depend_on_each_other() -> None:
    model = apply_token_merging(make(), 8)
    first = model(images())
    model(images(3, seed=1))
    assert torch.equal(model(images()), first)
    assert torch.equal(model.forward_head(model.forward_features(images())), first)


def test_interleaved_passes() -> None:
    model = apply_token_merging(make(), 8)
    inputs = images(seed=1), images(seed=2)
    passes = [model._pos_embed(model.patch_embed(input)) for input in inputs]
    for block in model.blocks:
        passes = [block(x) for x in passes]
    for x, input in zip(passes, inputs, strict=True):
        assert torch.equal(model.forward_head(model.norm(x)), model(input))


# ---- timm's attention and block, as they are -------------------------------------------------------


def test_dropout_and_stochastic_depth() -> None:
    """Two tokens, one of them protected, cannot merge: what is left is timm's block, dropout and all."""
    model = make(attn_drop_rate=0.3, proj_drop_rate=0.2, drop_path_rate=0.4, init_values=0.5).train()
    x = torch.randn(8, 2, 24)
    torch.manual_seed(1)
    expected = model.blocks[3](x)
    apply_token_merging(model, [0, 0, 0, 5])
    torch.manual_seed(1)
    torch.testing.assert_close(model.blocks[3](x), expected)


def test_attention_without_merging_is_timms() -> None:
    attention = Attention(24, num_heads=3)
    x = torch.randn(2, 9, 24)
    mask = torch.randn(2, 1, 1, 9)
    expected = attention(x), attention(x, attn_mask=mask), attention(x, is_causal=True)
    attention.__class__ = TokenMergingAttention
    assert torch.equal(attention(x), expected[0])
    assert torch.equal(attention(x, attn_mask=mask), expected[1])
    assert torch.equal(attention(x, is_causal=True), expected[2])


@pytest.mark.parametrize("drop", [0.0, 1e-9])
def test_attention_with_a_bias_is_timms_with_a_mask(drop: float) -> None:
    """Also where attention dropout, too rare to be seen here, leads another way."""
    attention = Attention(24, 3, qk_norm=True, scale_norm=True, gated=True, attn_drop=drop, norm_layer=nn.LayerNorm)
    x, bias = torch.randn(2, 9, 24), torch.randn(2, 9)
    expected = attention(x), attention(x, attn_mask=bias[:, None, None])
    attention.__class__ = TokenMergingAttention
    keys: list[Tensor] = []
    torch.testing.assert_close(attention(x, keys=keys), expected[0])
    torch.testing.assert_close(attention(x, keys=keys, key_bias=bias), expected[1])
    assert [key.shape for key in keys] == [(2, 3, 9, 8)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bias_while_all_sizes_are_one(dtype: torch.dtype) -> None:
    model = apply_token_merging(make(), [0, 4, 4, 0]).to(dtype)
    biases: list[Tensor | None] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(
            lambda module, args, kwargs: biases.append(kwargs.get("key_bias")), with_kwargs=True
        )
    model(images(dtype=dtype))
    assert biases[:2] == [None, None]
    assert [bias.shape for bias in biases[2:]] == [(2, 61), (2, 57)]
    assert {bias.dtype for bias in biases[2:]} == {torch.float32}, "sizes are not rounded"


# ---- intermediate features -----------------------------------------------------------------------


def test_intermediates_are_unmerged() -> None:
    # 32 tokens of 24 channels would also go into an 8 x 8 map, of 12 channels, without complaint.
    model = apply_token_merging(make(), [0, 32, 0, 5])
    outputs = block_outputs(model)
    final, maps = model.forward_intermediates(images())
    merged = list(outputs)
    assert [len(output[0]) for output in merged] == [65, 33, 33, 28]
    assert [x.shape for x in maps] == [(2, 24, 8, 8)] * 4
    assert torch.equal(final, model.forward_features(images()))
    assert torch.equal(maps[0].flatten(2).mT, merged[0][:, 1:])
    for x, output in zip(maps[1:], merged[1:], strict=True):
        for image in range(2):
            rows = {tuple(row.tolist()) for row in x[image].flatten(1).mT}
            assert rows == {tuple(row.tolist()) for row in output[image, 1:]}

    normalized = model.forward_intermediates(images(), norm=True, intermediates_only=True)
    torch.testing.assert_close(normalized[-1].flatten(2).mT, final[:, 1:])
    torch.testing.assert_close(normalized[1].flatten(2).mT, model.norm(maps[1].flatten(2).mT))


@pytest.mark.parametrize("norm", [False, True])
def test_forms_of_intermediates(norm: bool) -> None:
    model = apply_token_merging(make(reg_tokens=1), 8)
    maps = model.forward_intermediates(images(), norm=norm, intermediates_only=True)
    rows = [x.flatten(2).mT for x in maps]
    for given, expected in zip(model.get_intermediate_layers(images(), 2, norm=norm), rows[2:], strict=True):
        assert torch.equal(given, expected)
    pairs = model.get_intermediate_layers(images(), [0, 2], reshape=True, return_prefix_tokens=True, norm=norm)
    assert torch.equal(pairs[1][0], maps[2])
    assert pairs[1][1].shape == (2, 2, 24)
    result = model.forward_intermediates(
        images(), [0, 1], norm=norm, stop_early=True, output_dict=True, return_prefix_tokens=True
    )
    assert torch.equal(result["image_intermediates"][1], maps[1])
    assert result["image_intermediates_prefix"][1].shape == (2, 2, 24)
    assert result["image_features"].shape == (2, 66, 24)
    with pytest.raises(AssertionError, match="Output format"):
        model.forward_intermediates(images(), output_fmt="NHWC")


# ---- training ----------------------------------------------------------------------------------------


def test_training() -> None:
    torch.manual_seed(0)
    model = apply_token_merging(vit.VisionTransformer(32, 4, embed_dim=24, depth=4, num_heads=3, num_classes=5), 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    input, target = images(8), torch.arange(8) % 5
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
        assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
        assert model.patch_embed.proj.weight.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_checkpointing(reentrant: bool, global_pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when two passes come before the backward: a block run again must find its own pass's sizes."""
    monkeypatch.setattr(timm.models._manipulate, "use_reentrant_ckpt", lambda: reentrant)
    model = apply_token_merging(make(global_pool=global_pool, drop_path_rate=0.2, proj_drop_rate=0.1), (8, -0.5))
    model.train()

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        first, second = model(images(seed=1)), model(images(seed=2))
        (first.square().sum() + second.sin().sum()).backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients()
    model.set_grad_checkpointing()
    runs: list[nn.Module] = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda norm, args, output: runs.append(norm))
    for given, other in zip(gradients(), expected, strict=True):
        assert torch.equal(given, other)
    assert len(runs) == 2 * 2 * 4  # each block again for each pass


def test_half_precision() -> None:
    model = make()
    # Pairs to merge may differ; without merging bfloat16 is 0.02 off.
    expected = apply_token_merging(model, 8)(images())
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(images())
    assert lowered.dtype == torch.bfloat16
    model.bfloat16()
    converted = model(images(dtype=torch.bfloat16))
    assert converted.dtype == torch.bfloat16
    for output in (lowered, converted):
        assert F.cosine_similarity(output.float(), expected).min() > 0.98
