"""Routed feed-forward layers and experts of mixtures against dense layers, loops and torch's grouped product."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import torchops

from .eager import routed_ffn as eager
from .harness import FORWARD, FORWARD_BACKWARD, Contender, Finding, Operation, Options, Report, Row, Sizes, contender

NOTES = """\
Forward is without autograd. Forward + backward is the forward pass with autograd, then the gradients of tokens, gates \
and all weights; where weights are frozen, of tokens, gates and factors of low rank.
dense: the layer whose hidden units are cut into G blocks, of which a token has k. half: a dense layer with the share \
k / G of them, a bound and no rival. masked loop: block by block, the tokens that chose it (SPT's own). grouped_mm: \
tokens sorted by block, then torch.nn.functional.grouped_mm. expert loop and grouped_mm of experts: what transformers' \
eager and grouped_mm experts do. merged factors: experts' weights plus their factors, made anew in each call, as peft \
does it for target_parameters.
Choices are random: blocks have about the same number of tokens. Memory is the peak of what a call allocates, results \
included."""


@dataclass(frozen=True)
class Layer:
    tokens: int  # T
    size: int  # d
    hidden: int  # D, of all blocks
    blocks: int  # G
    slots: int  # k

    @property
    def share(self) -> float:
        return self.slots / self.blocks

    def __str__(self) -> str:
        return f"T={self.tokens} d={self.size} D={self.hidden} {self.slots} of {self.blocks}"


@dataclass(frozen=True)
class Experts:
    tokens: int  # T
    experts: int  # E
    size: int  # d
    hidden: int  # I, of each
    slots: int  # k

    def __str__(self) -> str:
        return f"T={self.tokens} E={self.experts} d={self.size} I={self.hidden} k={self.slots}"


SPT = Layer(2048, 768, 3072, 4, 2)
SPT_QUARTER = Layer(2048, 768, 3072, 8, 2)
SMALL_EXPERTS = [Experts(tokens, 32, 1024, 512, 8) for tokens in (512, 2048)]
MANY_EXPERTS = [Experts(tokens, 64, 2048, 768, 8) for tokens in (512, 2048)]
LARGE_EXPERTS = [Experts(512, 8, 2048, 4096, 2)]
DECODING = [Experts(1, 32, 1024, 512, 8), Experts(1, 64, 2048, 768, 8)]
RANK, SCALE = 16, 2.0

# As ratios in one run: (forward, forward + backward) by dtype.
OF_DENSE = {torch.float32: (2.1, 1.9), torch.bfloat16: (1.8, 1.8)}
OF_EXPERTS = (1.3, 1.4)
WITH_LORA = 2.0
DECODED = 1.1
MERGED = {
    torch.float32: {64: 4.5, 512: 3.0},
    torch.bfloat16: {64: 3.2, 512: 2.0},
}


def rows(options: Options) -> Iterator[Row]:
    layers = [SPT] if options.quick else [SPT, SPT_QUARTER]
    experts = SMALL_EXPERTS[:1] if options.quick else [*SMALL_EXPERTS, *MANY_EXPERTS[:1], *LARGE_EXPERTS]
    if options.full or options.device.type == "cuda":
        experts += MANY_EXPERTS[1:]
    adapted = [Experts(tokens, 32, 1024, 512, 8) for tokens in (64, 512)]
    shapes: dict[str, Sequence[Layer | Experts]] = {
        "routed FFN": layers,
        "routed FFN, frozen, with LoRA": layers,
        "experts": experts,
        "experts, one token": DECODING,
        "experts, frozen, with LoRA": adapted,
    }
    for operation, kind in KINDS.items():
        for shape in shapes[operation]:
            for dtype in options.dtypes:
                for direction in kind.directions:
                    yield ffn_row(operation, shape, dtype, direction, options)


def ffn_row(operation: str, shape: Layer | Experts, dtype: torch.dtype, direction: str, options: Options) -> Row:
    make = partial(KINDS[operation].contenders, shape, dtype, options.device, direction == FORWARD_BACKWARD)
    return Row(operation, str(shape), dtype, direction, make, round_seconds=seconds(shape, direction))


def seconds(shape: Layer | Experts, direction: str) -> float:
    """At 100 GFLOP/s, all contenders together."""
    hidden = shape.hidden if isinstance(shape, Layer) else 1.5 * shape.hidden * shape.slots
    return 4 * (3 if direction == FORWARD_BACKWARD else 1) * 4e-11 * shape.tokens * shape.size * hidden


# ---- layers -------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    x: Tensor  # [T, d]
    chosen: Tensor  # [T, k]
    gate: Tensor  # [T, k], float32
    grad: Tensor  # [T, d]


def inputs(shape: Layer | Experts, blocks: int, dtype: torch.dtype, device: torch.device, backward: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape.tokens, shape.size, generator=generator).to(device, dtype) for _ in range(2))
    index = torch.rand(shape.tokens, blocks, generator=generator).topk(shape.slots).indices.to(device)
    gate = torch.rand(shape.tokens, shape.slots, generator=generator).to(device)
    return Inputs(x.requires_grad_(backward), index, gate.requires_grad_(backward), grad)


def weights(*shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device, trained: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype).requires_grad_(trained)
        for shape in shapes
    ]


def routed(shape: Layer, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, Contender]:
    x, index, gate, grad = inputs(shape, shape.blocks, dtype, device, backward)
    size, hidden, blocks = shape.size, shape.hidden, shape.blocks
    w1, w2, b1 = weights((hidden, size), (size, hidden), (hidden,), dtype=dtype, device=device, trained=backward)

    def cut() -> tuple[Tensor, Tensor, Tensor]:
        width = hidden // blocks
        return w1.view(blocks, width, size), w2.view(size, blocks, width).permute(1, 0, 2), b1.view(blocks, width)

    def ours() -> tuple[Tensor]:
        first, second, bias = cut()
        return (torchops.routed_ffn(x, index, gate, first, second, bias, activation="gelu"),)

    # The dense layers have no gates. PyTorch adds the gradient of a bias up in its own dtype where rows choose among
    # biases: that of grouped_mm is not compared.
    dense_leaves, leaves = [x, w1, w2, b1], [x, w1, w2, gate, b1]
    target = OF_DENSE.get(dtype, (None, None))[backward] if shape == SPT else None
    return {
        "torchops": contender(ours, leaves, grad),
        "dense": contender(
            lambda: (eager.dense_ffn(x, w1, w2, b1),), dense_leaves, grad, align=None, target=target
        ),
        "half": Contender(
            contender(
                lambda: (eager.dense_ffn(x, *eager.half(w1, w2, b1, shape.share)),), dense_leaves, grad
            ).run,
            align=None,
            is_bound=True,
        ),
        "masked loop": contender(lambda: (eager.masked_ffn(x, index, gate, *cut()),), leaves, grad),
        "grouped_mm": contender(
            lambda: (eager.grouped_ffn(x, index, gate, *cut()),), leaves, grad,
            align=lambda results: results[:-1] if backward else results,
        ),
    }  # fmt: skip


def routed_with_lora(shape: Layer, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, Contender]:
    x, index, gate, grad = inputs(shape, shape.blocks, dtype, device, backward)
    size, hidden, blocks, width = shape.size, shape.hidden, shape.blocks, shape.hidden // shape.blocks
    w1, w2, b1 = weights((hidden, size), (size, hidden), (hidden,), dtype=dtype, device=device, trained=False)
    factors = weights((RANK, size), (hidden, RANK), (RANK, hidden), (size, RANK),
                      dtype=dtype, device=device, trained=True)  # fmt: skip
    a1, up1, a2, up2 = factors

    def ours() -> tuple[Tensor]:
        return (
            torchops.routed_ffn(
                x, index, gate,
                w1.view(blocks, width, size),
                w2.view(size, blocks, width).permute(1, 0, 2),
                b1.view(blocks, width),
                lora_a1=a1[None],
                lora_b1=up1.view(blocks, width, RANK),
                lora_a2=a2.view(RANK, blocks, width).permute(1, 0, 2),
                lora_b2=up2[None],
                activation="gelu",
                gate_at="both",
            ),
        )  # fmt: skip

    return {
        "torchops": contender(ours, [x, *factors, gate], grad),
        "dense with LoRA": contender(
            lambda: (eager.lora_ffn(x, w1, w2, b1, *factors),), [x, *factors], grad, align=None,
            target=WITH_LORA if shape == SPT else None,
        ),
    }  # fmt: skip


# ---- experts ------------------------------------------------------------------------------------


def experts_of_mixture(
    shape: Experts, dtype: torch.dtype, device: torch.device, backward: bool
) -> dict[str, Contender]:
    x, index, gate, grad = inputs(shape, shape.experts, dtype, device, backward)
    gate_up, down = weights(
        (shape.experts, 2 * shape.hidden, shape.size), (shape.experts, shape.size, shape.hidden),
        dtype=dtype, device=device, trained=backward,
    )  # fmt: skip
    leaves = [x, gate_up, down, gate]
    target = DECODED if shape.tokens == 1 else OF_EXPERTS[backward]
    return {
        "torchops": contender(
            lambda: (torchops.routed_ffn(x, index, gate, gate_up, down, activation="silu", glu="concat"),), leaves, grad
        ),
        "expert loop": contender(
            lambda: (eager.experts_loop(x, index, gate, gate_up, down),), leaves, grad, target=target
        ),
        "grouped_mm": contender(
            lambda: (eager.experts_grouped(x, index, gate, gate_up, down),), leaves, grad, target=target
        ),
    }


def experts_with_lora(shape: Experts, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, Contender]:
    x, index, gate, grad = inputs(shape, shape.experts, dtype, device, backward)
    up_shape, down_shape = (shape.experts, 2 * shape.hidden, shape.size), (shape.experts, shape.size, shape.hidden)
    gate_up, down = weights(up_shape, down_shape, dtype=dtype, device=device, trained=False)
    factors = weights(
        *((*part[:1], RANK, part[2]) for part in (up_shape, down_shape)),
        *((*part[:2], RANK) for part in (up_shape, down_shape)),
        dtype=dtype, device=device, trained=True,
    )  # fmt: skip
    a1, a2, b1, b2 = factors

    def ours() -> tuple[Tensor]:
        return (
            torchops.routed_ffn(
                x, index, gate, gate_up, down, lora_a1=a1, lora_b1=b1, lora_a2=a2, lora_b2=b2, lora_scale=SCALE,
                activation="silu", glu="concat",
            ),
        )  # fmt: skip

    def merged() -> tuple[Tensor]:
        whole = eager.with_factors(gate_up, a1, b1, SCALE), eager.with_factors(down, a2, b2, SCALE)
        return (eager.experts_grouped(x, index, gate, *whole),)

    return {
        "torchops": contender(ours, [x, *factors, gate], grad),
        "merged factors": contender(merged, [x, *factors, gate], grad, target=MERGED.get(dtype, {}).get(shape.tokens)),
    }


# ---- operations ---------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What makes the contenders of an operation, and the directions in which they are measured."""

    contenders: Callable[..., dict[str, Contender]]
    directions: Sequence[str] = (FORWARD, FORWARD_BACKWARD)


KINDS = {
    "routed FFN": Kind(routed),
    "routed FFN, frozen, with LoRA": Kind(routed_with_lora, (FORWARD_BACKWARD,)),
    "experts": Kind(experts_of_mixture),
    "experts, one token": Kind(experts_of_mixture, (FORWARD,)),
    "experts, frozen, with LoRA": Kind(experts_with_lora, (FORWARD_BACKWARD,)),
}


def layer_of(operation: str, sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    layer = Layer(*(sizes[name] for name in ("T", "d", "D", "G", "k")))
    return ffn_row(operation, layer, dtype, direction, options)


def experts_of(operation: str, sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    experts = Experts(*(sizes[name] for name in ("T", "E", "d", "I", "k")))
    return ffn_row(operation, experts, dtype, direction, options)


LAYER_SIZES = {"T": 2048, "d": 768, "D": 3072, "G": 4, "k": 2}
EXPERT_SIZES = {"T": 512, "E": 32, "d": 1024, "I": 512, "k": 8}
OPERATIONS = {
    name: Operation(
        LAYER_SIZES if name.startswith("routed") else EXPERT_SIZES,
        partial(layer_of if name.startswith("routed") else experts_of, name),
        kind.directions,
    )
    for name, kind in KINDS.items()
    if name != "experts, one token"  # experts with T=1
}


# ---- findings -----------------------------------------------------------------------------------


def findings(report: Report) -> list[Finding]:
    rows = [row for row in report.rows if row.direction == FORWARD_BACKWARD]
    names = list(dict.fromkeys(name for row in rows for name in row.contenders))
    lines = [
        [row.operation, row.shape, row.dtype]
        + [f"{row.contenders[name].peak_extra_bytes / 1e6:.0f}" if name in row.contenders else "" for name in names]
        for row in rows
    ]
    title = "Peak memory of a training step: MB that forward + backward allocates, outputs and gradients included"
    return [Finding(title, ["operation", "shape", "dtype", *names], lines, on_family_page=True)] if lines else []
