"""torchops.nn.Router and RoutedFFN, the balance of blocks, and feed-forward layers cut into blocks."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchops.nn import RoutedFFN, Router, balance_loss
from torchops.nn.routed_ffn_calibration import active_together, balanced, fitted_router
from torchops.reference import routed_ffn as reference

SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gated": {"gated": True, "activation": "silu", "alpha": 1.702, "limit": 0.5, "up_offset": 1.0, "bias": False},
    "lora": {"activation": "gelu", "lora_rank": 3, "lora_scale": 0.5, "gate_at": "both"},
    "gated lora": {"gated": True, "lora_rank": 2, "recompute": True},
}
SCORES = ["sigmoid", "softmax", "softmax_topk"]


def layer(name: str = "relu", **options: Any) -> RoutedFFN:
    made = RoutedFFN(12, 24, num_blocks=4, top_k=2, **(SETTINGS[name] | options))
    for factor in (made.lora_b1, made.lora_b2):
        if factor is not None:
            nn.init.normal_(factor)
    return made


def scripted_copy(module: nn.Module) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


# ---- Router -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_router_by_hand(score: str, renormalize: bool) -> None:
    router = Router(6, 5, 3, score, renormalize=renormalize, bias=True).double()
    nn.init.normal_(router.bias)
    input = torch.randn(2, 7, 6, dtype=torch.float64)
    scores = input @ router.weight.T + router.bias
    order = scores.argsort(-1, descending=True)[..., :3]
    all_gates = {"sigmoid": scores.sigmoid(), "softmax": scores.softmax(-1), "softmax_topk": scores}[score]
    expected = all_gates.gather(-1, order)
    if score == "softmax_topk":
        expected = expected.softmax(-1)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    index, gates = router(input)
    assert index.dtype == torch.int64 and torch.equal(index, order)
    torch.testing.assert_close(gates, expected)


def test_of_equal_scores_the_lower_block_comes_first() -> None:
    for score in SCORES:
        router = Router(4, 300, 7, score)
        nn.init.zeros_(router.weight)
        assert torch.equal(router(torch.randn(50, 4))[0], torch.arange(7).expand(50, 7))


@pytest.mark.parametrize("score", SCORES)
def test_router_computes_in_float32(score: str) -> None:
    router = Router(64, 8, 3, score).bfloat16()
    input = torch.randn(100, 64).bfloat16()
    expected = copy.deepcopy(router).float()(input.float())
    assert expected[1].dtype == torch.float32
    scripted = scripted_copy(router)
    for chooses in (router, scripted, scripted):  # a scripted one is another from its second call on
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                index, gates = chooses(input)
            assert gates.dtype == torch.float32 and torch.equal(index, expected[0])
            torch.testing.assert_close(gates, expected[1])


def test_balance_bias_chooses_and_does_not_weigh() -> None:
    router = Router(6, 4, 2)
    input = torch.randn(30, 6)
    router.balance_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    index, gates = router(input)
    assert (index[:, 0] == 3).all()
    torch.testing.assert_close(gates, (input @ router.weight.T).sigmoid().gather(1, index))


@pytest.mark.parametrize("score", SCORES)
def test_straight_through_gates_are_ones_that_learn(score: str) -> None:
    router, plain = (Router(6, 4, 2, score, straight_through=through).double() for through in (True, False))
    plain.load_state_dict(router.state_dict())
    input, weights = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    gates = router(input)[1]
    assert torch.equal(gates, torch.ones_like(gates))
    (gates * weights).sum().backward()
    (plain(input)[1].log() * weights).sum().backward()
    torch.testing.assert_close(router.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_scores_that_are_far_apart(score: str, straight_through: bool) -> None:
    router = Router(1, 4, 3, score, straight_through=straight_through)
    router.weight.data = torch.tensor([[-500.0], [0.0], [-1000.0], [500.0]])
    index, gates = router(torch.tensor([[1.0], [-1.0]]))
    assert index.tolist() == [[3, 1, 0], [2, 0, 1]] or score == "sigmoid"  # where 1 and 1 are equal
    (gates.sum() + balance_loss(router)).backward()
    assert gates.isfinite().all() and router.weight.grad.isfinite().all()
    assert not straight_through or torch.equal(gates, torch.ones(2, 3))


@pytest.mark.parametrize("score", SCORES)
def test_balance_loss_by_hand(score: str) -> None:
    router = Router(6, 5, 2, score).double()
    input = torch.randn(3, 4, 6, dtype=torch.float64)
    index, _ = router(input)
    scores = input @ router.weight.T
    probabilities = (
        scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True) if score == "sigmoid" else scores.softmax(-1)
    )
    expected = 0.0
    for block in range(5):
        share = (index == block).sum() / 24
        expected = expected + 5 * share * probabilities[..., block].mean()
    torch.testing.assert_close(router.balance_loss, expected)
    torch.testing.assert_close(balance_loss(router), 0.01 * expected)
    balance_loss(router, weight=0.5).backward()
    assert router.weight.grad.abs().sum() > 0


def test_balance_loss_of_extremes() -> None:
    router = Router(2, 2, 1, "softmax")
    router.weight.data = 100 * torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    router(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert router.balance_loss.item() == pytest.approx(1.0)
    router(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert router.balance_loss.item() == pytest.approx(2.0)
    router(torch.zeros(0, 2))
    assert router.balance_loss.item() == 0.0


def test_update_balance_moves_the_bias_and_nothing_else_does() -> None:
    router = Router(6, 4, 2).bfloat16()
    assert router.balance_bias.dtype == torch.float32
    router(torch.randn(50, 6).bfloat16())
    assert not router.balance_bias.any()
    router.update_balance(torch.tensor([[0, 1], [0, 2], [0, 1], [-1, -1]]), rate=0.25)
    assert router.balance_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]  # the mean is 1.5
    router.update_balance(torch.tensor([[0, 1], [2, 3]]), rate=0.25)
    assert router.balance_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]
    assert torch.equal(router.double().balance_bias, router.half().balance_bias)


def test_update_balance_fills_all_blocks() -> None:
    torch.manual_seed(0)
    router, input = Router(8, 6, 2), torch.randn(300, 8) + 1
    counts = []
    for _ in range(300):
        counts.append(router(input)[0].flatten().bincount(minlength=6))
        router.update_balance(rate=0.01)
    assert counts[0].max() > 200 and counts[-1].max() < 120 and counts[-1].min() > 80


def test_what_routers_refuse() -> None:
    with pytest.raises(
        ValueError, match="Router: expected score to be one of sigmoid, softmax, softmax_topk, got 'tanh"
    ):
        Router(4, 4, 2, "tanh")
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=rf"Router: expected top_k in 1..num_blocks = 4, got {top_k}"):
            Router(4, 4, top_k)
    with pytest.raises(ValueError, match="Router.update_balance: expected score to be 'sigmoid', got 'softmax'"):
        Router(4, 4, 2, "softmax").update_balance()
    with pytest.raises(ValueError, match="Router.update_balance: expected index, or a forward pass in training"):
        Router(4, 4, 2).update_balance()
    with pytest.raises(
        ValueError, match="balance_loss: expected a model with Router that has computed in training mode"
    ):
        balance_loss(Router(4, 4, 2))


# ---- RoutedFFN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_layer_by_hand(name: str) -> None:
    module = layer(name).double()
    input = torch.randn(2, 5, 12, dtype=torch.float64)
    index, gates = module.router(input)
    options = {key: value for key, value in SETTINGS[name].items() if key not in ("gated", "bias", "lora_rank")}
    expected = reference.routed_ffn(
        input,
        index,
        gates,
        module.w1,
        module.w2,
        module.b1,
        module.b2,
        module.w_gate,
        module.lora_a1,
        module.lora_b1,
        module.lora_a2,
        module.lora_b2,
        glu="split" if module.w_gate is not None else "none",
        **options,
    )
    output = module(input)
    torch.testing.assert_close(output, expected)
    (output.square().sum() + balance_loss(module)).backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    if "lora" in name:
        assert trained == {"router.weight", "lora_a1", "lora_b1", "lora_a2", "lora_b2"}
    else:
        assert trained == {name for name, _ in module.named_parameters()}


def test_fresh_weights_vary_as_those_of_linear_layers() -> None:
    made, dense = RoutedFFN(64, 256, lora_rank=8), (nn.Linear(64, 256), nn.Linear(256, 64))
    assert made.w1.std().item() == pytest.approx(dense[0].weight.std().item(), rel=0.05)
    assert made.w2.std().item() == pytest.approx(dense[1].weight.std().item(), rel=0.05)
    assert not made.lora_b1.any() and not made.lora_b2.any() and made.lora_a1.any() and made.lora_a2.any()
    assert {name for name, parameter in made.named_parameters() if parameter.requires_grad} == {
        "router.weight",
        *(f"lora_{factor}" for factor in ("a1", "b1", "a2", "b2")),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_layer_scripts_exports_and_compiles(name: str, training: bool) -> None:
    module = layer(name).train(training)
    input = torch.randn(2, 11, 12)
    expected = module(input)
    torch.testing.assert_close(scripted_copy(module)(input), expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), expected)
    if not training:
        torch.testing.assert_close(torch.export.export(module, (input,)).module()(input), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_layer_in_low_precision(name: str) -> None:
    module = layer(name).bfloat16()
    output = module(torch.randn(2, 11, 12).bfloat16())
    assert output.dtype == torch.bfloat16
    (output.float().sum() + balance_loss(module)).backward()
    assert module.router.weight.grad.dtype == torch.bfloat16
    other = layer(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert other(torch.randn(2, 11, 12)).dtype == torch.bfloat16


def test_a_layer_that_has_computed_is_copied_and_saved() -> None:
    module = layer("lora")
    input = torch.randn(5, 12)
    module(input).sum().backward()
    other = copy.deepcopy(module)
    assert other.router.balance_loss is None and module.router.balance_loss is not None
    assert torch.equal(other(input), module(input))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(input), module(input))
    fresh = layer("lora")
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(input), module(input))


def test_checkpoints() -> None:
    module = layer()
    input = torch.randn(20, 12, requires_grad=True)
    (module(input).square().sum() + balance_loss(module)).backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    (checkpoint(module, input, use_reentrant=False).square().sum() + balance_loss(module)).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    checkpoint(module, input, use_reentrant=True)
    with pytest.raises(ValueError, match="expected losses with gradients, got one without for router"):
        balance_loss(module)


def test_what_layers_refuse() -> None:
    with pytest.raises(ValueError, match="RoutedFFN: expected hidden_dim to be a multiple of num_blocks = 4, got 25"):
        RoutedFFN(12, 25)
    with pytest.raises(ValueError, match="RoutedFFN: expected router to choose among 4 blocks, got 3"):
        RoutedFFN(12, 24, router=Router(12, 3, 2))


# ---- from_mlp -----------------------------------------------------------------------------------------


class Dense(nn.Module):
    def __init__(self, gated: bool = False, bias: bool = True, dim: int = 12, hidden: int = 24) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias), nn.Linear(hidden, dim)
        self.gate = nn.Linear(dim, hidden) if gated else None

    def forward(self, input: Tensor) -> Tensor:
        if self.gate is None:
            return self.fc2(nn.functional.relu(self.fc1(input)))
        return self.fc2(nn.functional.relu(self.gate(input)) * self.fc1(input))

    def routed(self, **options: Any) -> RoutedFFN:
        return RoutedFFN.from_mlp(self.fc1, self.fc2, w_gate=self.gate, **options)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_all_blocks_are_the_dense_layer(gated: bool, bias: bool, fitted: bool, lora_rank: int) -> None:
    dense = Dense(gated, bias).double()
    inputs = torch.randn(50, 12, dtype=torch.float64)
    made = dense.routed(num_blocks=3, top_k=3, lora_rank=lora_rank, calibration=inputs if fitted else None)
    torch.testing.assert_close(made(inputs), dense(inputs))
    frozen = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith(("w", "b")) for name in frozen) and bool(frozen) == bool(lora_rank)


def test_fewer_blocks_are_a_part_of_the_dense_layer() -> None:
    dense = Dense().double()
    inputs = torch.randn(50, 12, dtype=torch.float64)
    made = dense.routed(num_blocks=4, top_k=3)
    index = made.router(inputs)[0]
    left_out = 6 - index.sum(1)  # of 0 + 1 + 2 + 3
    hidden = dense.fc1(inputs).relu().view(50, 4, 6)
    hidden[torch.arange(50), left_out] = 0
    torch.testing.assert_close(made(inputs), dense.fc2(hidden.view(50, 24)))


def test_mode_dtype_and_what_is_frozen_are_passed_on() -> None:
    dense = Dense().bfloat16().eval()
    dense.fc1.weight.requires_grad_(False)
    dense.fc2.bias.requires_grad_(False)
    made = dense.routed()
    assert not made.training and {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    frozen = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    assert frozen == {"w1", "b2"}


def planted() -> tuple[Dense, Tensor]:
    """A layer whose hidden units are active in four groups, each for inputs in one of four directions."""
    torch.manual_seed(0)
    dense = Dense(dim=16, hidden=64)
    group = torch.randperm(64) % 4
    directions = 3 * torch.eye(4, 16)
    with torch.no_grad():
        dense.fc1.weight.copy_(directions[group] + 0.2 * torch.randn(64, 16))
        dense.fc1.bias.fill_(-3.0)
    inputs = directions[torch.randint(4, (2000,))] + 0.3 * torch.randn(2000, 16)
    return dense, inputs


def test_calibration_finds_groups_of_units_and_where_they_are_active() -> None:
    dense, inputs = planted()
    expected = dense(inputs)

    def error(**options: Any) -> float:
        made = dense.routed(num_blocks=4, top_k=1, **options)
        return ((made(inputs) - expected).norm() / (expected - expected.mean(0)).norm()).item()

    assert error(calibration=inputs[:500]) < 0.15 < 0.6 < error()


def test_calibration_is_repeatable_and_draws_nothing() -> None:
    dense, inputs = planted()
    state = torch.get_rng_state()
    made, again = (dense.routed(calibration=inputs).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(made[name], again[name]) for name in made)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense.routed(calibration=inputs).w1, made["w1"])


def test_clusters_have_equal_sizes() -> None:
    for num_blocks in (1, 2, 5):
        block = balanced(torch.randn(40, num_blocks))
        assert block.bincount(minlength=num_blocks).tolist() == [40 // num_blocks] * num_blocks
        units = active_together(torch.rand(40, 30), num_blocks)
        assert units.flatten().sort().values.tolist() == list(range(40))
    # Everyone wants the first one; those stay who would lose most.
    wishes = torch.tensor([[9.0, 8.0], [9.0, 1.0], [9.0, 7.0], [9.0, 2.0]])
    assert balanced(wishes).tolist() == [1, 0, 1, 0]


def test_router_is_fitted_to_inputs_that_are_not_centred() -> None:
    rows = torch.randn(500, 6) + 5
    norms = rows @ torch.randn(6, 4) + torch.randn(4)
    weight, bias = fitted_router(rows, norms)
    differences = norms - norms.mean(1, keepdim=True)
    torch.testing.assert_close(rows @ weight.T + bias, differences / differences.std(), rtol=0, atol=0.05)


def test_units_that_are_never_active() -> None:
    dense = Dense()
    nn.init.constant_(dense.fc1.bias, -100.0)
    inputs = torch.randn(20, 12)
    torch.testing.assert_close(dense.routed(calibration=inputs)(inputs), dense(inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fc2": nn.Linear(25, 12)}, "expected fc2 from 24 to 12 features to match fc1, got 25 to 12"),
        ({"w_gate": nn.Linear(12, 23)}, "expected w_gate from 12 to 24 features to match fc1, got 12 to 23"),
        ({"calibration": torch.randn(5, 13)}, r"expected calibration of shape \[..., 12\], got \[5, 13\]"),
        ({"calibration": torch.randn(0, 12)}, r"expected calibration of shape \[..., 12\], got \[0, 12\]"),
        (
            {"calibration": torch.full((5, 12), torch.nan)},
            "expected calibration of finite numbers, got NaN or infinity",
        ),
    ],
)
def test_what_from_mlp_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RoutedFFN.from_mlp: {message}"):
        RoutedFFN.from_mlp(**{"fc1": nn.Linear(12, 24), "fc2": nn.Linear(24, 12), **options})
