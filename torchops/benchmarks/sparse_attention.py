"""Attention over lists of keys against PyTorch's attention, masked and full, and against our own full attention."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

import torchops

from .eager import sparse_attention as eager
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
)
from .span_attention import (
    FULL_CAUSAL,
    MASKED,
    OPERATIONS_PER_SECOND,
    Shape,
    is_beyond_sdpa,
    make_inputs,
    mask_is_too_large,
    randn,
)

NOTES = """\
n: queries and keys, k: entries of a list, b: keys of a block, c: queries that share a list, H: heads, D: features of \
a head. Everything is causal; lists are random, ascending, one for each head, and made beforehand, as masks are.
Forward is without autograd. Forward + backward is the forward pass with autograd, then the gradients of query, key \
and value, from a gradient of the output that was made beforehand.
SDPA is torch's scaled_dot_product_attention: + mask (bool), full causal (is_causal). Full attention does other work, \
so that its result is not compared; SDPA + mask agrees with torchops, which was checked before the timing, but for the \
16-bit gradients among 8192 tokens, where SDPA's differ from those in float64 by up to 0.044, torchops's by 0.007.
Scores of lists are those for every key, of which listed ones are gathered, resp. those of keys that are gathered for \
every query, whose 16-bit gradients are added up in 16 bits and not compared.
Codes are those of M = D / 8 codebooks of E = 16 codewords, random as queries and keys are. Of rivals that choose by \
codes only the work is the same: they take any of the keys with as many codes, and round distances otherwise. Those \
that choose by scores take any of equal ones.
Memory is the peak of what torch allocates during a call, results included."""

OWN_FULL = "span_attention full causal"
TWO_STEPS = "pq_topk, topk_attention"

CURVES = (
    Curves(
        "crossover",
        "Lists of n / 8 keys for each query (H=4 D=64): time over the number of tokens n",
        "lists of keys",
        "n",
        {"share": 8, "H": 4, "D": 64},
        "seconds",
    ),
)

# (share of n that is listed, forward, forward + backward) against SDPA full causal, on a processor without a second
# 512-bit unit.
TARGETS = {8: (2.5, 2.5), 16: (4.0, None), 32: (7.0, None)}
NO_TARGETS = (None, None)
BLOCK_TARGET = 3.5
# The same for the forward pass with the choice by codes in it.
CHOSEN_TARGETS = {8: 2.2, 16: 3.5, 32: 5.0}
CODEWORDS, SUBSPACE = 16, 8


def rows(options: Options) -> Iterator[Row]:
    lengths = (512,) if options.quick else (1024, 2048, 4096, 8192)
    for dtype in options.dtypes:
        for direction in (FORWARD, FORWARD_BACKWARD):
            for tokens in lengths:
                yield list_row(Shape(tokens), 8, 1, 1, dtype, direction, options)
            for share in (16, 32):
                yield list_row(Shape(lengths[-1]), share, 1, 1, dtype, direction, options)
            for block, query_block in ((1, 16), (64, 64)):
                yield list_row(Shape(lengths[-1]), 8, block, query_block, dtype, direction, options)
        yield decoding_row(Shape(lengths[-1]), 8, dtype, options)
        longest = Shape(lengths[-1])
        for direction in (FORWARD, FORWARD_BACKWARD):
            for tokens in lengths[1::2] or lengths:
                yield scores_row(Shape(tokens), 8, dtype, direction, options)
            yield scores_row(longest, 8, dtype, direction, options, list_heads=1)
        yield encoding_row(longest, dtype, options)
        for direction in (FORWARD, FORWARD_BACKWARD):
            yield loss_row(longest, dtype, direction, options)
        for share in CHOSEN_TARGETS:
            yield chosen_row(longest, share, dtype, FORWARD, options)
        yield chosen_row(longest, 8, dtype, FORWARD_BACKWARD, options)
        for tokens in (lengths[-1],) if options.quick else (2048, lengths[-1]):
            yield score_choice_row(Shape(tokens), 8, dtype, options)
        yield indexer_row(Shape(512 if options.quick else 2048, 64, 128, key_heads=1), 8, dtype, options)
    yield choice_row(Shape(512 if options.quick else 2048), 8, options)


def list_row(
    shape: Shape, share: int, block: int, query_block: int, dtype: torch.dtype, direction: str, options: Options
) -> Row:
    backward = direction == FORWARD_BACKWARD
    listed = shape.tokens // share // block
    name = "lists of keys" if block * query_block == 1 else "lists for blocks"
    operations = shape.operations(3 * shape.tokens**2, backward)
    return Row(
        name,
        f"n={shape.tokens} k={listed} b={block} c={query_block} {shape}",
        dtype,
        direction,
        partial(list_contenders, shape, share, block, query_block, dtype, backward, options.device),
        {**shape.parameters, "share": share, "b": block, "c": query_block},
        round_seconds=operations / OPERATIONS_PER_SECOND[options.device.type],
    )


def list_contenders(
    shape: Shape, share: int, block: int, query_block: int, dtype: torch.dtype, backward: bool, device: torch.device
) -> dict[str, Contender | Absent]:
    tokens = shape.tokens
    inputs = make_inputs(shape, dtype, device, backward)
    grad = randn((1, shape.heads, tokens, shape.features), 3, dtype, device)
    indices = eager.choose(tokens, shape.heads, tokens // share // block, block, query_block, device)
    attend = partial(
        torchops.topk_attention, indices=indices, block_size=block, query_block=query_block, is_causal=True
    )
    target = None
    if tokens == 8192:
        target = BLOCK_TARGET if block * query_block > 1 else TARGETS.get(share, NO_TARGETS)[backward]
    full = contender(lambda: (scaled_dot_product_attention(*inputs, is_causal=True),), inputs, grad, target=target)
    own = contender(lambda: (torchops.span_attention(*inputs, is_causal=True),), inputs, grad)
    masked: Contender | Absent
    reason = mask_is_too_large(tokens * shape.heads, dtype, device)
    if reason:
        masked = Absent(reason)
    else:
        mask = eager.mask_of(indices, tokens, block, query_block)
        masked = contender(lambda: (scaled_dot_product_attention(*inputs, attn_mask=mask),), inputs, grad)
        masked = replace(masked, align=None) if is_beyond_sdpa(shape, dtype, backward) else masked
    return {
        "torchops": contender(lambda: (attend(*inputs),), inputs, grad),
        FULL_CAUSAL: replace(full, align=None),
        OWN_FULL: replace(own, align=None),
        MASKED: masked,
    }


def scores_row(
    shape: Shape, share: int, dtype: torch.dtype, direction: str, options: Options, list_heads: int | None = None
) -> Row:
    """Each head has a list, or as many as list_heads, which share keys too then."""
    backward = direction == FORWARD_BACKWARD
    tokens, listed = shape.tokens, shape.tokens // share
    shape = replace(shape, key_heads=list_heads)

    def contenders() -> dict[str, Contender | Absent]:
        query, key, _ = make_inputs(shape, dtype, options.device, backward)
        indices = eager.choose(tokens, list_heads or shape.heads, listed, 1, 1, options.device)
        grad = randn((1, shape.heads, tokens, listed), 3, torch.float32, options.device)
        grad = grad.masked_fill(indices < 0, 0)

        def of(scores: Callable[..., torch.Tensor]) -> Contender:
            call = lambda: (scores(query, key, indices).float(),)  # noqa: E731
            return contender(call, (query, key), grad)

        # Its gradients to keys are added up in their dtype.
        gathered: Contender | Absent = of(eager.scores_of_gathered)
        if backward and dtype.itemsize < 4:
            gathered = replace(of(eager.scores_of_gathered), align=None)
        size = shape.heads * tokens * listed * shape.features * dtype.itemsize
        if size > 2**30:
            gathered = Absent(f"copies of keys would take {size / 2**30:.0f} GiB")
        return {
            "torchops": of(torchops.topk_scores),
            "all scores, gather": of(eager.scores_of_all),
            "gathered keys": gathered,
        }

    return Row(
        "scores of lists",
        f"n={tokens} k={listed} {shape}",
        dtype,
        direction,
        contenders,
        {**shape.parameters, "share": share},
    )


def decoding_row(shape: Shape, share: int, dtype: torch.dtype, options: Options) -> Row:
    """One query, the last of n tokens."""

    def contenders() -> dict[str, Contender | Absent]:
        query, key, value = make_inputs(shape, dtype, options.device)
        query = query[:, :, -1:].contiguous()
        indices = eager.choose(shape.tokens, shape.heads, shape.tokens // share, 1, shape.tokens, options.device)
        full = Contender(lambda: (scaled_dot_product_attention(query, key, value),), target=0.6 * share)
        return {
            "torchops": Contender(lambda: (torchops.topk_attention(query, key, value, indices),)),
            "SDPA": replace(full, align=None),
        }

    return Row(
        "decoding, one query",
        f"Lk={shape.tokens} k={shape.tokens // share} {shape}",
        dtype,
        FORWARD,
        contenders,
        {**shape.parameters, "share": share},
    )


def make_codebooks(shape: Shape, device: torch.device) -> torch.Tensor:
    return randn((shape.features // SUBSPACE, CODEWORDS, SUBSPACE), 5, torch.float32, device)


def make_codes(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, _ = make_inputs(shape, dtype, device)
    codebooks = make_codebooks(shape, device)
    return torchops.pq_encode(query, codebooks), torchops.pq_encode(key, codebooks)


def encoding_row(shape: Shape, dtype: torch.dtype, options: Options) -> Row:
    def contenders() -> dict[str, Contender | Absent]:
        query = make_inputs(shape, dtype, options.device)[0]
        codebooks = make_codebooks(shape, options.device)
        return {
            "torchops": Contender(lambda: (torchops.pq_encode(query, codebooks),)),
            "cdist, argmin": Contender(lambda: (eager.encode(query.float(), codebooks),), align=None),
        }

    return Row("codes of rows", f"n={shape.tokens} {shape}", dtype, FORWARD, contenders, shape.parameters)


def loss_row(shape: Shape, dtype: torch.dtype, direction: str, options: Options) -> Row:
    def contenders() -> dict[str, Contender | Absent]:
        backward = direction == FORWARD_BACKWARD
        query = make_inputs(shape, dtype, options.device, backward)[0]
        codebooks = make_codebooks(shape, options.device).requires_grad_(backward)
        grad = torch.ones((), device=options.device)
        return {
            "torchops": contender(lambda: (torchops.pq_loss(query, codebooks),), (query, codebooks), grad),
            "cdist, softmax, mean": contender(
                lambda: (eager.quantization_loss(query.float(), codebooks),), (query, codebooks), grad, align=None
            ),
        }

    return Row("loss of codes", f"n={shape.tokens} {shape}", dtype, direction, contenders, shape.parameters)


def choice_row(shape: Shape, share: int, options: Options) -> Row:
    """Of codes alone, whatever they were made of."""

    def contenders() -> dict[str, Contender | Absent]:
        query_codes, key_codes = make_codes(shape, torch.float32, options.device)
        k = shape.tokens // share
        by_product = Contender(lambda: (eager.choose_by_codes(query_codes, key_codes, k, CODEWORDS),), align=None)
        return {
            "torchops": Contender(lambda: (torchops.pq_topk(query_codes, key_codes, k, is_causal=True),)),
            "one-hot product, topk": by_product,
        }

    name = f"n={shape.tokens} k={shape.tokens // share} {shape}"
    return Row("choice by codes", name, torch.float32, FORWARD, contenders, {**shape.parameters, "share": share})


def score_choice_row(shape: Shape, share: int, dtype: torch.dtype, options: Options) -> Row:
    """A list for each head, by the products of attention."""
    k = shape.tokens // share

    def contenders() -> dict[str, Contender | Absent]:
        query, key, _ = make_inputs(shape, dtype, options.device)
        eager_choice = Contender(lambda: (eager.choose_by_scores(query, key, k),), align=None)
        return {
            "torchops": Contender(lambda: (torchops.score_topk(query, key, k, is_causal=True),)),
            "product, topk": eager_choice,
        }

    name = f"n={shape.tokens} k={k} {shape}"
    return Row("choice by scores", name, dtype, FORWARD, contenders, {**shape.parameters, "share": share})


def indexer_row(shape: Shape, share: int, dtype: torch.dtype, options: Options) -> Row:
    """DSA's: the heads of the queries have one head of keys, and one list."""
    k = shape.tokens // share

    def contenders() -> dict[str, Contender | Absent]:
        query, key, _ = make_inputs(shape, dtype, options.device)
        weights = randn((1, shape.heads, shape.tokens), 6, dtype, options.device)
        choose = partial(torchops.score_topk, query, key, k, weights, relu=True, is_causal=True)
        return {
            "torchops": Contender(lambda: (choose(),)),
            "products head by head, topk": Contender(
                lambda: (eager.choose_by_scores(query, key, k, weights),), align=None
            ),
        }

    name = f"n={shape.tokens} k={k} {shape}"
    return Row("choice by an indexer", name, dtype, FORWARD, contenders, {**shape.parameters, "share": share})


