"""The routed_ffn family's products: grouped_linear and routed_ffn."""

from collections.abc import Iterator
from typing import Any

import torch
from contract import Inputs, Invalid, OpCase, Sample, lowered, random
from torch import Tensor

from torchops._namespace import operators
from torchops.reference import routed_ffn as reference

from .routed_ffn import choices

# 16 bits: what is rounded between the two layers goes through the second one.
ROUNDED_TWICE = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 6e-3}


# ---- grouped_linear -----------------------------------------------------------------------------


def grouped(
    tokens: int, slots: int | None, blocks: int, size: int, outputs: int, dtype: torch.dtype, device: str,
    bias: bool = True, skipped: int = 1,
) -> Inputs:  # fmt: skip
    """Without slots, `tokens` rows that are sorted already."""
    order, offsets = reference.route(choices(tokens, slots or 1, blocks, device, skipped), blocks)
    inputs: Inputs = {
        "input": random(tokens, size, dtype=dtype, device=device),
        "weight": random(blocks, outputs, size, dtype=dtype, device=device, seed=1),
        "order": order,
        "offsets": offsets,
        "slots": slots,
    }
    return inputs | ({"bias": random(blocks, outputs, dtype=dtype, device=device, seed=2)} if bias else {})


def grouped_linear_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for tokens, slots, blocks, size, outputs in [
        (7, 2, 3, 10, 6),
        (9, None, 4, 5, 3),
        (150, 2, 3, 40, 70),  # more rows than few
        (260, None, 2, 33, 17),
        (23, 3, 9, 18, 50),
        (12, 1, 1, 4, 4),
        (5, 1, 20, 3, 2),  # blocks without rows
        (6, 2, 3, 1, 4),
        (6, 2, 3, 4, 1),
        (1, 1, 2, 1, 1),
        (0, 2, 3, 4, 5),
        (6, 2, 3, 0, 5),
        (6, 2, 3, 4, 0),
    ]:
        inputs = grouped(tokens, slots, blocks, size, outputs, dtype, device, bias=tokens % 2 == 0)
        yield Sample(f"T{tokens}-k{slots}-G{blocks}-{size}-{outputs}", inputs)
    inputs = grouped(30, 2, 3, 12, 10, dtype, device)
    transposed = random(3, 12, 10, dtype=dtype, device=device, seed=1).transpose(1, 2)
    yield Sample("weight-transposed", inputs | {"weight": transposed})
    sliced = random(10, 3, 12, dtype=dtype, device=device, seed=1).transpose(0, 1)
    yield Sample("weight-slices", inputs | {"weight": sliced})
    yield Sample("no-rows", inputs | {"offsets": torch.zeros_like(inputs["offsets"])})


def grouped_linear_invalid(device: str) -> Iterator[Invalid]:
    good = grouped(6, 2, 3, 4, 5, torch.float32, device)
    order, offsets, weight = good["order"], good["offsets"], good["weight"]
    yield Invalid("rank", good | {"input": good["input"][0]}, "expected input of shape [T, K], got [4]")
    yield Invalid("rows", good | {"slots": None}, "expected input's first dimension to be order's length M = 12, got 6")
    yield Invalid("slots", good | {"slots": 3}, "expected order's length M to be T slots = 18, got 12")
    yield Invalid("slots0", good | {"slots": 0}, "expected slots >= 1, got 0")
    yield Invalid("weight-rank", good | {"weight": weight[0]}, "expected weight of shape [G, N, K], got [5, 4]")
    yield Invalid("dtype", good | {"weight": weight.half()}, "expected weight of input's dtype Float, got Half")
    yield Invalid(
        "K", good | {"weight": weight[..., 1:]}, "expected input's last dimension to be weight's K = 3, got 4"
    )
    yield Invalid("order-dtype", good | {"order": order.long()}, "expected order of dtype Int, got Long")
    yield Invalid("order-rank", good | {"order": order[None]}, "expected order of shape [M], got [1, 12]")
    yield Invalid("G", good | {"offsets": offsets[1:]}, "expected offsets of shape [G + 1] = [4], got [3]")
    yield Invalid("offsets-dtype", good | {"offsets": offsets.long()}, "expected offsets of dtype Int, got Long")
    yield Invalid("bias", good | {"bias": good["bias"][:, 1:]}, "expected bias of shape [G, N] = [3, 5], got [3, 4]")
    yield from invalid_grouping(good)


