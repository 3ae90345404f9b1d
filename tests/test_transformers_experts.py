"""Experts of transformers' models on torchops.routed_ffn, with and without peft's LoRA."""

import copy
import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchops

transformers = pytest.importorskip("transformers", exc_type=ImportError)

from torchops.integrations import transformers_routed_experts as integration  # noqa: E402
from torchops.integrations.transformers import apply_routed_experts  # noqa: E402

SIZE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SMALL_EXPERTS = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": SIZE | SMALL_EXPERTS,
    "Olmoe": SIZE | SMALL_EXPERTS,
    "GptOss": SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": SIZE
    | {
        "head_dim": 4,
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))


def made(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if integration.is_experts(module)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS).logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-5, atol=1e-8, msg=lambda text, name=name: name + text
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the operator is given."""
    calls: list[tuple[Any, ...]] = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append((*arguments, options))
        return torchops.routed_ffn(*arguments, **options)

    monkeypatch.setattr(integration, "routed_ffn", counted)
    return calls


# ---- models -------------------------------------------------------------------------------------------


@EACH_MODEL
def test_outputs_and_gradients_are_those_of_eager(name: str, calls: list[Any]) -> None:
    model = made(name)
    expected, expected_gradients = model(TOKENS).logits, gradients(model)
    assert not calls
    assert apply_routed_experts(model) is model
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-6, atol=1e-8)
    assert len(calls) == len(experts_of(model)) == (1 if name == "DeepseekV3" else 2)
    same(gradients(model), expected_gradients)
    model.set_experts_implementation("eager")
    assert torch.equal(model(TOKENS).logits, expected)


@EACH_MODEL
def test_generated_tokens_are_those_of_eager(name: str, calls: list[Any]) -> None:
    model = made(name)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(TOKENS, **options)
    generated = apply_routed_experts(model).generate(TOKENS, **options)
    assert torch.equal(generated, expected) and len(calls) >= 8


@EACH_MODEL
def test_a_saved_model_is_loaded(name: str, calls: list[Any], tmp_path: Path) -> None:
    model = apply_routed_experts(made(name))
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    kind = getattr(transformers, f"{name}ForCausalLM")
    loaded = kind.from_pretrained(tmp_path, experts_implementation="torchops", attn_implementation="eager")
    calls.clear()
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-6, atol=1e-8)
    assert len(calls) == len(experts_of(loaded))
    plain = kind.from_pretrained(tmp_path, experts_implementation="eager", attn_implementation="eager")
    torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-6, atol=1e-8)


@EACH_MODEL
def test_weights_are_views(name: str, calls: list[Any]) -> None:
    model = apply_routed_experts(made(name))
    model(TOKENS)
    for (_, _, _, w1, w2, b1, b2, _), experts in zip(calls, experts_of(model), strict=True):
        assert w1.data_ptr() == experts.gate_up_proj.data_ptr() and w2.data_ptr() == experts.down_proj.data_ptr()
        assert (b1 is None) == (b2 is None) == (name != "GptOss")
    options = calls[0][-1]
    gpt_oss = {"activation": "silu", "glu": "interleaved", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0}
    others = {"activation": "silu", "glu": "concat", "alpha": 1.0, "limit": None, "up_offset": 0.0}
    assert options == (gpt_oss if name == "GptOss" else others)


@EACH_MODEL
def test_a_model_trains_with_checkpoints_and_is_copied(name: str) -> None:
    model = made(name).train()
    expected = gradients(model)
    model = copy.deepcopy(apply_routed_experts(model))
    model.gradient_checkpointing_enable()
    same(gradients(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@EACH_MODEL
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """bfloat16 weights, or float32 ones under autocast, with choices that do not depend on rounding."""
    experts = experts_of(made(name, dtype))[0]
    index = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(40)])
    inputs = torch.randn(40, 16, dtype=dtype), index, torch.rand(40, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        expected = integration.own_forward(type(experts))(experts, *inputs)
        output = integration.routed_experts_forward(experts, *inputs)
    assert output.dtype == dtype
    assert (output - expected).norm() < 0.02 * expected.norm()


@EACH_MODEL
def test_experts_compile(name: str) -> None:
    model = apply_routed_experts(made(name))
    experts = experts_of(model)[0]
    inputs = torch.randn(5, 16).double(), torch.randint(experts.num_experts, (5, 2)), torch.rand(5, 2)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), experts(*inputs))


def test_experts_of_other_processes_are_skipped() -> None:
    experts = experts_of(made("Mixtral"))[0]
    hidden_states, weights = torch.randn(9, 16).double(), torch.rand(9, 2).double()
    index = torch.randint(5, (9, 2))
    weights = weights.masked_fill(index == 4, 0.0)
    expected = integration.own_forward(type(experts))(experts, hidden_states, index, weights)
    output = integration.routed_experts_forward(experts, hidden_states, index, weights)
    torch.testing.assert_close(output, expected)


def test_experts_without_gates() -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    options = {"n_routed_experts": 4, "hidden_size": 8, "moe_intermediate_size": 12, "mlp_hidden_act": "relu2"}
    experts = NemotronHExperts(transformers.NemotronHConfig(**options)).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    inputs = torch.randn(9, 8).double(), torch.randint(4, (9, 2)), torch.rand(9, 2).double()
    expected = integration.own_forward(type(experts))(experts, *inputs)
    torch.testing.assert_close(integration.routed_experts_forward(experts, *inputs), expected)
    assert integration.formula(experts).gate == integration.Gate("relu2", "none")


# ---- what does not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda experts: setattr(experts, "act_fn", nn.Tanh()), "it has another gate than the operator"),
        (lambda experts: setattr(experts, "has_post_expert_norm", True), "it has a norm behind its experts"),
    ],
)
def test_experts_that_do_not_fit_compute_by_themselves(
    spoil: Any, reason: str, calls: list[Any], monkeypatch: Any
) -> None:
    model = made("Mixtral")
    spoil(experts_of(model)[0])
    expected = model(TOKENS).logits
    warnings: list[str] = []
    monkeypatch.setattr(integration.logger, "warning_once", warnings.append)
    torch.testing.assert_close(apply_routed_experts(model)(TOKENS).logits, expected)
    assert len(calls) == 1 and warnings == [f"torchops: MixtralExperts computes by itself: {reason}"]


def test_models_that_are_refused() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE))
    with pytest.raises(TypeError, match="whose experts go through transformers' interface, got LlamaForCausalLM"):
        apply_routed_experts(model)
    model = made("Mixtral")
    experts_of(model)[1].down_proj.data = experts_of(model)[1].down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(
        TypeError, match="expected experts in floating point, got MixtralExperts in torch.float8_e4m3fn"
    ):
        apply_routed_experts(model)
    assert model.get_experts_implementation() == {"": "eager"}


# ---- peft's LoRA --------------------------------------------------------------------------------------


def adapted(name: str, targets: tuple[str, ...] = ("gate_up_proj", "down_proj"), **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    parameters = [f"mlp.experts.{target}" for target in targets]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=parameters, **options)
    model = peft.get_peft_model(made(name), config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def no_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pytest.importorskip("peft.tuners.lora.layer")

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("W + B A was made")

    monkeypatch.setattr(layer._LoraFactorsProxy, "forward", refuse)


@pytest.mark.parametrize("targets", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)], ids="+".join)
@EACH_MODEL
def test_adapters_stay_factors(name: str, targets: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    model = adapted(name, targets)
    expected, expected_gradients = model(TOKENS).logits, gradients(model)
    assert all("lora_" in parameter for parameter in expected_gradients)
    request.getfixturevalue("no_dense_product")
    apply_routed_experts(model)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-6, atol=1e-8)
    same(gradients(model), expected_gradients)
    plain = made(name)(TOKENS).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(TOKENS).logits, plain, rtol=1e-6, atol=1e-8)
    assert (expected - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_factors_are_what_peft_merges(name: str, calls: list[Any]) -> None:
    """peft's lora_B has the experts fastest: its own product, for each expert, is that of the factors."""
    model = apply_routed_experts(adapted(name))
    model(TOKENS)
    experts = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    merged = {wrapper.parameter_name: wrapper.get_delta_weight("default") for wrapper in experts[:2]}
    options = calls[0][-1]
    for number, parameter in enumerate(("gate_up_proj", "down_proj"), start=1):
        delta = options["lora_scale"] * options[f"lora_b{number}"] @ options[f"lora_a{number}"]
        torch.testing.assert_close(delta.mT if name == "GptOss" else delta, merged[parameter])


