"""torchops.nn.SpanAttention, and the spans of a mixed stack."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchops.nn import SpanAttention, mixed_span, visible_pairs
from torchops.reference import span_attention as reference


@pytest.mark.parametrize(("full_layers", "share"), [(4, 0.271), (6, 0.344), (8, 0.417)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_cost_of_a_mixed_stack(full_layers: int, share: float, is_causal: bool) -> None:
    spans = mixed_span(24, range(full_layers), block_size=1024, is_causal=is_causal)
    pairs = sum(visible_pairs(8192, **span) for span in spans)
    assert pairs / (24 * visible_pairs(8192, is_causal=is_causal)) == pytest.approx(share, abs=5e-4)


def test_mixed_span_takes_any_layers() -> None:
    spans = mixed_span(5, [0, 2, -1], left=9, right=0, is_causal=True)
    assert [span["left"] for span in spans] == [-1, 9, -1, 9, -1]
    assert all(span["is_causal"] for span in spans)
    spans[1]["left"] = 3
    assert spans[3]["left"] == 9, "layers do not share their settings"
    for layer in (5, -6):
        with pytest.raises(ValueError, match=f"mixed_span: expected full_layers in -5..4, got {layer}"):
            mixed_span(5, [layer])


SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"left": 5, "right": 0, "is_causal": True, "num_kv_heads": 2},
    "blocks-sink": {"block_size": 4, "left": 0, "right": 0, "sink": True, "bias": False},
}


def scripted_copy(module: nn.Module) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("name", SETTINGS)
def test_module_scripts_exports_and_compiles(name: str) -> None:
    module = SpanAttention(16, 4, **SETTINGS[name])
    padding, start = torch.arange(11).expand(2, 11) < 3, torch.tensor([-3, -3])
    for inputs in ((torch.randn(2, 11, 16),), (torch.randn(2, 11, 16), padding, start)):
        expected = module(*inputs)
        assert torch.equal(scripted_copy(module)(*inputs), expected)
        assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs), expected)
        exported = torch.export.export(module, inputs).module()
        assert torch.equal(exported(*inputs), expected)


def test_module_by_hand() -> None:
    module = SpanAttention(12, 6, block_size=2, left=1, right=0, is_causal=True, num_kv_heads=3, sink=True).double()
    nn.init.normal_(module.sink)
    assert module.k_proj.out_features == module.v_proj.out_features == 6
    input = torch.randn(2, 9, 12, dtype=torch.float64)

    def heads(projection: nn.Linear) -> Tensor:
        return projection(input).view(2, 9, -1, 2).transpose(1, 2)

    output = reference.span_attention(
        heads(module.q_proj), heads(module.k_proj), heads(module.v_proj), 2, 1, 0, True, sink=module.sink
    )
    torch.testing.assert_close(module(input), module.out_proj(output.transpose(1, 2).reshape(2, 9, 12)))
    module(input).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert "block_size=2, left=1, right=0, is_causal=True, sink=True" in repr(module)


def test_module_gives_padded_rows_what_they_give_alone() -> None:
    module = SpanAttention(8, 2, block_size=4, left=0, right=0, is_causal=True).double()
    input = torch.randn(2, 9, 8, dtype=torch.float64)
    padding = torch.arange(9) < torch.tensor([[3], [0]])
    output = module(input, padding, torch.tensor([-3, 0]))
    torch.testing.assert_close(output[:1, 3:], module(input[:1, 3:]))
    torch.testing.assert_close(output[1:], module(input[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_in_low_precision(dtype: torch.dtype) -> None:
    module = SpanAttention(16, 4, left=5, sink=True).to(dtype)
    padding = torch.arange(11).expand(2, 11) < 3
    output = module(torch.randn(2, 11, 16, dtype=dtype), padding)
    assert output.dtype == dtype
    output.sum().backward()
    assert module.sink.grad.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3), "expected embed_dim to be a multiple of num_heads = 3, got 10"),
        ((12, 4, 3), "expected num_heads to be a multiple of num_kv_heads = 3, got 4"),
        ((12, 4, 0), "expected num_heads to be a multiple of num_kv_heads = 0, got 4"),
    ],
)
def test_module_refuses(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"SpanAttention: {message}"):
        SpanAttention(*arguments[:2], num_kv_heads=arguments[2] if len(arguments) > 2 else None)
