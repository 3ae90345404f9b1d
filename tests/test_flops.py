"""The formulas by which torch's counter of floating-point operations knows the operators."""

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from contract import cotangents, differentiable_outputs, random, require_grad
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import torchops
from torchops import reference
from torchops._namespace import operators

# They compare, sort, move and add up; or take as long as their numbers ask for.
WITHOUT_PRODUCTS = {
    *("merge_tokens", "_merge_tokens_backward", "unmerge_tokens", "_unmerge_tokens_backward", "topk_assignment"),
    *("pq_encode", "pq_topk", "route", "stf_select", "_stf_select_backward", "stf_pack"),
    *("stf_factorize", "stf_project", "_stf_project_to_factors"),
}


def test_every_operator_has_a_formula_or_no_products() -> None:
    counted = {case.name for case in cases.ALL if getattr(operators, case.name) in flop_registry}
    assert counted == {case.name for case in cases.ALL} - WITHOUT_PRODUCTS


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def both(op: Callable, inputs: dict[str, Any], *names: str) -> tuple[int, int]:
    """Of a forward pass that records a graph, and of the backward pass."""
    inputs = require_grad(inputs, names)
    results: list[Any] = []
    forward = flops(lambda: results.extend(differentiable_outputs(op(**inputs))))
    grads = cotangents(results)
    return forward, flops(lambda: torch.autograd.grad(results, [inputs[name] for name in names], grads))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return random(*shape, dtype=torch.float32, device="cpu", seed=seed)


# ---- against the reference ------------------------------------------------------------------------


def routed(**options: Any) -> dict[str, Any]:
    entries = torch.randint(4, (11, 2), generator=torch.Generator().manual_seed(0))
    gated = options.get("glu", "none") != "none"
    wide = 6 if options.get("glu") == "concat" else 3
    factors = {
        "lora_a1": numbers(4, 2, 5), "lora_b1": numbers(4, 2 * 3 if gated else 3, 2),
        "lora_a2": numbers(4, 2, 3), "lora_b2": numbers(4, 5, 2),
    }  # fmt: skip
    return {
        "input": numbers(11, 5), "index": entries, "gate": numbers(11, 2).abs(), "w1": numbers(4, wide, 5),
        "w2": numbers(4, 5, 3), **({"w_gate": numbers(4, 3, 5)} if options.get("glu") == "split" else {}),
        **factors, "activation": "silu", **options,
    }  # fmt: skip


ROUTED = ("input", "gate", "w1", "w2", "lora_a1", "lora_b1", "lora_a2", "lora_b2")


@pytest.mark.parametrize("glu", ["none", "concat", "split"])
@pytest.mark.parametrize("frozen", [(), ("w1", "w2"), ("input", "gate", "w1", "w2")], ids=str)
def test_routed_layers_count_as_their_reference(glu: str, frozen: tuple[str, ...]) -> None:
    inputs = routed(glu=glu, gate_at="both")
    names = [name for name in (*ROUTED, "w_gate") if name in inputs and name not in frozen]
    names = [name for name in names if not (name == "w_gate" and "w1" in frozen)]
    forward, backward = both(torchops.routed_ffn, inputs, *names)
    expected = both(reference.routed_ffn.routed_ffn, inputs, *names)
    assert forward == expected[0] == flops(lambda: torchops.routed_ffn(**inputs))
    # Low-rank intermediates are not kept, and computed again.
    again = 2 * 22 * (2 * 5 + 2 * 3)
    assert backward == expected[1] + again
    recomputed = both(torchops.routed_ffn, inputs | {"recompute": True}, *names)[1]
    first = 2 * 22 * (5 * 3 * (1 if glu == "none" else 2) + 2 * 3 * (1 if glu == "none" else 2))
    assert recomputed == backward + first


@pytest.mark.parametrize("name", ROUTED)
def test_a_gradient_of_routed_layers_counts_what_it_takes(name: str) -> None:
    inputs = routed(gate_at="both")
    again = {"lora_b1": 2 * 22 * 2 * 5, "lora_b2": 2 * 22 * 2 * 3}.get(name, 0)
    assert both(torchops.routed_ffn, inputs, name)[1] == both(reference.routed_ffn.routed_ffn, inputs, name)[1] + again


def test_grouped_products_count_as_their_reference() -> None:
    order, offsets = torchops.route(torch.randint(3, (10, 2)), 3)
    inputs = {"input": numbers(10, 4), "weight": numbers(3, 6, 4), "order": order, "offsets": offsets, "slots": 2}
    for names in (("input", "weight"), ("input",), ("weight",)):
        expected = both(reference.routed_ffn.grouped_linear, inputs, *names)
        assert both(torchops.grouped_linear, inputs, *names) == expected and expected[1] > 0


def qkv(queries: int, keys: int) -> dict[str, Any]:
    return {"query": numbers(2, 4, queries, 8), "key": numbers(2, 2, keys, 8), "value": numbers(2, 2, keys, 6)}


