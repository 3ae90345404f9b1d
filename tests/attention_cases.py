"""What the case tables of every attention share: inputs, and calls that must fail."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from contract import Inputs, Invalid, Sample
from torch import Tensor

FLOATS = "Double, Float, BFloat16 or Half"


def positions_first(tensor: Tensor) -> Tensor:
    """[B, H, L, D] stored as [B, L, H, D], the way a projection leaves it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def none(*names: str) -> Inputs:
    return dict.fromkeys(names)


def invalid_inputs(device: str, good: Inputs) -> Iterator[Invalid]:
    """What the forward refuses, and the backward too. `good` has 2 rows, 4 and 2 heads, 5 queries and 6 keys."""
    query, key, value = good["query"], good["key"], good["value"]
    for name, dims in (("query", "[B, Hq, Lq, D]"), ("key", "[B, Hkv, Lk, D]"), ("value", "[B, Hkv, Lk, Dv]")):
        shape = list(good[name].shape[1:])
        yield Invalid(f"{name}-rank", good | {name: good[name][0]}, f"expected {name} of shape {dims}, got {shape}")
    yield Invalid("query-dtype", good | {"query": query.int()}, f"expected query of dtype {FLOATS}, got Int")
    yield Invalid("key-dtype", good | {"key": key.double()}, "expected key of query's dtype Float, got Double")
    yield Invalid(
        "value-dtype", good | {"value": value.bfloat16()}, "expected value of query's dtype Float, got BFloat16"
    )
    for dim in (0, 257):
        wide = torch.zeros(2, 4, 5, dim, device=device)
        yield Invalid(f"D{dim}", good | {"query": wide}, f"expected query's last dimension in 1..256, got {dim}")
        wide = torch.zeros(2, 2, 6, dim, device=device)
        yield Invalid(f"Dv{dim}", good | {"value": wide}, f"expected value's last dimension in 1..256, got {dim}")
    yield Invalid(
        "key-batch",
        good | {"key": key[:1]},
        "expected key of shape [B, Hkv, Lk, D] = [2, 2, 6, 8], got [1, 2, 6, 8]",
    )
    yield Invalid(
        "key-D",
        good | {"key": key[..., :7]},
        "expected key of shape [B, Hkv, Lk, D] = [2, 2, 6, 8], got [2, 2, 6, 7]",
    )
    yield Invalid(
        "value-keys",
        good | {"value": value[:, :, 1:]},
        "expected value of shape [B, Hkv, Lk, Dv] = [2, 2, 6, 3], got [2, 2, 5, 3]",
    )
    yield Invalid(
        "value-heads",
        good | {"value": value[:, :1]},
        "expected value of shape [B, Hkv, Lk, Dv] = [2, 2, 6, 3], got [2, 1, 6, 3]",
    )
    yield Invalid(
        "no-key-heads",
        good | {"key": key[:, :0], "value": value[:, :0]},
        "expected key's number of heads >= 1, got 0",
    )
    yield Invalid(
        "heads",
        good | {"query": query[:, :3]},
        "expected query's number of heads to be a multiple of key's = 2, got 3",
    )
    sink = torch.zeros(4, device=device)
    yield Invalid("sink-shape", good | {"sink": sink[:2]}, "expected sink of shape [Hq] = [4], got [2]")
    yield Invalid("sink-dtype", good | {"sink": sink.int()}, f"expected sink of dtype {FLOATS}, got Int")
    yield from invalid_sides(device, good)


def invalid_sides(device: str, good: Inputs) -> Iterator[Invalid]:
    """What goes with queries and keys of any kind, of which there are 2 rows, and 6 keys."""
    bias = torch.zeros(2, 6, device=device)
    yield Invalid("bias-rank", good | {"key_bias": bias[0]}, "expected key_bias of shape [B, Lk], got [6]")
    yield Invalid(
        "bias-shape", good | {"key_bias": bias[:, 1:]}, "expected key_bias of shape [B, Lk] = [2, 6], got [2, 5]"
    )
    yield Invalid("bias-dtype", good | {"key_bias": bias.bool()}, f"expected key_bias of dtype {FLOATS}, got Bool")
    for name in ("query_start", "key_start"):
        start = torch.zeros(2, dtype=torch.int64, device=device)
        yield Invalid(f"{name}-shape", good | {name: start[:1]}, f"expected {name} of shape [B] = [2], got [1]")
        yield Invalid(f"{name}-dtype", good | {name: start.float()}, f"expected {name} of dtype Long or Int, got Float")


