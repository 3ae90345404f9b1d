"""Attention in windows and blocks against PyTorch's attention: full, masked, reshaped, compiled."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import torchops

from .eager import span_attention as eager
from .eager.span_attention import Attention, Block, CausalSpan, Window
from .harness import (
    FORWARD,
    FORWARD_BACKWARD,
    Absent,
    Contender,
    Curves,
    Finding,
    Operation,
    Options,
    Report,
    Row,
    Sizes,
    contender,
    machine,
)
from .harness.results import RowResult

NOTES = """\
n: queries and keys, W: keys that a query sees, itself included, b: tokens in a block, H: heads (Hkv: heads of keys \
and values), D: features of a head. Everything is causal but the rows of the Vision Transformer.
Forward is without autograd. Forward + backward is the forward pass with autograd, then the gradients of query, key \
and value, from a gradient of the output that was made beforehand. Masks and what torch.compile makes are made \
beforehand, too.
SDPA is torch's scaled_dot_product_attention: full causal (is_causal, which does other work, so that its result is not \
compared), + mask (bool; in the Vision Transformer a bias of the activations' dtype), reshaped (blocks as heads, a \
view). FlexAttention is compiled for each shape. That all others agree with torchops was checked before the \
timing, but for the 16-bit gradients of SDPA among 8192 tokens, which are up to five times as far from those in \
float64 as torchops's.
A copy of the keys, beside decoding, moves as many bytes as decoding reads: a bound, not a rival.
torchops float32, beside bfloat16: the same call on the same numbers in float32.
Memory is the peak of what torch allocates during a call, results included; that of a target is what the process grows \
by, so that scratch counts."""

CROSSOVER = Curves(
    "crossover",
    "Causal window of 1024 keys (H=4 D=64): time over the number of tokens n",
    "causal window",
    "n",
    {"span": 1024, "H": 4, "D": 64},
    "seconds",
)
CURVES = (
    Curves(
        "headline",
        "Attention to a causal window of 1024 keys, 4 heads of 64 features: seconds over the number of tokens n",
        "causal window",
        "n",
        CROSSOVER.fixed,
        "seconds",
        only=("float32", "forward"),
    ),
    CROSSOVER,
    Curves(
        "spans",
        "Causal window of 4096 tokens (H=4 D=64): time / torchops's time over the keys that a query sees",
        "causal window",
        "span",
        {"n": 4096, "H": 4, "D": 64},
        "ratio",
    ),
)

FULL_CAUSAL = "SDPA full causal"
MASKED = "SDPA + mask"
RESHAPED = "SDPA reshaped"
FLEX = "FlexAttention compiled"
OWN_FLOAT32 = "torchops float32"
COPY = "copy of the keys"

# Rivals that would take more are absent: of floating-point operations in a call (unless --full), of memory always.
MOST_OPERATIONS = {"cpu": 3e11, "cuda": 3e14}
MOST_BYTES = 8 * 2**30
# For the estimate of a run's duration, on two cores.
OPERATIONS_PER_SECOND = {"cpu": 1.5e11, "cuda": 1e14}
COMPILE_SECONDS = 3.5


@dataclass(frozen=True)
class Shape:
    tokens: int  # n
    heads: int = 4  # H
    features: int = 64  # D
    key_heads: int | None = None  # Hkv, if not H
    batch: int = 1  # B

    def __str__(self) -> str:
        grouped = f" Hkv={self.key_heads}" if self.key_heads else ""
        batch = f" B={self.batch}" if self.batch > 1 else ""
        return f"H={self.heads}{grouped} D={self.features}{batch}"

    @property
    def parameters(self) -> dict[str, int]:
        heads = {"H": self.heads, "Hkv": self.key_heads or self.heads}
        return {"B": self.batch, "n": self.tokens, **heads, "D": self.features}

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Of a query and of the output."""
        return (self.batch, self.heads, self.tokens, self.features)

    def operations(self, pairs: int, backward: bool) -> float:
        """Two products of matrices in the forward pass, five in the backward."""
        return 4.0 * pairs * self.batch * self.heads * self.features * (3.5 if backward else 1)


@dataclass(frozen=True)
class Targets:
    """By rival; empty where the shape has none."""

    ratios: Mapping[str, float]
    memory: int | None = None


