"""Sparse attention in transformers' models: with all keys it is their own attention, with some it is SPT's."""

import copy
import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchops
from torchops.nn import PQAttention, quantization_loss

from transformers_models import (  # isort: skip  # it says why where transformers is not there
    DECODERS,
    EAGER,
    PADDINGS,
    SIZE,
    TOKENS,
    TOLERANCE,
    generate,
    in_one_pass,
    make,
    padding_mask,
    tokens,
    transformers,
)

from transformers import DynamicCache, StaticCache  # noqa: E402

from torchops.integrations import _attention_files, transformers_sparse_attention  # noqa: E402
from torchops.integrations.transformers import apply_span_attention  # noqa: E402
from torchops.integrations.transformers_sparse_attention import (  # noqa: E402
    apply_sparse_attention,
    remove_sparse_attention,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"num_codewords": 4, "subspace": 2}
BERT = ("Bert", "BertModel", SIZE)


def dense(name: str, **options: Any) -> Any:
    model_name, defaults = DECODERS[name]
    return make(name, model_name, defaults | options, "eager" if name in EAGER else "sdpa")


def sparse(model: Any, keep: int | float = 4, **options: Any) -> Any:
    return apply_sparse_attention(copy.deepcopy(model), keep, **{**SMALL, **options})


def attentions(model: nn.Module) -> list[PQAttention]:
    return [module for module in model.modules() if isinstance(module, PQAttention)]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "Mistral"])  # has windows in all layers
def test_all_keys_are_the_models_own_attention(name: str, padding: str) -> None:
    mask, real = PADDINGS[padding], padding_mask(padding)
    model = dense(name)
    results = []
    for one in (model, sparse(model, 1.0)):
        logits = one(tokens(), attention_mask=mask).logits[real]
        one.zero_grad()
        logits.square().sum().backward()
        results.append((logits, one.get_input_embeddings().weight.grad.clone()))
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.mark.parametrize("padding", PADDINGS)
def test_bert(padding: str) -> None:
    mask, real = PADDINGS[padding], padding_mask(padding)
    model = make(*BERT, "sdpa")
    expected = model(tokens(), attention_mask=mask).last_hidden_state[real]
    converted = sparse(model, 1.0)(tokens(), attention_mask=mask).last_hidden_state[real]
    torch.testing.assert_close(converted, expected, **TOLERANCE)
    few = sparse(model, 3)(tokens(), attention_mask=mask).last_hidden_state[real]
    assert (few - expected).abs().max() > 0.01


def test_layers_with_windows_keep_them() -> None:
    model = sparse(dense("Gemma3Text"), 2)
    assert [hasattr(layer.self_attn, "pq_attention") for layer in model.model.layers] == [False, True, False]
    with pytest.raises(TypeError, match="expected layers that attend to all keys, MistralForCausalLM has none"):
        sparse(dense("Mistral"))


def test_chosen_keys_by_hand() -> None:
    """Of one layer, from the queries and keys that it has."""
    model = sparse(dense("Llama", num_hidden_layers=1), 3, sink_keys=1)
    seen: list[Any] = []
    attend = model.model.layers[0].self_attn.pq_attention
    attend.register_forward_hook(lambda module, *seen_here: seen.append(seen_here), with_kwargs=True)
    model(tokens(), attention_mask=PADDINGS["left"])
    (query, key, value), named, output = seen[0]
    codes = [torchops.reference.sparse_attention.pq_encode(vectors, attend.codebooks) for vectors in (query, key)]
    expected = torchops.reference.sparse_attention.pq_attention(query, key, value, *codes, 3, sink_keys=1, **named)
    torch.testing.assert_close(output, expected)
    assert named["is_causal"] and named["query_start"].tolist() == [0, -6]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma3Text"])
def test_generate_gives_the_logits_of_one_pass(name: str, padding: str, cache: str) -> None:
    model = sparse(dense(name), 5, local_keys=1)
    output = generate(model, cache, padding)
    whole = in_one_pass(model, output.sequences, padding)
    torch.testing.assert_close(torch.stack(output.logits, 1), whole, **TOLERANCE)


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_a_cache_that_grows_by_several_tokens(make_cache: Any) -> None:
    model = sparse(dense("Llama"), 4)
    expected = model(tokens()).logits
    cache = make_cache(config=model.config, **({"max_cache_len": 20} if make_cache is StaticCache else {}))
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens().split([6, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **TOLERANCE)


def test_codebooks_learn() -> None:
    model = sparse(dense("Llama", num_hidden_layers=2).float(), 4, calibration=lambda model: model(tokens()))
    model.train()
    codebooks = [attend.codebooks for attend in attentions(model)]
    optimizer = torch.optim.Adam(codebooks, lr=0.01)
    losses = []
    for _ in range(20):
        model(tokens())
        losses.append(quantization_loss(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def test_checkpointed_training() -> None:
    model = sparse(dense("Llama").float()).train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    for one in (model, plain):
        (one(tokens(), use_cache=False).logits.square().sum() + quantization_loss(one)).backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name, **TOLERANCE)


def test_full_layers() -> None:
    model = dense("Llama")
    assert len(attentions(sparse(model, full_layers=[0, -1]))) == 1
    everywhere = sparse(model, full_layers=[0, 1, 2])
    torch.testing.assert_close(everywhere(tokens()).logits, model(tokens()).logits, **TOLERANCE)


def test_the_way_back() -> None:
    model = dense("Llama")
    converted = sparse(model, 2)
    converted.set_attn_implementation("sdpa")
    torch.testing.assert_close(converted(tokens()).logits, model(tokens()).logits, **TOLERANCE)


def test_removed_for_good(tmp_path: Path) -> None:
    model = dense("Llama").float()
    converted = sparse(model, 2, full_layers=[0])
    assert remove_sparse_attention(converted) is converted
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert not {"pq_attention", "attn_implementation", "quantization_config"} & converted.config.to_dict().keys()
    converted.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (converted, loaded):
        torch.testing.assert_close(one(tokens()).logits, model(tokens()).logits, **TOLERANCE)
    with pytest.raises(ValueError, match="expected a model with it, LlamaForCausalLM has none to remove"):
        remove_sparse_attention(converted)
    assert attentions(apply_sparse_attention(converted, 3, **SMALL))[0].keep == 3


def test_compile_and_export() -> None:
    model = sparse(dense("Llama"))
    inputs = {"attention_mask": PADDINGS["left"], "use_cache": False}
    expected = model(tokens(), **inputs).logits
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens(), **inputs).logits, expected, **TOLERANCE)
    exported = torch.export.export(model, (tokens(),), inputs, strict=False).module()
    torch.testing.assert_close(exported(tokens(), **inputs).logits, expected, **TOLERANCE)
    torch._dynamo.reset()