def invalid_rows(good: Inputs, wanted: Mapping[str, Inputs]) -> Iterator[Invalid]:
    """What the backward alone refuses. `wanted` has, for each side input, the mask that asks for its gradient only."""
    for name in ("grad_output", "output"):
        yield Invalid(
            f"{name}-shape",
            good | {name: good[name][..., :2]},
            f"expected {name} of shape [B, Hq, Lq, Dv] = [2, 4, 5, 3], got [2, 4, 5, 2]",
        )
        yield Invalid(
            f"{name}-dtype", good | {name: good[name].half()}, f"expected {name} of query's dtype Float, got Half"
        )
    for name, dims, size in (
        ("normalizer", "[B, Hq, Lq, 2]", [2, 4, 5, 2]),
        ("grad_logsumexp", "[B, Hq, Lq]", [2, 4, 5]),
    ):
        yield Invalid(
            f"{name}-shape",
            good | {name: good[name][:1]},
            f"expected {name} of shape {dims} = {size}, got {[1, *size[1:]]}",
        )
        yield Invalid(
            f"{name}-dtype", good | {name: good[name].double()}, f"expected {name} of dtype Float, got Double"
        )
    for name, reason in (
        ("query", "probabilities are made of it"),
        ("key", "probabilities are made of it"),
        ("value", "gradients to scores are made of it"),
        ("output", "the gradients asked for are made of it"),
        ("grad_output", "value's gradient is asked for"),
    ):
        yield absent(good, name, reason)
    for name, mask in wanted.items():
        yield absent(good | mask, name, "its gradient is asked for")


def absent(good: Inputs, name: str, reason: str) -> Invalid:
    return Invalid(f"no-{name}", good | {name: None}, f"expected {name} to be a tensor because {reason}, got None")


def inputs_of_backward(
    forward: Callable[..., tuple[Tensor, ...]],
    inputs: Inputs,
    sides: Sequence[str],
    options: Inputs,
    grad_output: Tensor | None = None,
) -> Inputs:
    """Those of an attention's backward, from a call of its `forward`: gradients to everything that is there.

    `sides` are the optional inputs that have a gradient, and `options` what the backward, which has no defaults, takes
    where the call does not say."""
    output, logsumexp, normalizer = forward(**inputs)
    if grad_output is None:
        generator = torch.Generator().manual_seed(5)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return {
        "grad_output": grad_output,
        "grad_logsumexp": torch.ones_like(logsumexp),
        **options,
        **dict.fromkeys((*sides, "query_start", "key_start")),
        **inputs,
        "output": output,
        "normalizer": normalizer,
        "output_mask": [True, True, True, *(inputs.get(name) is not None for name in sides)],
    }


def only(differentiable: Sequence[str], *wanted: str) -> Inputs:
    """The mask that asks for these gradients; `differentiable` are the inputs that have one, in its order."""
    return {"output_mask": [name in wanted for name in differentiable]}


def samples_of_gradients(inputs: Inputs, differentiable: Sequence[str], lists: Sequence[str]) -> Iterator[Sample]:
    """Single gradients, and losses on one output, of a backward's inputs; what they are not made of is absent.

    `lists` are the inputs that say which keys a query attends to."""
    for name in differentiable:
        if name not in ("value", "sink"):
            yield Sample(f"to-{name}", inputs | only(differentiable, name))
    yield Sample("to-value", inputs | only(differentiable, "value") | none("value", "output"))
    unread = none(*(set(differentiable) - {"sink"}), *lists)
    yield Sample("to-sink", inputs | unread | only(differentiable, "sink"))
    yield Sample("without-lse", inputs | none("grad_logsumexp"))
    all_but_value = only(differentiable, *(set(differentiable) - {"value"}))
    without_value = none("grad_output", "value", "output") | all_but_value
    yield Sample("without-output", inputs | without_value)
    yield Sample("without-any", inputs | without_value | none("grad_logsumexp"))
