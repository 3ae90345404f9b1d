"""Token merging in timm's Vision Transformers as programs: compiled, exported, scripted and traced."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm", exc_type=ImportError)

from timm.models import get_notrace_functions, get_notrace_modules  # noqa: E402
from timm_models import images, make  # noqa: E402

from torchops.integrations.timm import TokenMergingBlock, apply_token_merging, remove_token_merging  # noqa: E402

DISTILLED = {"cls": timm.models.deit.VisionTransformerDistilled}
EVERY_NORM = {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.5, "pre_norm": True}
# Options of the model, and r of its blocks.
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "every-block": ({"depth": 2}, 8),
    "some-blocks": ({"global_pool": "avg", "fc_norm": False, "depth": 4}, [0, 8, 0, 4]),
    "distilled-registers": ({**DISTILLED, "reg_tokens": 2, "depth": 2}, 8),
    "every-norm": ({**EVERY_NORM, "depth": 2}, 8),
    "torch-norm": ({"norm_layer": nn.LayerNorm, "global_pool": "avg", "fc_norm": False, "depth": 2}, 8),
    "no-norm": ({"norm_layer": nn.Identity, "global_pool": "map", "class_token": False, "depth": 2}, 8),
}


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    """Scripted, saved and loaded."""
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(model), saved)
    saved.seek(0)
    return torch.jit.load(saved)


class LeafBlocks(torch.fx.Tracer):
    """Knows nothing of what is in the blocks."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, TokenMergingBlock) or super().is_leaf_module(module, name)


def traced_around_blocks(model: nn.Module) -> nn.Module:
    return torch.fx.GraphModule(model, LeafBlocks().trace(model))


def features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """By node name, as timm's FeatureGraphNet takes them: here the last one, the logits."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    names = [nodes[-1] for nodes in extraction.get_graph_node_names(model, tracer_kwargs=options)]
    extractor = extraction.create_feature_extractor(
        model, train_return_nodes=names[:1], eval_return_nodes=names[1:], tracer_kwargs=options
    )
    return lambda image: extractor.eval()(image)[names[1]]


FORMS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "script": scripted,
    "jit-trace": lambda model: torch.jit.trace(model, images()),
    "fx": torch.fx.symbolic_trace,
    "fx-around-blocks": traced_around_blocks,
    "fx-script": lambda model: scripted(torch.fx.symbolic_trace(model)),
    "features": features,
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in MODELS for form in ("script", "fx")),
        *(("some-blocks", form) for form in FORMS if form not in ("script", "fx")),
    ],
)
def test_programs_equal_the_model(name: str, form: str) -> None:
    options, r = MODELS[name]
    model = apply_token_merging(make(**options), r)
    expected = model(images())
    assert torch.equal(FORMS[form](model)(images()), expected)
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("form", ["script", "fx", "fx-script"])
def test_programs_have_any_batch_and_gradients(form: str) -> None:
    model = apply_token_merging(make(depth=2), 8)
    program = FORMS[form](model)
    assert program.state_dict().keys() == model.state_dict().keys()
    gradients = []
    for run in (model, program):
        run.zero_grad()
        run(images(3)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in run.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient)


def test_script_in_training_mode() -> None:
    """With attention dropout, which takes another way."""
    model = apply_token_merging(make(depth=2, attn_drop_rate=0.3, drop_path_rate=0.2, proj_drop_rate=0.1), 8).train()
    torch.manual_seed(1)
    expected = model(images())
    program = torch.jit.script(model)
    torch.manual_seed(1)
    torch.testing.assert_close(program(images()), expected)


def test_script_of_parts() -> None:
    model = apply_token_merging(make(depth=3), [0, 8, 8])

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.forward_features(x)

    assert torch.equal(torch.jit.script(Encoder())(images()), model.forward_features(images()))
    program = torch.jit.script(model)
    tokens = torch.randn(2, 65, 24)
    assert program.blocks(tokens).shape == tokens.shape
    assert torch.equal(program.norm(program.blocks(tokens)), model.norm(model.blocks(tokens)))
    assert torch.equal(getattr(program.blocks, "0")(tokens), model.blocks[0](tokens))
    with pytest.raises(torch.jit.Error, match="in TorchScript a block cannot be called by itself"):
        getattr(program.blocks, "2")(tokens)


@pytest.mark.parametrize("form", ["script", "fx", "fx-around-blocks", "fx-script"])
def test_programs_refuse_masks(form: str) -> None:
    program = FORMS[form](apply_token_merging(make(depth=2), 8))
    for options in ({"attn_mask": torch.ones(65, 65, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises((ValueError, torch.jit.Error), match="attn_mask and is_causal cannot be followed"):
            program(images(), **options)


def test_script_refuses_hooks_of_blocks() -> None:
    """They would not be called."""
    model = apply_token_merging(make(depth=2), 8)
    model.blocks[1].register_forward_hook(lambda block, args, output: output)
    with pytest.raises(NotImplementedError, match="hooks of a block cannot be scripted"):
        torch.jit.script(model)


def test_scripting_and_tracing_leave_the_model() -> None:
    model = make(depth=2)
    expected = model(images())
    apply_token_merging(model, 8)
    for form in ("script", "fx"):
        FORMS[form](model)
    assert torch.equal(remove_token_merging(model)(images()), expected)
    assert torch.equal(torch.jit.script(model)(images()), expected)


def test_compile() -> None:
    torch._dynamo.reset()
    model = apply_token_merging(make(depth=2, global_pool="avg"), 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(images())
        output.square().sum().backward()
        gradients.append([output.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch._dynamo.reset()


def test_export() -> None:
    model = apply_token_merging(make(depth=2), 8)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(program(images(3)), model(images(3)))