# ---- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = (make(*BERT, "sdpa") if name == "Bert" else dense(name)).to(dtype)
    model = sparse(model, 0.3, full_layers=[-1], local_keys=1)
    model.save_pretrained(tmp_path)
    kind = type(model)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[part]) for part, weight in loaded.state_dict().items())
    if dtype == torch.float32:  # to(bfloat16) rounds rotations, and loading does not
        assert torch.equal(loaded(tokens())[0], model(tokens())[0])
    assert len(attentions(loaded)) == len(attentions(model)) > 0
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train().save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens())[0], loaded.eval()(tokens())[0])


def test_a_model_without_its_head_comes_back(tmp_path: Path) -> None:
    model = sparse(dense("Llama"))
    model.save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


def test_codebooks_that_are_missing_are_not_taken_for_full_attention(tmp_path: Path) -> None:
    model = sparse(dense("Llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sparse_attention: no codebooks: apply_sparse_attention"):
        loaded(tokens())
    apply_sparse_attention(loaded)
    assert attentions(loaded)[0].keep == 4
    loaded(tokens())


def test_spans_take_the_place_of_codebooks_in_the_config() -> None:
    model = apply_span_attention(sparse(dense("Llama")), [None, {"left": 3}, None])
    assert model.config.span_attention[1] == {"left": 3} and not hasattr(model.config, "pq_attention")
    assert model.config.attn_implementation == model.config._attn_implementation == "span_attention"


def test_a_model_that_is_loaded_with_its_own_attention(tmp_path: Path) -> None:
    model = dense("Llama").float()
    sparse(model).save_pretrained(tmp_path)
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    torch.testing.assert_close(own(tokens()).logits, model(tokens()).logits, **TOLERANCE)
    own.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config._attn_implementation == "sparse_attention" and len(attentions(again)) == 3


def test_what_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(dense("Llama")).save_pretrained(tmp_path)
    monkeypatch.delitem(_attention_files.prepare, "pq_attention")
    with pytest.raises(ImportError, match="import torchops.integrations.transformers_sparse_attention to load this"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_lora_with_codebooks(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = sparse(dense("Llama").float())
    base = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["pq_attention"])
    adapted = peft.get_peft_model(model, config).train()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora" in name or "codebooks" in name for name in trained)
    assert sum("codebooks" in name for name in trained) == 3
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    (adapted(tokens()).logits.square().mean() + quantization_loss(adapted)).backward()
    optimizer.step()
    adapted.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(tokens()).logits, adapted(tokens()).logits)


# ---- what cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": None}, ValueError, "expected keep, which the config of the model does not say either"),
        ({"full_layers": [3]}, ValueError, r"expected full_layers in -3..2, got 3"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = dense("Llama")
    with pytest.raises(error, match=f"sparse_attention: {message}"):
        apply_sparse_attention(model, **{"keep": 4, **SMALL, **options})
    with pytest.raises(ValueError, match="PQAttention: expected head_dim to be a multiple of subspace = 3, got 8"):
        apply_sparse_attention(model, 4, subspace=3)
    assert model.config._attn_implementation == "sdpa" and not attentions(model)
    assert not hasattr(model.config, "pq_attention")
    apply_sparse_attention(model, 4, **SMALL)
    with pytest.raises(ValueError, match="expected a model without it, LlamaForCausalLM has it already"):
        apply_sparse_attention(model, 4, **SMALL)


def test_models_that_are_refused() -> None:
    bart = transformers.BartModel(transformers.BartConfig(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1))
    with pytest.raises(TypeError, match="sparse_attention: expected a model without cross-attention, got BartModel"):
        apply_sparse_attention(bart, 4)
    softcap = dense("Gemma2", attn_logit_softcapping=50.0)
    with pytest.raises(TypeError, match=r"sparse_attention: Gemma2Attention \(.*\) has soft-capped scores"):
        apply_sparse_attention(softcap, 4)


def test_calls_that_are_refused() -> None:
    model = sparse(dense("Llama", attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"sparse_attention: no attention dropout \(here 0.1\)"):
        model(tokens())
    with pytest.raises(ValueError, match="sparse_attention: no output_attentions"):
        model.eval()(tokens(), output_attentions=True)
    with pytest.raises(ValueError, match=r"sparse_attention: no masks but those of padding, \[B, L\]"):
        model(tokens(), attention_mask=torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool))


def test_examples() -> None:
    result = doctest.testmod(transformers_sparse_attention, extraglobs={"torch": torch, "torchops": torchops})
    assert result.failed == 0 and result.attempted > 3