def invalid_grouping(good: Inputs) -> Iterator[Invalid]:
    order, offsets = good["order"], good["offsets"]
    twice, far, down = order.clone(), order.clone(), offsets.clone()
    twice[5] = twice[2]
    far[4] = 12
    down[1] = 12
    message = "expected order to be a permutation of 0..M - 1 = 11, got "
    yield Invalid("twice", good | {"order": twice}, f"{message}{int(twice[2])} at 5 again", data_dependent=True)
    yield Invalid("far", good | {"order": far}, f"{message}12 at 4", data_dependent=True)
    ends = "expected offsets to ascend from 0 to M = 12 at most, got "
    yield Invalid("down", good | {"offsets": down}, f"{ends}{int(down[2])} at 2", data_dependent=True)
    yield Invalid("beyond", good | {"offsets": offsets + 12}, f"{ends}12 at 0", data_dependent=True)


def grouped_linear_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return grouped(3 * length, 1, 5, 48, 40, dtype, device)


def grouped_linear_autocast(device: str) -> tuple[Inputs, Inputs]:
    return lowered(grouped_linear_sized(torch.float32, device, 8))


def grouped_backward(inputs: Inputs) -> Inputs:
    rows = inputs["order"].numel()
    output = random(rows, inputs["weight"].shape[1], dtype=inputs["weight"].dtype, device=str(inputs["order"].device))
    given = {name: value for name, value in inputs.items() if name != "bias"}
    return given | {"grad_output": output, "output_mask": [True] * 3}


def grouped_backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in grouped_linear_samples(dtype, device):
        inputs = grouped_backward(sample.inputs)
        yield Sample(sample.id, inputs)
        yield Sample(f"{sample.id}-input", inputs | {"input": None, "output_mask": [True, False, False]})


def grouped_backward_invalid(device: str) -> Iterator[Invalid]:
    good = grouped_backward(grouped(6, 2, 3, 4, 5, torch.float32, device))
    grad = good["grad_output"]
    yield Invalid(
        "grad", good | {"grad_output": grad[1:]}, "expected grad_output of shape [M, N] = [12, 5], got [11, 5]"
    )
    yield Invalid(
        "input",
        good | {"input": None},
        "expected input to be a tensor because the weight's gradient takes it, got None",
    )
    yield from invalid_grouping(good)


def grouped_backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return grouped_backward(grouped_linear_sized(dtype, device, length))


# ---- routed_ffn ---------------------------------------------------------------------------------

WEIGHTS = ("w1", "w2", "b1", "b2", "w_gate", "lora_a1", "lora_b1", "lora_a2", "lora_b2")
DIFFERENTIABLE = ("input", "gate", *WEIGHTS)


def layer(
    dtype: torch.dtype, device: str, leading: tuple[int, ...] = (9,), slots: int = 2, blocks: int = 3, size: int = 10,
    hidden: int = 7, glu: str = "none", bias: str = "", rank: int = 0, shared: bool = True, gated: bool = True,
    gate_dtype: torch.dtype | None = None, **options: Any,
) -> Inputs:  # fmt: skip
    """bias is "", "block" or "once" for b2's form, with b1."""

    def numbers(seed: int, *shape: int) -> Tensor:
        return (random(*shape, dtype=torch.float64, device=device, seed=seed) / max(shape[-1], 1) ** 0.5).to(dtype)

    width = hidden if glu == "none" else 2 * hidden
    tokens = 1
    for count in leading:
        tokens *= count
    inputs: Inputs = {
        "input": random(*leading, size, dtype=dtype, device=device),
        "index": choices(tokens, slots, blocks, device, skipped=1).view(*leading, slots),
        "w1": numbers(1, blocks, width if glu in ("concat", "interleaved") else hidden, size),
        "w2": numbers(2, blocks, size, hidden),
        "gate": None,
        "glu": glu,
    } | options
    if gated:
        gate = random(*leading, slots, dtype=torch.float64, device=device, seed=3).sigmoid()
        inputs["gate"] = gate.to(gate_dtype or dtype)
    if bias:
        inputs["b1"] = numbers(4, blocks, width)
        inputs["b2"] = numbers(5, size) if bias == "once" else numbers(5, blocks, size)
    if glu == "split":
        inputs["w_gate"] = numbers(6, blocks, hidden, size)
    if rank:
        inputs |= {
            "lora_a1": numbers(7, 1 if shared else blocks, rank, size),
            "lora_b1": numbers(8, blocks, width, rank),
            "lora_a2": numbers(9, blocks, rank, hidden),
            "lora_b2": numbers(10, 1 if shared else blocks, size, rank),
            "lora_scale": 0.7,
        }
    return inputs


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "vector": {"leading": ()},
    "leading-sizes": {"leading": (2, 3)},
    "one-slot": {"slots": 1, "leading": (40,)},
    "three-slots": {"slots": 3, "blocks": 2, "leading": (30,)},
    "many-rows": {"leading": (130,), "blocks": 2, "size": 33, "hidden": 70},
    "empty-blocks": {"blocks": 20, "leading": (3,)},
    "one-number": {"size": 1, "hidden": 1, "blocks": 1, "leading": (1,), "slots": 1},
    "T0": {"leading": (0,)},
    "hidden0": {"hidden": 0},
}