NO_TARGETS = Targets({})
LENGTHS = (512, 1024, 1536, 2048, 4096, 8192, 16384, 32768, 65536)
SPANS = (64, 128, 256, 2048)  # and 1024, which is among the lengths
VISION = Shape(197, heads=12, batch=8)
WEIGHTED_VISION = "Vision Transformer, merged tokens weighted"


def rows(options: Options) -> Iterator[Row]:
    base = Shape(4096)
    windows = [(Shape(n), 1024) for n in LENGTHS] + [(base, span) for span in SPANS]
    windows += [(replace(base, features=128), 1024), (replace(base, heads=8, key_heads=2), 1024)]
    blocks = [(base, span) for span in (64, 256, 1024)]
    blocks += [(Shape(8192), 1024), (replace(base, features=128), 1024)]
    full_lengths = [16, 32, 64, 128, 2048, 8192]
    if options.quick:
        windows, blocks, full_lengths = [(Shape(2048), 256)], [(Shape(2048), 256)], [64, 1024]
    for dtype in options.dtypes:
        for direction in (FORWARD, FORWARD_BACKWARD):
            for shape, size in windows:
                yield span_row("causal window", shape, Window(size), dtype, direction, options)
            for shape, size in blocks:
                yield span_row("causal blocks", shape, Block(size), dtype, direction, options)
            for tokens in full_lengths:
                yield full_row(Shape(tokens), dtype, direction, options)
            for tokens in (197, 577):
                for weighted in (False, True):
                    yield vision_row(replace(VISION, tokens=tokens), weighted, dtype, direction, options)
        yield from decoding_rows(dtype, options)


# ---- windows and blocks -------------------------------------------------------------------------


def span_row(
    operation: str, shape: Shape, span: Window | Block, dtype: torch.dtype, direction: str, options: Options
) -> Row:
    backward = direction == FORWARD_BACKWARD
    tokens = shape.tokens
    pairs = {
        "torchops": span.num_pairs(tokens),
        FULL_CAUSAL: Window(tokens).num_pairs(tokens),
        MASKED: tokens**2,
        RESHAPED: span.num_pairs(tokens),
        FLEX: span.num_pairs(tokens),
    }
    if isinstance(span, Window):
        del pairs[RESHAPED]
    absent = {
        name: reason
        for name, count in pairs.items()
        if name != "torchops" and (reason := too_much(shape.operations(count, backward), options))
    }
    reason = mask_is_too_large(tokens, dtype, options.device)
    if reason:
        absent[MASKED] = reason
    operations = sum(shape.operations(count, backward) for name, count in pairs.items() if name not in absent)
    return Row(
        operation,
        f"n={tokens} {'W' if isinstance(span, Window) else 'b'}={span.size} {shape}",
        dtype,
        direction,
        partial(span_contenders, shape, span, dtype, backward, absent, options.device),
        {**shape.parameters, "span": span.size},
        setup_seconds=0.1 if backward else COMPILE_SECONDS,
        round_seconds=operations / OPERATIONS_PER_SECOND[options.device.type],
    )


def span_contenders(
    shape: Shape,
    span: Window | Block,
    dtype: torch.dtype,
    backward: bool,
    absent: Mapping[str, str],
    device: torch.device,
) -> dict[str, Contender | Absent]:
    tokens, grouped = shape.tokens, shape.key_heads is not None
    inputs = make_inputs(shape, dtype, device, backward)
    grad = randn(shape.size, 3, dtype, device)
    targets = span_targets(shape, span, dtype, backward)
    attend = own_attention(span)

    def against(name: str, make: Callable[[], Attention]) -> Contender | Absent:
        if name in absent:
            return Absent(absent[name])
        attention = make()
        return contender(lambda: (attention(*inputs),), inputs, grad, target=targets.ratios.get(name))

    result: dict[str, Contender | Absent] = {
        "torchops": contender(lambda: (attend(*inputs),), inputs, grad, memory_target=targets.memory),
        MASKED: against(MASKED, lambda: eager.masked_sdpa(span.mask(tokens, device), grouped)),
        FLEX: against(FLEX, lambda: eager.compiled_flex_attention(span, tokens, device, grouped)),
    }
    if isinstance(span, Block) and not grouped:
        result[RESHAPED] = against(RESHAPED, lambda: eager.reshaped_sdpa(span.size))
    full = against(FULL_CAUSAL, lambda: partial(eager.causal_sdpa, grouped=grouped))
    result[FULL_CAUSAL] = replace(full, align=None) if isinstance(full, Contender) else full
    if dtype == torch.bfloat16:
        in_float32 = Inputs(*(input.detach().float().requires_grad_(backward) for input in inputs))
        result[OWN_FLOAT32] = contender(
            lambda: (attend(*in_float32),), in_float32, grad.float(), target=targets.ratios.get(OWN_FLOAT32)
        )
    return result