def test_adapters_of_different_scales(no_dense_product: None) -> None:
    model = adapted("Mixtral", alpha_pattern={"mlp.experts.gate_up_proj": 30})
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "get_delta_weight")}
    assert len(scales) == 2
    torch.testing.assert_close(apply_routed_experts(model)(TOKENS).logits, model.merge_and_unload()(TOKENS).logits)


def test_several_adapters_are_added_to_the_weights() -> None:
    peft = pytest.importorskip("peft")
    model = adapted("Mixtral")
    model.add_adapter(
        "other",
        peft.LoraConfig(r=2, target_modules=[], target_parameters=list(model.peft_config["default"].target_parameters)),
    )
    for name, parameter in model.named_parameters():
        if "other" in name:
            nn.init.normal_(parameter, std=0.2)
    model.base_model.set_adapter(["default", "other"])
    expected = model(TOKENS).logits
    torch.testing.assert_close(apply_routed_experts(model)(TOKENS).logits, expected, rtol=1e-6, atol=1e-8)


def test_an_adapter_that_comes_later() -> None:
    peft = pytest.importorskip("peft")
    model = apply_routed_experts(made("Qwen3Moe"))
    expected = model(TOKENS).logits
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=parameters))
    torch.testing.assert_close(model(TOKENS).logits, expected)  # B starts at zero


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(integration, extraglobs={"torch": torch, "torchops": torchops})
    assert result.attempted > 3 and result.failed == 0