def layer_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, shape in SHAPES.items():
        yield Sample(name, layer(dtype, device, activation="silu", bias="block", **shape))
    for activation in ("gelu", "gelu_tanh", "silu"):
        yield Sample(activation, layer(dtype, device, activation=activation, bias="once", leading=(25,)))
        for glu in ("split", "concat", "interleaved"):
            options = {"up_offset": 1.0, "alpha": 1.702} if activation == "silu" else {}
            inputs = layer(dtype, device, activation=activation, glu=glu, bias="block", hidden=19, **options)
            yield Sample(f"{activation}-{glu}", inputs)
    for gate_at in ("output", "input", "both"):
        for glu in ("none", "split"):
            for shared in (True, False):
                inputs = layer(
                    dtype, device, gate_at=gate_at, glu=glu, activation="gelu", bias="block", rank=3, shared=shared
                )
                yield Sample(f"{gate_at}-{glu}-lora-{'shared' if shared else 'blocks'}", inputs)
        yield Sample(gate_at, layer(dtype, device, gate_at=gate_at, activation="gelu", bias="block"))
        yield Sample(
            f"{gate_at}-no-gate", layer(dtype, device, gate_at=gate_at, activation="gelu", gated=False, rank=2)
        )
    inputs = layer(dtype, device, activation="gelu", bias="block", rank=2)
    yield Sample("recompute", inputs | {"recompute": True})
    wide_gate = layer(dtype, device, activation="silu", glu="concat", gate_dtype=torch.float32)
    yield Sample("gate-of-another-dtype", wide_gate)
    yield Sample("int32", inputs | {"index": inputs["index"].int()})
    yield Sample("all-skipped", inputs | {"index": torch.full_like(inputs["index"], -1)})
    slices = {name: random(*inputs[name].transpose(0, 1).shape, dtype=dtype, device=device, seed=6).transpose(0, 1)
              for name in ("w1", "w2")}  # fmt: skip
    yield Sample("slices-of-one-weight", inputs | slices)
    transposed = {name: inputs[name].mT.contiguous().mT for name in ("w1", "w2")}
    yield Sample("transposed-weights", inputs | transposed)
    if dtype in (torch.float64, torch.float32):  # elsewhere rounding decides on which side of a kink a number is
        for activation in ("relu", "relu2"):
            yield Sample(activation, layer(dtype, device, activation=activation, bias="block", leading=(25,)))
            yield Sample(f"{activation}-split", layer(dtype, device, activation=activation, glu="split"))
        for glu in ("concat", "interleaved"):
            options = {"activation": "silu", "alpha": 1.702, "limit": 0.5, "up_offset": 1.0}
            yield Sample(f"limit-{glu}", layer(dtype, device, glu=glu, hidden=21, bias="block", **options))
        awkward = layer(dtype, device, activation="gelu", leading=(45,))
        for name, number in (("nan", torch.nan), ("infinite", torch.inf)):
            with_number = awkward["input"].clone()
            with_number[3, 2] = number
            yield Sample(name, awkward | {"input": with_number})
        skipped = awkward["index"].clone()
        skipped[3] = -1
        gate = awkward["gate"].clone()
        gate[3] = torch.nan
        yield Sample("gate-of-skipped-nan", awkward | {"index": skipped, "gate": gate})