def own_attention(span: Window | Block) -> Attention:
    if isinstance(span, Window):
        return partial(torchops.span_attention, left=span.size - 1, right=0, is_causal=True)
    return partial(torchops.span_attention, block_size=span.size, left=0, right=0, is_causal=True)


def multiplies_on_tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torchops.utils.cpu_capability() == "amx"


def span_targets(shape: Shape, span: CausalSpan, dtype: torch.dtype, backward: bool) -> Targets:
    if (shape, span, dtype) == (Shape(65536), Window(1024), torch.float32):
        return Targets({}, memory=2**30)
    if (shape, span) == (Shape(8192), Window(1024)) and dtype in (torch.float32, torch.bfloat16):
        # As many times as fast as full attention has more pairs to look at.
        no_more_a_pair = Window(shape.tokens).num_pairs(shape.tokens) / span.num_pairs(shape.tokens)
        if dtype == torch.float32:
            ratios = {MASKED: 12.0} if backward else {MASKED: 15.0, FLEX: 1.9}
            return Targets({FULL_CAUSAL: no_more_a_pair, **ratios})
        tiles = multiplies_on_tiles(dtype)
        own = {OWN_FLOAT32: 1.65} if {"avx512_bf16", "amx_bf16"} & machine.cpu_flags() else {}
        full = {FULL_CAUSAL: 1.6 * no_more_a_pair} if tiles else {}
        flex = {} if backward else {FLEX: 3.0 if tiles else 5.0}
        return Targets({**full, **flex, **own})
    if (shape, span, backward) == (Shape(8192), Block(1024), True):
        if dtype == torch.float32:
            return Targets({RESHAPED: 1.7})
        if multiplies_on_tiles(dtype):
            return Targets({RESHAPED: 1.4})
    return NO_TARGETS


def too_much(operations: float, options: Options) -> str:
    """Why a rival of that many operations a call is not tried, or nothing."""
    if options.full or operations <= MOST_OPERATIONS[options.device.type]:
        return ""
    return f"a call of more than {MOST_OPERATIONS[options.device.type]:.0e} operations is tried with --full only"


