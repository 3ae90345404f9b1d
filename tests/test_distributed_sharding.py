"""Operators on DTensors: every rule of torchops.distributed, on the contract's calls of every operator."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import cases
import pytest
import torch
from contract import (
    Inputs,
    OpCase,
    assert_close,
    cotangents,
    given,
    gradients_of,
    integers,
    map_tensors,
    outputs_of,
    random,
    require_grad,
)
from own_process import ROOT
from processes import needs_gloo, run_in_processes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import torchops
from torchops._namespace import NAMESPACE, operators
from torchops.distributed.sharding import shardings
from torchops.distributed.sharding_rules import RULES, Dimension, Rule

pytestmark = needs_gloo

# Of calls with more numbers there are smaller ones.
MOST_NUMBERS = 20_000


def test_every_operator_has_a_rule() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")}
    assert {name.split("::")[1] for name in registered} == RULES.keys()


def test_documentation_has_the_rules() -> None:
    pages = (ROOT / "docs" / "distributed.md").read_text()
    alike: dict[str, list[str]] = {}
    for name, rule in RULES.items():
        if not name.startswith("_"):
            told = f"nothing: {rule}" if isinstance(rule, str) else "; ".join(d.name for d in rule.dimensions)
            alike.setdefault(told, []).append(f"`{name}`")
    for told, names in alike.items():
        assert f"| {', '.join(names)} | {told} |" in pages


def test_in_two_processes(tmp_path: Path) -> None:
    run_in_processes(
        2,
        [
            every_rule,
            what_is_not_divided,
            moved_between_passes,
            remembered_by_options,
            few_key_heads,
            compiled,
            refused,
        ],
        tmp_path,
    )


# ---- every rule -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Way:
    """How a call is divided: along which dimension, and so the placements of its inputs and outputs."""

    dimension: Dimension
    inputs: dict[str, Placement]
    outputs: dict[str, Placement]


def every_rule(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for case in cases.ALL:
        rule = RULES[case.name]
        if isinstance(rule, str):
            continue
        done = set()
        # Codes come with one dtype only.
        for sample in list(case.samples(torch.float64, "cpu")) or case.samples(torch.float32, "cpu"):
            if sum(t.numel() for t in sample.inputs.values() if isinstance(t, Tensor)) > MOST_NUMBERS:
                continue
            for way in ways(case, rule, sample.inputs, mesh):
                kind = kind_of(sample.inputs, way, mesh)
                if kind not in done:
                    done.add(kind)
                    try:
                        check(case, rule, sample.inputs, way, mesh)
                    except BaseException as error:
                        raise AssertionError(f"{case}, {sample.id}, {way.dimension.name} {way}") from error
        missing = {dimension.name for dimension in rule.dimensions} - {kind[0] for kind in done}
        assert not missing, f"{case}: no call is divided along {missing}"


def ways(case: OpCase, rule: Rule, inputs: Inputs, mesh: DeviceMesh) -> Iterator[Way]:
    """All that the rule has for a call."""
    if any(inputs.get(name) is not None for name in rule.kept):
        return  # the forward makes it, whose gradients are looked at
    schema = case.overload._schema
    specs = map_tensors(inputs, lambda tensor: distributed(tensor, mesh, Replicate())._spec)
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    positional = [specs.get(argument.name, argument.default_value) for argument in schema.arguments[: len(names)]]
    options = {name: value for name, value in specs.items() if name not in names}
    for dimension in rule.dimensions:
        alone = dataclasses.replace(rule, dimensions=(dimension,))
        for outputs, placements in shardings(case.overload, alone, *positional, **options)[1:]:
            placed = {
                name: placement for name, placement in zip(names, placements, strict=False) if placement is not None
            }
            shards = [inputs[name].shape[shard.dim] for name, shard in placed.items() if shard.is_shard()]
            # The gradient to a packed layer's bias is made by torch, which flattens equal parts only.
            even = all(size % mesh.size() == 0 for size in shards)
            if all(size >= mesh.size() for size in shards) and (even or case.name != "stf_linear_packed"):
                yield Way(dimension, placed, {r.name: out for r, out in zip(schema.returns, outputs, strict=True)})


def kind_of(inputs: Inputs, way: Way, mesh: DeviceMesh) -> tuple:
    """Of calls that differ in sizes and numbers only one is enough, with equal parts and with unequal ones."""
    sizes = [inputs[name].shape[shard.dim] for name, shard in way.inputs.items() if shard.is_shard()]
    options = {name: value for name, value in inputs.items() if isinstance(value, bool | list) or name == "glu"}
    return way.dimension.name, all(size % mesh.size() == 0 for size in sizes), str(way), str(options)


def distributed(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """Of a tensor that all processes have, for which nothing needs to be sent. Parts of a sum are made of the whole."""
    placements = [Replicate() if placement.is_partial() else placement for placement in placements]
    return distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None)


def assert_whole(part: DTensor, whole: Tensor, what: str, tolerance: float = 0) -> None:
    """Gloo does not send positions of 16 bits, so that shards are compared where they are."""
    if any(placement.is_partial() for placement in part.placements):
        assert_close(part.full_tensor(), whole, torch.float64, what, tolerance)
        return
    expected = distributed(whole, part.device_mesh, *part.placements).to_local()
    assert_close(part.to_local(), expected, torch.float64, what, tolerance)


def check(case: OpCase, rule: Rule, inputs: Inputs, way: Way, mesh: DeviceMesh) -> None:
    """Outputs and gradients are those of the call as a whole, lie where the rule says, and nothing is sent."""
    names = given(inputs, case.differentiable)
    inputs = require_grad(inputs, names)
    expected = outputs_of(case.op(**inputs))
    parts = inputs | {
        name: distributed(inputs[name], mesh, placement).requires_grad_(name in names)
        for name, placement in way.inputs.items()
    }
    with CommDebugMode() as sent:
        result = case.op(**parts)
    assert sent.get_total_counts() == 0, f"the forward sends {sent.get_comm_counts()}"
    result = dict(zip(way.outputs, [result] if isinstance(result, Tensor) else result, strict=True))
    actual = {name: out for name, out in result.items() if out is not None}
    for whole, (name, out) in zip(expected, actual.items(), strict=True):
        assert out.placements == (way.outputs[name],), f"{name}: {out.placements}, expected {way.outputs[name]}"
        if name not in rule.kept:
            assert_whole(out, whole, f"output {name}")
    if not names:
        return
    grads = cotangents(expected)
    wanted = gradients_of(expected, [inputs[name] for name in names], grads)
    placed = [distributed(grad, mesh, way.outputs[name]) for name, grad in zip(actual, grads, strict=True)]
    with CommDebugMode() as sent:
        computed = gradients_of(list(actual.values()), [parts[name] for name in names], placed)
    assert sent.get_total_counts() == 0, f"the backward sends {sent.get_comm_counts()}"
    for name, whole, grad in zip(names, wanted, computed, strict=True):
        assert (whole is None) == (grad is None), name
        if grad is not None:
            if way.inputs[name].is_shard():
                assert grad.placements == (way.inputs[name],), f"gradient to {name}: {grad.placements}"
            assert_whole(grad, whole, f"gradient to {name}", case.gradient_tolerance.get(torch.float64, 0))


# ---- what is special --------------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, dtype=torch.float64, device="cpu", seed=seed)


def what_is_not_divided(rank: int) -> None:
    """It takes whole tensors, and refuses others by name."""
    mesh = init_device_mesh("cpu", (2,))
    index, weight = integers(0, 4, 6, 2, device="cpu"), numbers(6, 4)
    calls = {torchops.route: ("index", index, 4), torchops.stf_factorize: ("weight", weight, 3, 2)}
    assert {op.__name__ for op in calls} == {name for name, rule in RULES.items() if isinstance(rule, str)}
    for op, (name, tensor, *numbers_) in calls.items():
        for actual, expected in zip(
            op(distributed(tensor, mesh, Replicate()), *numbers_), op(tensor, *numbers_), strict=True
        ):
            assert actual.placements == (Replicate(),)
            assert_whole(actual, expected, op.__name__)
        expected = (
            f"{op.__name__}: expected {name} whole on every process, for {RULES[op.__name__]}, got [Shard(dim=0)]"
        )
        with pytest.raises((ValueError, RuntimeError), match=re.escape(expected)):
            op(distributed(tensor, mesh, Shard(0)), *numbers_)


def units_whose_rows_stand_apart(rank: int) -> None:
    """Halves of a tensor of all gates and all values are no halves of the units."""
    mesh = init_device_mesh("cpu", (2,))
    x, index = numbers(5, 6), integers(0, 3, 5, 2, device="cpu")
    w1, wide, w2, b1 = numbers(3, 4, 6), numbers(3, 8, 6), numbers(3, 6, 4), numbers(3, 8)
    for glu, weights in (
        ("concat", {"w1": wide}),
        ("split", {"w1": w1, "w_gate": w1, "b1": b1}),
        ("split", {"w1": w1, "w_gate": w1, "lora_a1": numbers(1, 2, 6), "lora_b1": numbers(3, 8, 2)}),
    ):
        parts = {
            name: distributed(t, mesh, Replicate() if name == "lora_a1" else Shard(1)) for name, t in weights.items()
        }
        sides = distributed(x, mesh, Replicate()), distributed(index, mesh, Replicate())
        out = torchops.routed_ffn(*sides, None, w2=distributed(w2, mesh, Shard(2)), glu=glu, activation="silu", **parts)
        assert out.placements == (Replicate(),)
        assert_whole(out, torchops.routed_ffn(x, index, None, w2=w2, glu=glu, activation="silu", **weights), glu)


def moved_between_passes(rank: int) -> None:
    """A gradient that arrives divided along another dimension than the output was, or not at all."""
    mesh = init_device_mesh("cpu", (2,))
    x, w1, w2 = numbers(4, 2, 6, 8), numbers(3, 5, 8), numbers(3, 8, 5)
    index = integers(0, 3, 4, 2, 6, 2, device="cpu")
    basis, values = numbers(2, 5, 4, seed=1), numbers(70, 2, 2, seed=2)
    indices = torch.tensor([1, 4], dtype=torch.uint8).repeat(70, 2, 1)
    # With gradients to the weights, of which what the forward keeps is made. To move the input would cost less than to
    # move a gradient of 70 features.
    calls = {
        torchops.routed_ffn: ((index,), (None, w1, w2)),
        torchops.stf_linear: ((), (basis, values, indices)),
    }
    for op, (divided, others) in calls.items():
        whole = [x.clone().requires_grad_(), *divided, *map_trained(others, torch.clone)]
        out = op(*whole)
        grad = numbers(*out.shape, seed=3)
        trained = [tensor for tensor in whole if tensor is not None and tensor.requires_grad]
        expected = torch.autograd.grad(out, trained, grad)
        for there in (Shard(0), Shard(1), Shard(2)):
            parts = [distributed(x, mesh, there).requires_grad_(), *(distributed(t, mesh, there) for t in divided)]
            parts += map_trained(others, lambda tensor: distributed(tensor, mesh, Replicate()))
            out = op(*parts)
            trained = [tensor for tensor in parts if tensor is not None and tensor.requires_grad]
            for here in (Shard(0), Shard(1), Shard(2), Replicate()):
                actual = torch.autograd.grad(out, trained, distributed(grad, mesh, here), retain_graph=True)
                for one, other in zip(actual, expected, strict=True):
                    assert_close(one.full_tensor(), other, torch.float64, f"{op.__name__}, {there}, {here}")


def map_trained(tensors: Iterable[Tensor | None], change: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    return [t if t is None else change(t).requires_grad_(t.is_floating_point()) for t in tensors]


def remembered_by_options(rank: int) -> None:
    """Calls that differ in no size."""
    mesh = init_device_mesh("cpu", (2,))
    x, basis, values = numbers(4, 6), numbers(1, 5, 6), numbers(6, 1, 2)
    indices = torch.tensor([1, 4], dtype=torch.uint8).repeat(6, 1, 1)
    factor = distributed(values, mesh, Shard(0)), distributed(indices, mesh, Shard(0))
    for transpose in (False, True, False):
        sides = distributed(x, mesh, Replicate()), distributed(basis, mesh, Replicate())
        out = torchops.stf_linear(*sides, *factor, None, transpose)
        assert out.placements == ((Partial() if transpose else Shard(1)),)
        assert_whole(out, torchops.stf_linear(x, basis, values, indices, None, transpose), f"transpose={transpose}")


def refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    x, basis, values = numbers(4, 6), numbers(2, 5, 3), numbers(7, 2, 2)
    indices = torch.tensor([1, 4], dtype=torch.uint8).repeat(7, 2, 1)
    grad, atoms = operators._stf_linear_with_atoms(x, basis, values, indices)
    grad, x, basis, values, indices = (distributed(t, mesh, Replicate()) for t in (grad, x, basis, values, indices))
    atoms = distributed(atoms, mesh, Shard(0))
    options = {"basis_sizes": [2, 5, 3], "transpose": False, "to_latent": False, "output_mask": [True] * 4}
    with pytest.raises(RuntimeError, match="_stf_linear_backward: expected atoms divided as its forward divides it"):
        operators._stf_linear_backward(grad, x, basis, values, indices, atoms, **options)


def few_key_heads(rank: int) -> None:
    """Processes get whole groups of query heads and their key head, or all heads."""
    mesh = init_device_mesh("cpu", (2,))
    for heads, kv_heads, is_divided in ((4, 2, True), (4, 1, True), (6, 3, False), (3, 3, False)):
        query, key, value = (numbers(2, count, 5, 4, seed=count) for count in (heads, kv_heads, kv_heads))
        of_keys = Shard(1) if kv_heads > 1 else Replicate()
        sides = distributed(query, mesh, Shard(1)), distributed(key, mesh, of_keys), distributed(value, mesh, of_keys)
        out = torchops.span_attention(*sides, is_causal=True)
        assert out.placements == ((Shard(1) if is_divided else Replicate()),), f"{heads}, {kv_heads}"
        expected = torchops.span_attention(query, key, value, is_causal=True)
        assert_close(out.full_tensor(), expected, torch.float64, f"{heads}, {kv_heads}")


def compiled(rank: int) -> None:
    """A graph of all operators, of which each is divided as without it."""
    mesh = init_device_mesh("cpu", (2,))
    indices = torch.tensor([1, 4], dtype=torch.uint8).repeat(6, 2, 1)

    def layer(
        x: Tensor, w1: Tensor, w2: Tensor, basis: Tensor, values: Tensor, places: Tensor, index: Tensor
    ) -> Tensor:
        heads = torchops.stf_linear(x, basis, values, places)[:, None]
        return torchops.routed_ffn(torchops.span_attention(heads, heads, heads).flatten(1, 2), index, None, w1, w2)

    rows = numbers(4, 5, 8), numbers(3, 4, 6, seed=1), numbers(3, 6, 4, seed=2), numbers(2, 5, 4, seed=3)
    whole = [*rows, numbers(6, 2, 2, seed=4), indices, integers(0, 3, 4, 5, 2, device="cpu")]
    places = [Shard(0), *[Replicate()] * 5, Shard(0)]
    parts = [distributed(tensor, mesh, place) for tensor, place in zip(whole, places, strict=True)]
    for tensor in (*whole[:5], *parts[:5]):
        tensor.requires_grad_()
    expected = layer(*whole)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(*parts)
    assert actual.placements == (Shard(0),)
    assert_close(actual.full_tensor(), expected, torch.float64, "output")
    grads = zip(
        torch.autograd.grad(actual.square().sum(), parts[:5]),
        torch.autograd.grad(expected.square().sum(), whole[:5]),
        strict=True,
    )
    for grad, wanted in grads:
        assert_close(grad.full_tensor(), wanted, torch.float64, "gradient")


# ---- four processes, which test_distributed_modules.py starts ---------------------------------


def two_dimensions(rank: int) -> None:
    """The batch, or tokens, along one dimension of the mesh and the model along the other."""
    mesh = init_device_mesh("cpu", (2, 2))
    batch, heads, both, neither = (
        (Shard(0), Replicate()),
        (Replicate(), Shard(0)),
        (Shard(0), Shard(1)),
        (Replicate(),) * 2,
    )
    indices = torch.tensor([1, 4], dtype=torch.uint8).repeat(6, 2, 1)
    # Inputs and their placements, the last ones options.
    calls = {
        torchops.span_attention: {
            "query": (numbers(4, 4, 6, 8), both),
            "key": (numbers(4, 2, 6, 8, seed=1), both),
            "value": (numbers(4, 2, 6, 5, seed=2), both),
            "key_bias": (numbers(4, 6), batch),
            "sink": (numbers(4), heads),
        },
        torchops.routed_ffn: {
            "input": (numbers(4, 3, 8), batch),
            "index": (integers(0, 3, 4, 3, 2, device="cpu"), batch),
            "gate": (numbers(4, 3, 2), batch),
            "w1": (numbers(3, 6, 8), (Replicate(), Shard(1))),
            "w2": (numbers(3, 8, 6), (Replicate(), Shard(2))),
            "b1": (numbers(3, 6), (Replicate(), Shard(1))),
            "b2": (numbers(3, 8), neither),
        },
        torchops.stf_linear: {
            "input": (numbers(2, 4, 8), (Shard(1), Replicate())),
            "basis": (numbers(2, 5, 4), neither),
            "values": (numbers(6, 2, 2), heads),
            "indices": (indices, heads),
        },
        partial(torchops.stf_linear, transpose=True): {
            "input": (numbers(4, 3, 6), (Shard(0), Shard(2))),
            "basis": (numbers(2, 5, 4), neither),
            "values": (numbers(6, 2, 2), heads),
            "indices": (indices, heads),
            "bias": (numbers(8), neither),
        },
    }
    for op, tensors in calls.items():
        names = [name for name, (tensor, _) in tensors.items() if tensor.is_floating_point()]
        inputs = require_grad({name: tensor for name, (tensor, _) in tensors.items()}, names)
        parts = {name: distributed(tensor, mesh, *there) for name, (tensor, there) in tensors.items()}
        for name in names:
            parts[name].requires_grad_()
        expected = op(**inputs)
        grad = numbers(*expected.shape, seed=4)
        with CommDebugMode() as sent:
            out = op(**parts)
            placed = distributed(grad, mesh, *out.placements)
            actual = torch.autograd.grad(out, [parts[name] for name in names], placed)
        assert sent.get_total_counts() == 0, f"{op} sends {sent.get_comm_counts()}"
        assert_close(out.full_tensor(), expected, torch.float64, str(op))
        wanted = torch.autograd.grad(expected, [inputs[name] for name in names], grad)
        for name, one, other in zip(names, actual, wanted, strict=True):
            assert_close(one.full_tensor(), other, torch.float64, f"{op}, gradient to {name}")