def layer_invalid(device: str) -> Iterator[Invalid]:
    def good(**options: Any) -> Inputs:
        return layer(torch.float32, device, leading=(6,), **options)

    plain, full = good(bias="block", rank=2), good(glu="split", bias="once")
    w1, index = plain["w1"], plain["index"]
    yield Invalid("scalar", plain | {"input": plain["input"][0, 0]}, "expected input of shape [..., d], got []")
    yield Invalid(
        "dtype", plain | {"input": plain["input"].int()},
        "expected input of dtype Double, Float, BFloat16 or Half, got Int",
    )  # fmt: skip
    yield Invalid("w1-rank", plain | {"w1": w1[0]}, "expected w1 of shape [G, N1, d], got [7, 10]")
    yield Invalid("w1", plain | {"w1": w1[:, 1:]}, "expected w1 of shape [G, N1, d] = [3, 7, 10], got [3, 6, 10]")
    yield Invalid("w1-dtype", plain | {"w1": w1.half()}, "expected w1 of input's dtype Float, got Half")
    yield Invalid("concat", plain | {"glu": "concat"}, "expected w1 of shape [G, N1, d] = [3, 14, 10], got [3, 7, 10]")
    yield Invalid(
        "w2", plain | {"w2": plain["w2"][:, 1:]}, "expected w2 of shape [G, d, N] = [3, 10, 7], got [3, 9, 7]"
    )
    yield Invalid("no-w_gate", full | {"w_gate": None}, "expected w_gate to be a tensor because glu is split, got None")
    yield Invalid("w_gate", plain | {"w_gate": w1}, "expected no w_gate because glu is not split, got one")
    yield Invalid("b1", full | {"b1": plain["b1"]}, "expected b1 of shape [G, preactivations] = [3, 14], got [3, 7]")
    yield Invalid("b2", plain | {"b2": plain["b2"][1:]}, "expected b2 of shape [G, d] = [3, 10], got [2, 10]")
    yield Invalid("b2-once", full | {"b2": full["b2"][1:]}, "expected b2 of shape [d] = [10], got [9]")
    yield Invalid(
        "lora-half", plain | {"lora_b1": None},
        "expected lora_b1 to be a tensor because the other factor is given, got None",
    )  # fmt: skip
    yield Invalid(
        "lora-blocks", plain | {"lora_a1": plain["lora_a1"].expand(2, 2, 10)},
        "expected lora_a1 of shape [G, r, in] = [3, 2, 10], got [2, 2, 10]",
    )  # fmt: skip
    yield Invalid(
        "lora-rank", plain | {"lora_b2": plain["lora_b2"][..., 1:]},
        "expected lora_b2 of shape [G, out, r] = [1, 10, 2], got [1, 10, 1]",
    )  # fmt: skip
    yield Invalid("index-dtype", plain | {"index": index.float()}, "expected index of dtype Long or Int, got Float")
    yield Invalid("index", plain | {"index": index[1:]}, "expected index of shape [6, 2], got [5, 2]")
    yield Invalid("gate", plain | {"gate": plain["gate"][:, 1:]}, "expected gate of shape [6, 2], got [6, 1]")
    yield Invalid(
        "activation", plain | {"activation": "tanh"},
        "expected activation to be relu, relu2, gelu, gelu_tanh or silu, got tanh",
    )  # fmt: skip
    yield Invalid("glu", plain | {"glu": "both"}, "expected glu to be none, split, concat or interleaved, got both")
    yield Invalid("gate_at", plain | {"gate_at": "h"}, "expected gate_at to be output, input or both, got h")
    yield Invalid("limit", plain | {"limit": 7.0}, "expected no limit because glu is none, got one")
    yield Invalid("up_offset", plain | {"up_offset": 1.0}, "expected no up_offset because glu is none, got one")


def layer_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return layer(dtype, device, leading=(3 * length,), blocks=4, size=48, hidden=32, activation="gelu")


def layer_large(device: str) -> Inputs:
    """The tokens and their results are 4 GB each."""
    tokens = 2**22 + 1
    inputs = layer(torch.bfloat16, device, slots=1, size=2**9, hidden=8)
    return inputs | {
        "input": torch.empty(tokens, 2**9, dtype=torch.bfloat16, device=device).normal_(),
        "index": choices(tokens, 1, 3, device),
        "gate": torch.rand(tokens, 1, dtype=torch.bfloat16, device=device),
    }


def layer_autocast(device: str) -> tuple[Inputs, Inputs]:
    return lowered(layer(torch.float32, device, activation="silu", glu="concat", bias="block"), "gate")