def chosen_row(shape: Shape, share: int, dtype: torch.dtype, direction: str, options: Options) -> Row:
    backward = direction == FORWARD_BACKWARD
    k = shape.tokens // share

    def contenders() -> dict[str, Contender | Absent]:
        inputs = make_inputs(shape, dtype, options.device, backward)
        grad = randn((1, shape.heads, shape.tokens, shape.features), 3, dtype, options.device)
        codes = make_codes(shape, dtype, options.device)

        def in_two_steps() -> tuple[torch.Tensor]:
            return (torchops.topk_attention(*inputs, torchops.pq_topk(*codes, k, is_causal=True), is_causal=True),)

        target = None if backward else CHOSEN_TARGETS.get(share)
        full = contender(lambda: (scaled_dot_product_attention(*inputs, is_causal=True),), inputs, grad, target=target)
        own = contender(lambda: (torchops.span_attention(*inputs, is_causal=True),), inputs, grad)
        return {
            "torchops": contender(lambda: (torchops.pq_attention(*inputs, *codes, k, is_causal=True),), inputs, grad),
            TWO_STEPS: contender(in_two_steps, inputs, grad),
            FULL_CAUSAL: replace(full, align=None),
            OWN_FULL: replace(own, align=None),
        }

    return Row(
        "choice by codes and attention",
        f"n={shape.tokens} k={k} {shape}",
        dtype,
        direction,
        contenders,
        {**shape.parameters, "share": share},
    )