def mask_is_too_large(tokens: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why a mask of [L, L] is not tried, or nothing. SDPA makes one of the activations' dtype of a bool one."""
    size = tokens**2 * (1 + dtype.itemsize)
    available = machine.available_bytes(device)
    if size > MOST_BYTES:
        return f"the mask would take {size / 2**30:.0f} GiB, and a rival gets {MOST_BYTES / 2**30:.0f} GiB"
    if available is not None and size > available / 2:
        return f"the mask would take {size / 2**30:.1f} GiB, more than half of the memory that is available"
    return ""


# ---- no span ------------------------------------------------------------------------------------


def is_beyond_sdpa(shape: Shape, dtype: torch.dtype, backward: bool) -> bool:
    """Whether SDPA's 16-bit gradients are too far off to be compared: among 8192 tokens its gradient to value differs
    from that in float64 by up to 0.049 (of 3.8), torchops's by 0.009."""
    return backward and dtype != torch.float32 and shape.tokens >= 8192


def full_row(shape: Shape, dtype: torch.dtype, direction: str, options: Options) -> Row:
    backward = direction == FORWARD_BACKWARD
    operations = shape.operations(Window(shape.tokens).num_pairs(shape.tokens), backward)

    def contenders() -> dict[str, Contender | Absent]:
        inputs = make_inputs(shape, dtype, options.device, backward)
        grad = randn(shape.size, 3, dtype, options.device)
        # How long short sequences take is what a call costs at all: only long ones have a target.
        target = None if shape.tokens < 512 else 1.6 if multiplies_on_tiles(dtype) and shape.tokens >= 4096 else 1.0
        sdpa = contender(lambda: (eager.causal_sdpa(*inputs),), inputs, grad, target=target)
        return {
            "torchops": contender(lambda: (torchops.span_attention(*inputs, is_causal=True),), inputs, grad),
            "SDPA": replace(sdpa, align=None) if is_beyond_sdpa(shape, dtype, backward) else sdpa,
        }

    return Row(
        "full causal",
        f"n={shape.tokens} {shape}",
        dtype,
        direction,
        contenders,
        shape.parameters,
        round_seconds=2 * operations / OPERATIONS_PER_SECOND[options.device.type],
    )


def vision_row(shape: Shape, weighted: bool, dtype: torch.dtype, direction: str, options: Options) -> Row:
    """Full attention in a Vision Transformer; weighted by how many patches a merged token stands for (ToMe's
    proportional attention). Its storage is [B, L, H, D], as it comes out of the projections."""
    batch, tokens = shape.batch, shape.tokens
    backward = direction == FORWARD_BACKWARD

    def contenders() -> dict[str, Contender | Absent]:
        size = (batch, tokens, shape.heads, shape.features)
        inputs = Inputs(
            *(randn(size, seed, dtype, options.device).transpose(1, 2).requires_grad_(backward) for seed in range(3))
        )
        grad = randn(size, 3, dtype, options.device).transpose(1, 2)
        patches = torch.randint(1, 5, (batch, tokens), generator=torch.Generator().manual_seed(4))
        # As bfloat16 has it, so that all contenders add the same.
        bias = patches.log().bfloat16().to(options.device) if weighted else None
        key_bias = None if bias is None else bias.float()
        mask = None if bias is None else bias.to(dtype)[:, None, None, :]
        return {
            "torchops": contender(lambda: (torchops.span_attention(*inputs, key_bias=key_bias),), inputs, grad),
            "SDPA" if mask is None else MASKED: contender(lambda: (eager.masked_sdpa(mask)(*inputs),), inputs, grad),
        }

    return Row(
        WEIGHTED_VISION if weighted else "Vision Transformer",
        f"B={batch} n={tokens} {replace(shape, batch=1)}",
        dtype,
        direction,
        contenders,
        shape.parameters,
        round_seconds=2 * shape.operations(tokens**2, backward) / OPERATIONS_PER_SECOND[options.device.type],
    )


def decoding_rows(dtype: torch.dtype, options: Options) -> Iterator[Row]:
    """One query, the last of many tokens; SDPA gets the keys that it sees, as a view."""
    shapes = [
        (Shape(tokens, heads=heads, key_heads=key_heads), tokens)
        for tokens in (8192, 65536)
        for heads, key_heads in ((1, None), (4, None), (8, None), (8, 1))
    ]
    model = Shape(8192, heads=32, features=128, key_heads=8)
    shapes += [(Shape(8192), 1024), (model, 8192), (model, 1024)]
    if options.quick:
        shapes = [(Shape(1024), 1024)]
    for shape, span in shapes:
        yield decoding_row(shape, span, dtype, options)


def decoding_row(shape: Shape, span: int, dtype: torch.dtype, options: Options) -> Row:
    return Row(
        "decoding, one query",
        f"Lk={shape.tokens} W={span} {shape}",
        dtype,
        FORWARD,
        partial(decoding_contenders, shape, span, dtype, options.device),
        {**shape.parameters, "span": span},
    )


def decoding_contenders(
    shape: Shape, span: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Contender | Absent]:
    query, key, value = make_inputs(shape, dtype, device)
    query = query[:, :, -1:].contiguous()
    visible = [cache[:, :, -span:] for cache in (key, value)]
    attend, rival = own_attention(Window(span)), eager.masked_sdpa(None, grouped=shape.key_heads is not None)
    # It moves as many bytes as there are keys and values.
    copied = torch.empty_like(visible[0])
    target = 0.7 if span == shape.tokens else None
    return {
        "torchops": Contender(lambda: (attend(query, key, value),)),
        "SDPA": Contender(lambda: (rival(query, *visible),), target=1.0),
        COPY: Contender(lambda: (copied.copy_(visible[0]),), is_bound=True, target=target),
    }


# ---- sizes of the command line ------------------------------------------------------------------


def window_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return span_row("causal window", shape_of(sizes), Window(sizes["W"]), dtype, direction, options)


def blocks_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return span_row("causal blocks", shape_of(sizes), Block(sizes["b"]), dtype, direction, options)


def full_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return full_row(shape_of(sizes), dtype, direction, options)


def decoding_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    shape = shape_of({**sizes, "n": sizes["Lk"]})
    return decoding_row(shape, sizes["W"] or shape.tokens, dtype, options)


def vision_of(weighted: bool, sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return vision_row(shape_of(sizes), weighted, dtype, direction, options)


def shape_of(sizes: Sizes) -> Shape:
    return Shape(sizes["n"], sizes["H"], sizes["D"], sizes.get("Hkv"), sizes["B"])


HEADS = {"B": 1, "H": 4, "D": 64}
VISION_SIZES = {"B": VISION.batch, "n": VISION.tokens, "H": VISION.heads, "D": VISION.features}
OPERATIONS = {
    "causal window": Operation({"n": 4096, "W": 1024, **HEADS, "Hkv": None}, window_of),
    "causal blocks": Operation({"n": 4096, "b": 1024, **HEADS, "Hkv": None}, blocks_of),
    "full causal": Operation({"n": 4096, **HEADS}, full_of),
    "Vision Transformer": Operation(VISION_SIZES, partial(vision_of, False)),
    WEIGHTED_VISION: Operation(VISION_SIZES, partial(vision_of, True)),
    "decoding, one query": Operation({"Lk": 8192, "W": None, **HEADS, "Hkv": None}, decoding_of, (FORWARD,)),
}


# ---- inputs -------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    query: Tensor  # [B, H, n, D]
    key: Tensor  # [B, Hkv, n, D]
    value: Tensor  # [B, Hkv, n, D]


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool = False) -> Inputs:
    key_heads = shape.key_heads or shape.heads
    return Inputs(
        *(
            randn((shape.batch, heads, shape.tokens, shape.features), seed, dtype, device).requires_grad_(backward)
            for seed, heads in enumerate((shape.heads, key_heads, key_heads))
        )
    )


def randn(size: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# ---- findings -----------------------------------------------------------------------------------


def findings(report: Report) -> list[Finding]:
    spans = [
        row
        for operation in ("causal window", "causal blocks")
        for row in report.operations().get(operation, [])
        if FULL_CAUSAL in row.contenders
    ]
    crossover = list(crossovers([row for row in report.on(CROSSOVER) if FULL_CAUSAL in row.contenders]))
    found = [
        Finding(
            "Cost of a visible pair / that of SDPA full causal in the same row (below 1: cheaper)",
            ["operation", "shape", "dtype", "direction", "cost of a pair"],
            [[row.operation, row.shape, row.dtype, row.direction, f"{cost_of_a_pair(row):.2f}"] for row in spans],
        ),
        Finding(
            "From how many tokens on a causal window of 1024 keys takes less time than SDPA full causal",
            ["dtype", "direction", "from n", "measured at n"],
            crossover,
        ),
    ]
    return [finding for finding in found if finding.lines]


def cost_of_a_pair(row: RowResult) -> float:
    tokens, size = row.parameters["n"], row.parameters["span"]
    span = Window(size) if row.operation == "causal window" else Block(size)
    return Window(tokens).num_pairs(tokens) / span.num_pairs(tokens) / row.contenders[FULL_CAUSAL].ratio.median


def crossovers(rows: list[RowResult]) -> Iterator[list[str]]:
    """The shortest length from which on it pays in every row."""
    for dtype, direction in dict.fromkeys((row.dtype, row.direction) for row in rows):
        ratios = {
            row.parameters["n"]: row.contenders[FULL_CAUSAL].ratio.median
            for row in sorted(rows, key=lambda row: row.parameters["n"])
            if (row.dtype, row.direction) == (dtype, direction)
        }
        pays = [tokens for tokens in ratios if all(r > 1 for n, r in ratios.items() if n >= tokens)]
        yield [dtype, direction, str(pays[0]) if pays else "none", ", ".join(map(str, ratios))]