OPTIONS: Inputs = {
    "activation": "relu", "glu": "none", "alpha": 1.0, "limit": None, "up_offset": 0.0, "gate_at": "output",
    "lora_scale": 1.0, "recompute": False,
}  # fmt: skip


def complete(inputs: Inputs) -> Inputs:
    """Internal operators have no defaults."""
    return dict.fromkeys(WEIGHTS) | OPTIONS | inputs


INTERNAL = (
    "plain", "vector", "many-rows", "empty-blocks", "T0", "gelu-split", "output-none-lora-shared",
    "both-split-lora-blocks", "input-none-lora-shared", "silu-interleaved", "int32", "all-skipped",
)  # fmt: skip


def forward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in layer_samples(dtype, device):
        if sample.id in INTERNAL:
            yield Sample(sample.id, complete(sample.inputs))


def forward_invalid(device: str) -> Iterator[Invalid]:
    for call in layer_invalid(device):
        yield Invalid(call.id, complete(call.inputs), call.message)


def forward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return complete(layer_sized(dtype, device, length))


def layer_backward(inputs: Inputs) -> Inputs:
    output, preactivation = operators._routed_ffn_forward(**inputs)
    return inputs | {
        "grad_output": random(*output.shape, dtype=output.dtype, device=output.device.type, seed=5),
        "preactivation": preactivation,
        "output_mask": [inputs[name] is not None for name in DIFFERENTIABLE],
    }


def backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in forward_samples(dtype, device):
        inputs = layer_backward(sample.inputs)
        yield Sample(sample.id, inputs)
        if sample.inputs["gate_at"] == "output":
            to_input = [name == "input" for name in DIFFERENTIABLE]
            yield Sample(f"{sample.id}-input", inputs | {"input": None, "output_mask": to_input})
        yield Sample(f"{sample.id}-recompute", inputs | {"preactivation": None, "recompute": True})


def backward_invalid(device: str) -> Iterator[Invalid]:
    good = layer_backward(complete(layer(torch.float32, device, leading=(6,))))
    yield Invalid(
        "input", good | {"input": None},
        "expected input to be a tensor because a gradient that is asked for takes it, got None",
    )  # fmt: skip
    yield Invalid(
        "preactivation", good | {"preactivation": None},
        "expected preactivation to be a tensor because it is not computed again, got None",
    )  # fmt: skip
    yield Invalid(
        "preactivation-shape", good | {"preactivation": good["preactivation"][1:]},
        "expected preactivation of shape [T k, preactivations] = [12, 7], got [11, 7]",
    )  # fmt: skip
    yield Invalid(
        "grad", good | {"grad_output": good["grad_output"][:, 1:]},
        "expected w1 of shape [G, N1, d] = [3, 7, 9], got [3, 7, 10]",
    )  # fmt: skip


def backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return layer_backward(forward_sized(dtype, device, length))


CASES = [
    OpCase(
        "grouped_linear",
        grouped_linear_samples,
        grouped_linear_invalid,
        grouped_linear_sized,
        reference=reference.grouped_linear,
        differentiable=("input", "weight", "bias"),
        backward="_grouped_linear_backward",
        unbatched=("input", "weight", "order", "offsets", "bias"),
        bits_follow_layout=("weight",),
        not_expanded=("order", "offsets"),
        autocast=grouped_linear_autocast,
        launches=2,
    ),
    OpCase(
        "_grouped_linear_backward",
        grouped_backward_samples,
        grouped_backward_invalid,
        grouped_backward_sized,
        bits_follow_layout=("weight",),
        not_expanded=("order", "offsets"),
        launches=5,
    ),
    OpCase(
        "routed_ffn",
        layer_samples,
        layer_invalid,
        layer_sized,
        reference=reference.routed_ffn,
        differentiable=DIFFERENTIABLE,
        output_tolerance=ROUNDED_TWICE,
        gradient_tolerance=ROUNDED_TWICE,
        backward="_routed_ffn_backward",
        unbatched=WEIGHTS,
        bits_follow_layout=WEIGHTS,
        autocast=layer_autocast,
        launches=8,
        large=layer_large,
    ),
    OpCase(
        "_routed_ffn_forward",
        forward_samples,
        forward_invalid,
        forward_sized,
        bits_follow_layout=WEIGHTS,
        launches=8,
    ),
    OpCase(
        "_routed_ffn_backward",
        backward_samples,
        backward_invalid,
        backward_sized,
        bits_follow_layout=WEIGHTS,
        launches=10,
    ),
]
