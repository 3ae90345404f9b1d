"""Matching, merging and pruning of tokens against the usual compositions of PyTorch's operators."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import torchops

from .eager import tokens as eager
from .harness import FORWARD, FORWARD_BACKWARD, Contender, Operation, Options, Row, Sizes, Tensors, contender

NOTES = """\
Forward is without autograd. Forward + backward is the forward pass with autograd, then the gradient of the \
tokens that went in, from a gradient of those that came out that was made beforehand. Sizes and scores have \
no gradient, except in the row that says so. Matching has none anywhere; its time is in both directions.
eager ToMe: normalise, bmm, max, argsort, gather, scatter_reduce, cat, in the dtype of the tokens (torchops \
matches in float32). eager EViT: topk or argsort, gather, cat. copy is what moving the bytes costs and no \
rival: output.clone(), with backward also input.clone().
Every sequence has r near-duplicates planted in it, so that all contenders merge the same tokens in any \
dtype; that their results agree was checked before the timing.
Memory is the peak of what a call allocates, results included."""

FIVE_TIMES_AS_FAST = 5.0
WITHIN_1_5_TIMES_THE_COPY = 1 / 1.5
EVIT_KEEP_RATE = 0.7


@dataclass(frozen=True)
class Shape:
    batch: int  # B
    tokens: int  # N
    channels: int  # C
    features: int  # K, of the metric
    r: int
    num_protected: int = 1  # 1 for a class token, or 0
    keep_rate: float = EVIT_KEEP_RATE

    @property
    def groups(self) -> int:
        """M, when r tokens merge."""
        return torchops.num_groups(self.tokens, self.r, self.num_protected)

    @property
    def kept(self) -> int:
        """k, when tokens are pruned."""
        return math.ceil(self.keep_rate * (self.tokens - self.num_protected))


VIT_B = Shape(32, 197, 768, 64, 16)  # metric: keys averaged over heads, as ToMe has it
VIT_B_ALL_FEATURES = Shape(32, 197, 768, 768, 16)  # metric: as wide as the tokens
VIT_B_LARGE_BATCH = Shape(256, 197, 768, 64, 16)
VIT_B_ONE_IMAGE = Shape(1, 197, 768, 64, 16)
VIT_L_LARGE_IMAGE = Shape(4, 1024, 1024, 64, 64)
DIFFUSION = Shape(2, 4096, 320, 320, 2048, num_protected=0)  # a U-Net's first level, half of it merged
WITH_TARGETS = {VIT_B, VIT_B_LARGE_BATCH}
WITH_SIZE_GRADIENT = "merge_tokens with gradients to tokens and sizes"


class Inputs(NamedTuple):
    tokens: Tensor  # [B, N, C]
    metric: Tensor  # [B, N, K]
    size: Tensor  # [B, N], float32: how many tokens each one stands for
    scores: Tensor  # [B, N], float32


def rows(options: Options) -> Iterator[Row]:
    shapes = [VIT_B]
    if not options.quick:
        shapes += [VIT_B_ONE_IMAGE, VIT_L_LARGE_IMAGE, DIFFUSION]
    if options.full or options.device.type == "cuda":
        shapes += [VIT_B_LARGE_BATCH]
    matched_shapes = shapes if options.quick else [VIT_B, VIT_B_ALL_FEATURES, *shapes[1:]]
    shapes_of = {"matching": matched_shapes, "matching + merge": matched_shapes, WITH_SIZE_GRADIENT: [VIT_B]}
    for operation in KINDS:
        for shape in shapes_of.get(operation, shapes):
            for dtype in options.dtypes:
                for direction in KINDS[operation].directions:
                    yield token_row(operation, shape, dtype, direction, options)


def token_row(operation: str, shape: Shape, dtype: torch.dtype, direction: str, options: Options) -> Row:
    kind = KINDS[operation]
    make = partial(kind.contenders, shape, dtype, options.device, direction == FORWARD_BACKWARD)
    return Row(operation, f"B={shape.batch} {kind.label.format(shape)}", dtype, direction, make)


# ---- contenders by operation --------------------------------------------------------------------


def matching(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, Contender]:
    metric = make_inputs(shape, dtype, device, backward).metric
    return {
        "torchops": Contender(lambda: (torchops.bipartite_assignment(metric, shape.r, shape.num_protected),)),
        "eager ToMe": Contender(
            run=lambda: eager.tome_matching(metric, shape.r, shape.num_protected == 1),
            align=lambda matched: (assignment_of(eager.TomeMatching(*matched), shape.tokens),),
        ),
    }


def merge(
    shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool, size_gradient: bool = False
) -> dict[str, Contender]:
    tokens, metric, size, _ = make_inputs(shape, dtype, device, backward)
    assign = torchops.bipartite_assignment(metric, shape.r, shape.num_protected)
    eager_size = size.to(dtype).requires_grad_(size_gradient)
    size.requires_grad_(size_gradient)
    grad = randn(shape, shape.groups, dtype, device)
    with_size, with_eager_size = ([tokens, size], [tokens, eager_size]) if size_gradient else ([tokens], [tokens])
    result = {
        "torchops": contender(lambda: torchops.merge_tokens(tokens, assign, shape.groups, size), with_size, grad),
        "scatter_reduce": contender(
            lambda: eager.scatter_reduce_merge(tokens, assign, shape.groups, eager_size), with_eager_size, grad
        ),
        "index_add": contender(
            lambda: eager.index_add_merge(tokens, assign, shape.groups, eager_size), with_eager_size, grad
        ),
    }
    if not size_gradient:
        target = WITHIN_1_5_TIMES_THE_COPY if shape in WITH_TARGETS else None
        result["copy"] = copy(grad, tokens, backward, target)
    return result


def matching_and_merge(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, Contender]:
    tokens, metric, size, _ = make_inputs(shape, dtype, device, backward)
    eager_size = size.to(dtype).unsqueeze(-1)
    class_token = shape.num_protected == 1
    grad = randn(shape, shape.groups, dtype, device)
    order = eager.tome_matching(metric, shape.r, class_token).positions(shape.tokens).argsort(1)

    def torchops_merge() -> Tensors:
        assign = torchops.bipartite_assignment(metric, shape.r, shape.num_protected)
        return torchops.merge_tokens(tokens, assign, shape.groups, size)

    def tome() -> Tensors:
        return eager.tome_merge(tokens, eager_size, eager.tome_matching(metric, shape.r, class_token))

    def in_sequence_order(results: Tensors) -> Tensors:
        merged, total, *gradients = results
        return (eager.rows_at(merged, order), eager.rows_at(total, order).squeeze(-1), *gradients)

    return {
        "torchops": contender(torchops_merge, [tokens], grad),
        "eager ToMe": contender(
            tome,
            [tokens],
            eager.rows_at(grad, order.argsort(1)),
            in_sequence_order,
            target=FIVE_TIMES_AS_FAST if shape in WITH_TARGETS else None,
        ),
    }


def unmerge(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, Contender]:
    assign = torchops.bipartite_assignment(make_inputs(shape, dtype, device).metric, shape.r, shape.num_protected)
    merged = randn(shape, shape.groups, dtype, device).requires_grad_(backward)
    grad = randn(shape, shape.tokens, dtype, device)
    return {
        "torchops": contender(lambda: (torchops.unmerge_tokens(merged, assign),), [merged], grad),
        "gather": contender(lambda: (eager.rows_at(merged, assign),), [merged], grad),
        "index_select": contender(lambda: (eager.index_select_unmerge(merged, assign),), [merged], grad),
        "copy": copy(grad, merged, backward),
    }


def prune(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool, fuse: bool) -> dict[str, Contender]:
    tokens, _, _, scores = make_inputs(shape, dtype, device, backward)
    pruner = torchops.nn.TokenPruner(shape.kept, fuse, shape.num_protected)
    evit = eager.evit_fuse if fuse else eager.evit_drop
    grad = randn(shape, shape.num_protected + shape.kept + fuse, dtype, device)
    # EViT has the kept tokens in the order of their scores. The fused one comes last in both.
    position = torch.arange(shape.tokens, device=device, dtype=torch.float64).expand(shape.batch, -1).unsqueeze(-1)
    order = eager.evit_drop(position, scores, shape.kept, shape.num_protected).squeeze(-1).argsort(1)
    order = torch.nn.functional.pad(order, (0, int(fuse)), value=order.shape[1])

    def in_sequence_order(results: Tensors) -> Tensors:
        kept, *gradients = results
        return (eager.rows_at(kept, order), *gradients)

    return {
        "torchops": contender(lambda: pruner(tokens, scores)[:1], [tokens], grad),
        "eager EViT": contender(
            lambda: (evit(tokens, scores, shape.kept, shape.num_protected),),
            [tokens],
            eager.rows_at(grad, order.argsort(1)),
            in_sequence_order,
        ),
    }


def copy(output: Tensor, input: Tensor, backward: bool, target: float | None = None) -> Contender:
    """Writes as much as the operation does: the output and, with backward, the gradient of the input."""
    written = [output, input.detach()] if backward else [output]
    return Contender(lambda: [tensor.clone() for tensor in written], is_bound=True, target=target)


# ---- inputs -------------------------------------------------------------------------------------


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    places = (shape.batch, shape.tokens)
    metric = torch.randn(*places, shape.features, generator=generator)
    plant_near_duplicates(metric, shape, generator)
    size = torch.randint(1, 5, places, generator=generator).float()
    scores = torch.rand(places, generator=generator)
    tokens = randn(shape, shape.tokens, dtype, device).requires_grad_(backward)
    return Inputs(tokens, metric.to(device, dtype), size.to(device), scores.to(device))


def plant_near_duplicates(metric: Tensor, shape: Shape, generator: torch.Generator) -> None:
    """Makes r tokens that may be merged near-duplicates of one that may be merged into."""
    sources = torch.arange(shape.num_protected + shape.num_protected % 2, shape.tokens, 2)
    destinations = torch.arange(1, shape.tokens, 2)
    chosen = sources[torch.rand(shape.batch, len(sources), generator=generator).argsort(1)[:, : shape.r]]
    partners = destinations[torch.randint(len(destinations), chosen.shape, generator=generator)]
    batch = torch.arange(shape.batch).unsqueeze(1)
    noise = torch.randn(*chosen.shape, shape.features, generator=generator)
    metric[batch, chosen] = metric[batch, partners] + 0.1 * noise


def randn(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, rows, C]."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(shape.batch, rows, shape.channels, generator=generator).to(device, dtype)


def assignment_of(matching: eager.TomeMatching, num_tokens: int) -> Tensor:
    """What torchops.bipartite_assignment returns for that matching, int64 [B, N]."""
    sources, destinations = 2 * matching.merged, 2 * matching.destination + 1
    stays = torch.ones(len(sources), num_tokens, dtype=torch.int64, device=sources.device).scatter(1, sources, 0)
    assign = stays.cumsum(1) - 1
    return assign.scatter(1, sources, assign.gather(1, destinations))


# ---- operations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """An operation: its contenders, its label of a shape, and the names of its sizes."""

    contenders: Callable[[Shape, torch.dtype, torch.device, bool], dict[str, Contender]]
    label: str
    sizes: str
    directions: Sequence[str] = (FORWARD, FORWARD_BACKWARD)


MERGED, KEPT = "N={0.tokens} C={0.channels} r={0.r}", "N={0.tokens} C={0.channels} k={0.kept}"
KINDS = {
    "matching": Kind(matching, "N={0.tokens} K={0.features} r={0.r}", "B N K r protected", (FORWARD,)),
    "merge_tokens": Kind(merge, MERGED, "B N C r protected"),
    WITH_SIZE_GRADIENT: Kind(partial(merge, size_gradient=True), MERGED, "B N C r protected", (FORWARD_BACKWARD,)),
    "matching + merge": Kind(
        matching_and_merge, "N={0.tokens} C={0.channels} K={0.features} r={0.r}", "B N C K r protected"
    ),
    "unmerge_tokens": Kind(unmerge, MERGED, "B N C r protected"),
    "top-k, others dropped": Kind(partial(prune, fuse=False), KEPT, "B N C keep protected"),
    "top-k, others fused": Kind(partial(prune, fuse=True), KEPT, "B N C keep protected"),
}
FIELDS = {
    "B": "batch",
    "N": "tokens",
    "C": "channels",
    "K": "features",
    "r": "r",
    "keep": "keep_rate",
    "protected": "num_protected",
}


def row_of(operation: str, sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    if sizes["protected"] not in (0, 1):
        raise ValueError(f"expected protected=0 or protected=1, for a class token, got {sizes['protected']}")
    shape = replace(VIT_B, **{FIELDS[name]: size for name, size in sizes.items()})
    return token_row(operation, shape, dtype, direction, options)


OPERATIONS = {
    name: Operation(
        {size: getattr(VIT_B, FIELDS[size]) for size in kind.sizes.split()}, partial(row_of, name), kind.directions
    )
    for name, kind in KINDS.items()
}
