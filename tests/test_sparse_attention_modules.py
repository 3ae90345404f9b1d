"""torchops.nn.PQAttention and SparseAttention, the loss of their codebooks, and how these are fitted."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchops
from torchops.nn import PQAttention, SparseAttention, calibrate_codebooks, ignored_padding, quantization_loss
from torchops.reference import span_attention as full
from torchops.reference import sparse_attention as reference

SETTINGS: dict[str, dict[str, Any]] = {
    "share": {"keep": 0.3, "num_kv_heads": 2},
    "number": {"keep": 3, "is_causal": False, "sink_keys": 1, "local_keys": 2, "sink": True, "bias": False},
}
SMALL: dict[str, Any] = {"num_codewords": 4, "subspace": 2}


def scripted_copy(module: nn.Module) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def clusters(count: int, dim: int, num_clusters: int = 4) -> Tensor:
    """Vectors [count, dim] that lie near a few points in each pair of features."""
    points = 4 * torch.randn(dim // 2, num_clusters, 2)
    chosen = torch.randint(num_clusters, (count, dim // 2))
    return (points[torch.arange(dim // 2), chosen] + 0.01 * torch.randn(count, dim // 2, 2)).flatten(1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_module_scripts_exports_and_compiles(name: str, training: bool) -> None:
    module = SparseAttention(16, 4, **SETTINGS[name], **SMALL).train(training)
    padding, start = torch.arange(11).expand(2, 11) < 3, torch.tensor([-3, -3])
    for inputs in ((torch.randn(2, 11, 16),), (torch.randn(2, 11, 16), padding, start)):
        expected = module(*inputs)
        assert torch.equal(scripted_copy(module)(*inputs), expected)
        assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs), expected)
        if not training:
            assert torch.equal(torch.export.export(module, inputs).module()(*inputs), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_module_by_hand(name: str) -> None:
    settings = SETTINGS[name]
    module = SparseAttention(12, 6, **settings, **SMALL).double()
    input = torch.randn(2, 9, 12, dtype=torch.float64)

    def heads(projection: nn.Linear) -> Tensor:
        return projection(input).view(2, 9, -1, 2).transpose(1, 2)

    query, key, value = heads(module.q_proj), heads(module.k_proj), heads(module.v_proj)
    codes = [reference.pq_encode(vectors, module.attend.codebooks) for vectors in (query, key)]
    output = reference.pq_attention(
        query,
        key,
        value,
        *codes,
        3,
        settings.get("is_causal", True),
        sink_keys=settings.get("sink_keys", 0),
        local_keys=settings.get("local_keys", 0),
        sink=module.sink,
    )
    torch.testing.assert_close(module(input), module.out_proj(output.transpose(1, 2).reshape(2, 9, 12)))
    losses = [reference.pq_loss(vectors, module.attend.codebooks) for vectors in (query, key)]
    torch.testing.assert_close(quantization_loss(module), sum(losses))
    (module(input).square().sum() + quantization_loss(module)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_all_keys_kept_is_full_attention() -> None:
    query, key, value = torch.randn(3, 2, 2, 9, 4, dtype=torch.float64)
    for keep in (1.0, 9, 100):
        attend = PQAttention(4, keep=keep, **SMALL).double()
        expected = full.span_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(attend(query, key, value, is_causal=True), expected)
    no_keys = PQAttention(4, keep=0.01, **SMALL).double()(query, key[:, :, :0], value[:, :, :0])
    assert torch.equal(no_keys, torch.zeros_like(query))


def test_module_gives_padded_rows_what_they_give_alone() -> None:
    module = SparseAttention(8, 2, keep=3, sink_keys=1, **SMALL).double()
    input = torch.randn(2, 9, 8, dtype=torch.float64)
    padding = torch.arange(9) < torch.tensor([[3], [0]])
    output = module(input, padding, torch.tensor([-3, 0]))
    torch.testing.assert_close(output[:1, 3:], module(input[:1, 3:]))
    torch.testing.assert_close(output[1:], module(input[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_in_low_precision(dtype: torch.dtype) -> None:
    module = SparseAttention(16, 4, keep=5, sink=True, **SMALL).to(dtype)
    output = module(torch.randn(2, 11, 16, dtype=dtype))
    assert output.dtype == dtype
    (output.sum() + quantization_loss(module)).backward()
    assert module.sink.grad.dtype == module.attend.codebooks.grad.dtype == dtype


def test_a_model_that_has_computed_is_copied_and_saved() -> None:
    module = SparseAttention(16, 4, keep=5, **SMALL)
    input = torch.randn(2, 11, 16)
    module(input).sum().backward()
    other = copy.deepcopy(module)
    assert other.attend.quantization_loss is None and module.attend.quantization_loss is not None
    assert torch.equal(other(input), module(input))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(input), module(input))
    assert set(module.state_dict()) == {
        *(f"{name}_proj.{kind}" for name in ("q", "k", "v", "out") for kind in ("weight", "bias")),
        "attend.codebooks",
    }


def test_checkpoints() -> None:
    module = SparseAttention(16, 4, keep=5, **SMALL)
    input = torch.randn(2, 11, 16, requires_grad=True)
    (module(input).sum() + quantization_loss(module)).backward()
    expected, module.attend.codebooks.grad = module.attend.codebooks.grad, None
    output = torch.utils.checkpoint.checkpoint(module, input, use_reentrant=False)
    (output.sum() + quantization_loss(module)).backward()
    torch.testing.assert_close(module.attend.codebooks.grad, expected)
    torch.utils.checkpoint.checkpoint(module, input, use_reentrant=True)
    with pytest.raises(ValueError, match="expected losses with gradients, got one without for attend"):
        quantization_loss(module)


def test_losses_that_there_are_not() -> None:
    module = SparseAttention(16, 4, keep=5, **SMALL)
    message = r"quantization_loss: expected a model with PQAttention that has computed in training mode, got {} such"
    with pytest.raises(ValueError, match=message.format(1)):
        quantization_loss(module)
    module.eval()(torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match=message.format(1)):
        quantization_loss(module)
    module.train().attend.codebooks.requires_grad_(False)
    module(torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match=message.format(1)):
        quantization_loss(module)
    with pytest.raises(ValueError, match=message.format(0)):
        quantization_loss(nn.Linear(2, 2))


# ---- calibration --------------------------------------------------------------------------------------


def test_codebooks_find_clusters() -> None:
    torch.manual_seed(0)
    vectors = clusters(2000, 8).view(1, 2, 1000, 8)
    attend = PQAttention(8, keep=10, **SMALL)
    before = torchops.pq_loss(vectors, attend.codebooks).item()
    losses = calibrate_codebooks(attend, lambda attend: attend(vectors, key=vectors, value=vectors))
    assert losses[""] == pytest.approx(torchops.pq_loss(vectors, attend.codebooks).item(), rel=0.1)
    distance = torchops.pq_loss(vectors, attend.codebooks).item()
    assert distance < 0.01 * before
    assert attend.keep == 10 and attend.training


def test_layers_see_full_attention_while_they_are_calibrated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseAttention(16, 2, keep=1, **SMALL), SparseAttention(16, 2, keep=1, **SMALL)).double()
    first = model[0]
    input = torch.randn(2, 40, 16, dtype=torch.float64)
    inputs: list[Tensor] = []
    hook = model[1].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    calibrate_codebooks(model, lambda model: model(input))
    hook.remove()
    heads = [first.heads(projection(input)) for projection in (first.q_proj, first.k_proj, first.v_proj)]
    torch.testing.assert_close(inputs[0], first.output(full.span_attention(*heads, is_causal=True)))
    assert (inputs[0] - model[0](input)).abs().max() > 0.01, "one key is less than all"


def test_calibration_is_repeatable_and_takes_several_passes() -> None:
    model, other = (PQAttention(4, keep=2, **SMALL) for _ in range(2))
    optimized = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = torch.randn(3, 3, 1, 2, 50, 4)

    def passes(model: nn.Module) -> None:
        for query, key, value in batches:
            model(query, key, value)

    assert calibrate_codebooks(model, passes, rows=100) == calibrate_codebooks(other, passes, rows=100)
    assert torch.equal(model.codebooks, other.codebooks)
    assert optimized.param_groups[0]["params"][0] is model.codebooks


def test_padding_does_not_count() -> None:
    model, other = (PQAttention(4, keep=2, **SMALL) for _ in range(2))
    heads, padding = torch.randn(2, 3, 20, 4), torch.arange(20) >= torch.tensor([[20], [5]])

    def padded(model: nn.Module) -> None:
        with ignored_padding(padding):
            model(*[heads.masked_fill(padding[:, None, :, None], torch.nan)] * 3)

    def alone(model: nn.Module) -> None:
        tokens = heads.transpose(1, 2)[~padding].transpose(0, 1)[None]
        model(tokens, tokens, tokens)

    assert calibrate_codebooks(model, padded) == calibrate_codebooks(other, alone)
    assert torch.equal(model.codebooks, other.codebooks)


def test_fewer_vectors_than_codewords() -> None:
    attend = PQAttention(4, keep=2, num_codewords=16, subspace=2)
    vectors = torch.ones(1, 1, 3, 4)
    calibrate_codebooks(attend, lambda attend: attend(vectors, vectors, vectors))
    torch.testing.assert_close(attend.codebooks, torch.ones_like(attend.codebooks))


def test_calibrations_that_are_refused() -> None:
    attend = PQAttention(4, keep=2, **SMALL)
    before = attend.codebooks.clone()
    with pytest.raises(ValueError, match="calibrate_codebooks: expected a model with PQAttention, Linear has none"):
        calibrate_codebooks(nn.Linear(2, 2), lambda model: None)
    with pytest.raises(ValueError, match="expected the calibration to reach PQAttention, which it does not"):
        calibrate_codebooks(attend, lambda model: None)
    bad = torch.full((1, 1, 3, 4), torch.nan)
    with pytest.raises(ValueError, match="expected finite queries and keys, got others in PQAttention"):
        calibrate_codebooks(attend, lambda model: model(bad, bad, bad))
    with pytest.raises(ZeroDivisionError):
        calibrate_codebooks(attend, lambda model: 1 // 0)
    assert attend.keep == 2 and attend.training and torch.equal(attend.codebooks, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep to be a number of keys or a share in \(0, 1\], got 0"),
        ({"keep": 1.5}, r"keep to be a number of keys or a share in \(0, 1\], got 1.5"),
        ({"subspace": 3}, "head_dim to be a multiple of subspace = 3, got 8"),
        ({"head_dim": 256, "subspace": 1}, "head_dim / subspace to be at most 253, got 256"),
        ({"num_codewords": 257}, r"num_codewords in 1..256, got 257"),
        ({"sink_keys": -1}, "sink_keys >= 0, got -1"),
        ({"local_keys": -2}, "local_keys >= 0, got -2"),
    ],
)
def test_sizes_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PQAttention: expected {message}"):
        PQAttention(**{"head_dim": 8, **options})


def test_heads_that_are_refused() -> None:
    with pytest.raises(ValueError, match="SparseAttention: expected embed_dim to be a multiple of num_heads = 3"):
        SparseAttention(16, 3)
    with pytest.raises(ValueError, match="SparseAttention: expected num_heads to be a multiple of num_kv_heads = 3"):
        SparseAttention(16, 4, num_kv_heads=3)


def test_settings_are_shown() -> None:
    shown = repr(SparseAttention(16, 2, keep=0.25, local_keys=4))
    assert "is_causal=True, sink=False" in shown
    assert "head_dim=8, keep=0.25, num_codewords=16, subspace=8, sink_keys=0, local_keys=4" in shown