def test_scores_and_choices_count_as_their_reference() -> None:
    indices = torch.randint(5, (2, 1, 5, 3))
    call = {name: tensor for name, tensor in qkv(9, 20).items() if name != "value"}
    call |= {"indices": indices, "block_size": 4, "query_block": 2}
    for names in (("query", "key"), ("query",), ("key",)):
        expected = both(reference.sparse_attention.topk_scores, call, *names)
        assert both(torchops.topk_scores, call, *names) == expected and expected[1] > 0
    call = qkv(9, 20) | {"indices": indices, "block_size": 4, "query_block": 2}
    expected = flops(lambda: reference.sparse_attention.topk_attention(**call))
    assert flops(lambda: torchops.topk_attention(**call)) == expected == 2 * 2 * 4 * 9 * 12 * (8 + 6)
    choice = {"query": call["query"], "key": call["key"], "k": 3}
    assert flops(lambda: torchops.score_topk(**choice)) == flops(
        lambda: reference.sparse_attention.score_topk(**choice)
    )
    loss = {"input": numbers(7, 12), "codebooks": numbers(4, 5, 3)}
    forward, backward = both(torchops.pq_loss, loss, "input", "codebooks")
    assert forward == flops(lambda: reference.sparse_attention.pq_loss(**loss)) and backward == 3 * forward


# ---- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, 7 * 9),
        ({"is_causal": True}, 3 + 4 + 5 + 6 + 7 + 8 + 9),
        ({"left": 2, "right": 0, "is_causal": True}, 7 * 3),
        ({"left": 1, "right": 1}, 6 * 3 + 2),
        ({"block_size": 4, "left": 0, "right": 0}, 2 * 4 + 4 * 4 + 1),
        ({"block_size": 2**62, "left": 2**62, "right": 0, "is_causal": True}, 42),
    ],
    ids=str,
)
def test_spans_count_the_pairs_that_are_seen(options: dict[str, Any], pairs: int) -> None:
    inputs = qkv(7, 9) | options
    assert pairs == reference.span_attention.visible(inputs["query"][:1], inputs["key"][:1], **options).sum()
    forward, backward = both(torchops.span_attention, inputs, "query", "key", "value")
    assert forward == 2 * 8 * pairs * (8 + 6) == flops(lambda: torchops.span_attention(**inputs))
    assert backward == 2 * 8 * pairs * (3 * 8 + 2 * 6)


@pytest.mark.parametrize(
    ("name", "products"),
    [("query", 2 * 8 + 6), ("key", 2 * 8 + 6), ("value", 8 + 6), ("key_bias", 8 + 6), ("sink", 0)],
)
def test_a_backward_counts_what_is_asked_for(name: str, products: int) -> None:
    inputs = qkv(7, 9) | {"key_bias": numbers(2, 9), "sink": numbers(4)}
    assert both(torchops.span_attention, inputs, name)[1] == 2 * 8 * 63 * products
    lists = inputs | {"indices": torch.randint(9, (2, 1, 7, 5))}
    assert both(torchops.topk_attention, lists, name)[1] == 2 * 8 * 7 * 5 * products


def test_chosen_keys_count_as_far_as_there_are_such() -> None:
    codes = {
        f"{name}_codes": torch.zeros(2, heads, 9, 3, dtype=torch.uint8) for name, heads in (("query", 4), ("key", 2))
    }
    inputs = qkv(9, 9) | codes | {"k": 4, "is_causal": True}
    pairs = 2 * 4 * (1 + 2 + 3 + 4 * 6)
    forward, backward = both(torchops.pq_attention, inputs, "query", "key", "value")
    assert (forward, backward) == (2 * pairs * (8 + 6), 2 * pairs * (3 * 8 + 2 * 6))


@pytest.mark.parametrize("transpose", [False, True])
def test_factored_layers_by_their_factors(transpose: bool) -> None:
    basis, latent = numbers(2, 6, 5), numbers(16, 2, 6)
    values, indices = torchops.stf_select(latent, 3)
    inputs = {"input": numbers(7, 16 if transpose else 10), "basis": basis, "transpose": transpose}
    dense, sparse = 2 * 7 * 2 * 6 * 5, 2 * 7 * 16 * 2 * 3
    call = inputs | {"values": values, "indices": indices}
    packed = inputs | dict(zip(("packed_values", "mask"), torchops.stf_pack(values, indices, 6), strict=True))
    for count in (
        flops(lambda: torchops.stf_linear(**call)),
        flops(lambda: torchops.stf_linear_packed(**packed, rows=16)),
        flops(lambda: torchops.stf_linear_straight_through(**inputs, latent=latent, nnz=3)),
    ):
        assert count == dense + sparse
    first, second = (dense, sparse) if transpose else (sparse, dense)
    assert both(torchops.stf_linear, call, "input", "basis", "values") == (dense + sparse, 2 * (dense + sparse))
    assert both(torchops.stf_linear, call, "input")[1] == first + second
    assert both(torchops.stf_linear, call, "values")[1] == sparse + (dense if transpose else 0)
    assert both(torchops.stf_linear, call, "basis")[1] == dense + (0 if transpose else sparse)
    trained = inputs | {"latent": latent, "nnz": 3}
    assert both(torchops.stf_linear_straight_through, trained, "latent")[1] == 2 * sparse + (dense if transpose else 0)


@pytest.mark.parametrize(("protected", "products"), [(0, 5 * 4), (1, 4 * 4), (2, 4 * 3)])
def test_matching_counts_one_half_times_the_other(protected: int, products: int) -> None:
    metric = numbers(3, 9, 7)
    assert flops(lambda: torchops.bipartite_assignment(metric, 2, protected)) == 2 * 3 * products * 7
