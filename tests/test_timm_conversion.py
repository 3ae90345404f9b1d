"""Token merging in timm's Vision Transformers: conversion, its reversal, and what is refused."""

import copy
import doctest
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_state import state_of
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm", exc_type=ImportError)

from timm.layers.attention import Attention  # noqa: E402
from timm.models import vision_transformer as vit  # noqa: E402
from timm_models import block_outputs, images, make  # noqa: E402

from torchops.integrations.timm import (  # noqa: E402
    TokenMergingBlock,
    apply_token_merging,
    remove_token_merging,
)

# ---- there and back ------------------------------------------------------------------------------


def test_zero_is_the_original() -> None:
    model = make()
    expected, untouched = model(images()), state_of(model)
    for r in (0, [0] * 4, (0, 0.0)):
        apply_token_merging(model, 8)
        apply_token_merging(model, r)
        assert torch.equal(model(images()), expected)
        assert state_of(model) == untouched


def test_blocks_before_the_first_merge_are_the_original() -> None:
    model = make()
    expected = block_outputs(model)
    model(images())
    merging = apply_token_merging(copy.deepcopy(model), [0, 0, 4, 0])
    outputs = block_outputs(merging)
    merging(images())
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1], expected[1])
    mask = torch.ones(65, 65, dtype=torch.bool).tril()
    x = torch.randn(2, 65, 24)
    assert torch.equal(merging.blocks[1](x, attn_mask=mask), model.blocks[1](x, attn_mask=mask))


def test_calling_again_changes_r() -> None:
    model = make()
    apply_token_merging(model, 8)
    apply_token_merging(model, 3, proportional_attention=False)
    fresh = apply_token_merging(make(), 3, proportional_attention=False)
    assert torch.equal(model(images()), fresh(images()))
    assert state_of(model) == state_of(fresh)


def test_remove_restores() -> None:
    model = make(cls=timm.models.deit.VisionTransformerDistilled)
    expected, untouched = model(images()), state_of(model)
    assert apply_token_merging(model, 8) is model
    assert isinstance(model, timm.models.deit.VisionTransformerDistilled)
    assert remove_token_merging(model) is model
    assert state_of(model) == untouched
    assert torch.equal(model(images()), expected)
    assert state_of(remove_token_merging(model)) == untouched


def test_state_dict_is_unchanged() -> None:
    model = make()
    names = list(model.state_dict())
    apply_token_merging(model, 8)
    assert list(model.state_dict()) == names
    other = apply_token_merging(make(seed=1), 8)
    other.load_state_dict(make().state_dict())
    assert torch.equal(other(images()), model(images()))


def test_copies_and_pickles() -> None:
    model = apply_token_merging(make(), 8)
    expected = model(images())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is type(model)
        assert torch.equal(other(images()), expected)
        assert type(remove_token_merging(other)) is vit.VisionTransformer
    assert torch.equal(model(images()), expected)


# ---- what cannot be ------------------------------------------------------------------------------------


def with_other_block(index: int, block: nn.Module) -> nn.Module:
    model = make()
    model.blocks[index] = block
    return model


class OtherBlock(vit.Block):
    pass


class OtherAttention(Attention):
    pass


def with_patched_forward() -> nn.Module:
    model = make()
    model.blocks[3].attn.forward = model.blocks[3].attn.forward
    return model


@pytest.mark.parametrize(
    ("make_model", "found"),
    [
        (lambda: nn.Linear(3, 3), r"model is a torch\.nn\.modules\.linear\.Linear"),
        (
            lambda: timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=28),
            r"model is a timm\.models\.eva\.Eva",
        ),
        (
            lambda: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=32),
            r"model is a timm\.models\.beit\.Beit",
        ),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, num_heads=(1, 1, 1, 1)), "Swin"),
        (lambda: nn.DataParallel(make()), "model is a torch.nn.parallel.data_parallel.DataParallel"),
        (lambda: make(block_fn=vit.ParallelScalingBlock), r"blocks\[0\] is a .*\.ParallelScalingBlock"),
        (lambda: make(block_fn=vit.ResPostBlock), r"blocks\[0\] is a .*\.ResPostBlock"),
        (lambda: with_other_block(3, OtherBlock(24, 3)), r"blocks\[3\] is a test_timm_conversion\.OtherBlock"),
        (lambda: make(attn_layer="diff", embed_dim=24, num_heads=3), r"blocks\[0\]\.attn is a .*\.DiffAttention"),
        (lambda: with_other_block(3, vit.Block(24, 3, attn_layer=OtherAttention)), r"blocks\[3\]\.attn is a .*Other"),
        (with_patched_forward, r"blocks\[3\]\.attn has a forward of its own"),
    ],
)
def test_other_models_are_refused(make_model: Callable[[], nn.Module], found: str) -> None:
    model = make_model()
    before = state_of(model)
    with pytest.raises(TypeError, match=f"token merging: .*{found}.* Supported are .*VisionTransformer"):
        apply_token_merging(model, 8)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("r", "error"),
    [
        (-1, ValueError),
        ([8, 8, 8], ValueError),
        ([8, 8, 8, -8], ValueError),
        ((8, 2.0), ValueError),  # a schedule that falls below 0
        (1.5, TypeError),
        ("8", TypeError),
        (None, TypeError),
        ((8, 0.0, 1), TypeError),
        ([8, 8, 8, 0.5], TypeError),
    ],
)
def test_other_r_are_refused(r: Any, error: type[Exception]) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(error, match="token merging: expected r "):
        apply_token_merging(model, r)
    assert state_of(model) == before
    apply_token_merging(model, 8)
    before = state_of(model)
    with pytest.raises(error, match="token merging: expected r "):
        apply_token_merging(model, r)
    assert state_of(model) == before
    assert [block.token_merger.r for block in model.blocks] == [8] * 4


def test_masks_are_refused() -> None:
    model = apply_token_merging(make(), 8)
    mask = torch.ones(65, 65, dtype=torch.bool)
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask and is_causal cannot be followed where tokens are merged"):
            model(images(), **options)
    with pytest.raises(ValueError, match="attn_mask"):
        model.get_intermediate_layers(images(), attn_mask=mask)
    assert torch.equal(remove_token_merging(model)(images(), attn_mask=mask), make()(images(), attn_mask=mask))


@pytest.mark.parametrize(
    "hook",
    [
        lambda block, args, output: output.clone(),
        lambda block, args, output: output[:, :40],
    ],
)
def test_tokens_from_elsewhere_are_refused(hook: Callable[..., Tensor]) -> None:
    model = apply_token_merging(make(), 8)
    handle = model.blocks[1].register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="not what the block before it returned"):
        model(images())
    handle.remove()
    model(images())
    with pytest.raises(RuntimeError, match="not what the block before it returned"):
        model.blocks[2](torch.randn(2, 49, 24))


def test_partly_replaced_blocks() -> None:
    """Calling again brings a model back in order whose owner exchanged parts of it."""
    model = apply_token_merging(make(), 8)
    expected = model(images())
    block = copy.deepcopy(make().blocks[2])
    model.blocks[2] = block
    model.norm = copy.deepcopy(make().norm)
    apply_token_merging(model, 8)
    assert type(block) is TokenMergingBlock
    assert torch.equal(model(images()), expected)
    model.blocks[2] = copy.deepcopy(make().blocks[2])
    assert state_of(remove_token_merging(model)) == state_of(make())


def test_examples() -> None:
    module = importlib.import_module("torchops.integrations.timm")
    assert module.__all__ == ["apply_token_merging", "remove_token_merging"]
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