# ---- sizes of the command line ------------------------------------------------------------------


def lists_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    lists = sizes.get("b", 1), sizes.get("c", 1)
    return list_row(shape_of(sizes), sizes["share"], *lists, dtype, direction, options)


def scores_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return scores_row(shape_of(sizes), sizes["share"], dtype, direction, options, list_heads=sizes["Hkv"])


def decoding_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return decoding_row(shape_of({**sizes, "n": sizes["Lk"]}), sizes["share"], dtype, options)


def encoding_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return encoding_row(shape_of(sizes), dtype, options)


def loss_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return loss_row(shape_of(sizes), dtype, direction, options)


def choice_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return choice_row(shape_of(sizes), sizes["share"], options)


def score_choice_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return score_choice_row(shape_of(sizes), sizes["share"], dtype, options)


def indexer_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return indexer_row(replace(shape_of(sizes), key_heads=1), sizes["share"], dtype, options)


def chosen_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return chosen_row(shape_of(sizes), sizes["share"], dtype, direction, options)


def shape_of(sizes: Sizes) -> Shape:
    return Shape(sizes["n"], sizes["H"], sizes["D"])


HEADS = {"H": 4, "D": 64}
LISTS = {"n": 8192, "share": 8, **HEADS}
OPERATIONS = {
    "lists of keys": Operation(LISTS, lists_of),
    "lists for blocks": Operation({**LISTS, "b": 64, "c": 64}, lists_of),
    "decoding, one query": Operation({"Lk": 8192, "share": 8, **HEADS}, decoding_of, (FORWARD,)),
    "scores of lists": Operation({**LISTS, "Hkv": None}, scores_of),
    "codes of rows": Operation({"n": 8192, **HEADS}, encoding_of, (FORWARD,)),
    "loss of codes": Operation({"n": 8192, **HEADS}, loss_of),
    "choice by codes": Operation(LISTS, choice_of, (FORWARD,)),
    "choice by scores": Operation(LISTS, score_choice_of, (FORWARD,)),
    "choice by an indexer": Operation({"n": 2048, "share": 8, "H": 64, "D": 128}, indexer_of, (FORWARD,)),
    "choice by codes and attention": Operation(LISTS, chosen_of),
}


# ---- findings -----------------------------------------------------------------------------------


def findings(report: Report) -> list[Finding]:
    names = (FULL_CAUSAL, OWN_FULL)
    lines = [
        [row.shape, row.dtype, row.direction, *(f"{row.contenders[name].ratio.median:.2f}" for name in names)]
        for row in report.operations().get("lists of keys", [])
        if all(name in row.contenders for name in names)
    ]
    found = Finding(
        "Time of full causal attention / torchops's (above 1: the list pays)",
        ["shape", "dtype", "direction", *names],
        lines,
    )
    return [found] if lines else []
