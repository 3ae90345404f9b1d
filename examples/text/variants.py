"""What the text track compares: spans of attention, chosen keys, and what becomes of the linear layers."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

import torchops

from . import codebooks, compression, routing
from .decoder import Decoder, Similar, Span, SpanByTorch

CONTEXT = 2048
DIM = 128
DEPTH = 4
NUM_HEADS = 4
FULL_LAYERS = (0,)  # of the mixed variants
MIXED = f"{len(FULL_LAYERS)} full +"  # what they are called
SPAN = 256
EXPORTED = f"{MIXED} windows {SPAN}"
FACTORED = "full, factored 3x"
LORA = "full, LoRA"
SPT = f"SPT: {MIXED} similar keys 1/8, routed, LoRA"
BATCH_SIZE = 2
PARTS = 8  # of the context, by which losses are told apart


@dataclass
class Result:
    """What is found out about a variant; losses in nats per byte, throughputs in bytes/s by context, memory in
    bytes."""

    visible_pairs: float = 0.0  # share of those of full attention
    weight_bytes: int = 0  # of the linear layers, as they are in inference
    loss_before: float = 0.0
    loss_after: float = 0.0
    loss_by_part: list[float] = field(default_factory=list)  # of the context, after fine-tuning
    excess: float = 0.0  # of loss_after over that of full attention
    excess_error: float = 0.0  # standard error of its mean over passages
    training: dict[int, float] = field(default_factory=dict)
    forward: dict[int, float] = field(default_factory=dict)
    peak_memory: int = 0
    recall: float | None = None  # share of the keys with the largest scores that sparse attention finds


@dataclass
class Variant:
    """A model to compare.

    Args:
        series, setting: its name: a kind and, within it, a size.
        convert: makes it from the dense model.
        about: what it changes of full attention and dense layers: attention, feed-forward layers, or all linear ones.
        compared: whether to compare it by position and at longer contexts, too.
        same_as: a variant before it that computes the same by other means: it takes the weights of that one instead
            of being fine-tuned.
    """

    series: str
    setting: str
    convert: Callable[[Decoder], Decoder]
    about: Literal["attention", "feed-forward", "linear"]
    compared: bool = True
    same_as: "Variant | None" = None
    model: Decoder = field(init=False)
    result: Result = field(default_factory=Result)

    @property
    def name(self) -> str:
        return f"{self.series} {self.setting}".rstrip()


def attending(
    spans: Sequence[Mapping[str, Any]], attention: Callable[..., nn.Module] = Span
) -> Callable[[Decoder], Decoder]:
    """Each layer attends to the span of its own."""
    return lambda dense: dense.with_attention([attention(**span) for span in spans])


def attending_to_similar_keys(
    full_layers: Sequence[int], keep: float, passages: Tensor
) -> Callable[[Decoder], Decoder]:
    """Each layer attends to a share of the keys, chosen by codes, but for some that attend to all."""

    def convert(dense: Decoder) -> Decoder:
        attention = [Span() if layer in full_layers else Similar(DIM // NUM_HEADS, keep) for layer in range(DEPTH)]
        return codebooks.fit(dense.with_attention(attention), passages)

    return convert


def routed(top_k: int, passages: Tensor, lora_rank: int = 0) -> Callable[[Decoder], Decoder]:
    """Feed-forward layers in blocks, of which each byte takes some."""
    return lambda model: routing.route(copy.deepcopy(model), top_k, passages, lora_rank)


def compressed(
    compress: Callable[[nn.Module, float, Callable[[], Any]], nn.Module], ratio: float, passages: Tensor
) -> Callable[[Decoder], Decoder]:
    """The same with linear layers of so many fewer bytes, fitted to what they compute of some passages; made once,
    whatever the layers attend to."""

    @functools.lru_cache(maxsize=1)
    def convert(dense: Decoder) -> Decoder:
        model = copy.deepcopy(dense).eval()
        compress(model.layers, ratio, lambda: model(passages))
        return model

    return convert


def then(first: Callable[[Decoder], Decoder], second: Callable[[Decoder], Decoder]) -> Callable[[Decoder], Decoder]:
    return lambda dense: second(first(dense))


def build_variants(short: bool, passages: Tensor) -> list[Variant]:
    """Full attention first; a short run has fewer of them. To some passages, [count, context], codebooks and compressed
    layers are fitted."""
    mixed_span = functools.partial(torchops.nn.mixed_span, DEPTH, is_causal=True)
    by_torch = functools.partial(SpanByTorch, CONTEXT)
    full = mixed_span(range(DEPTH))
    dense = Variant("full", "", attending(full), "attention")
    variants = [dense, Variant("full, by torch", "", attending(full, by_torch), "attention", same_as=dense)]
    for full_layers in (FULL_LAYERS,) if short else (FULL_LAYERS, ()):
        prefix = MIXED if full_layers else "only"
        sizes = (SPAN,) if short or not full_layers else (64, SPAN)
        for size in sizes:  # a byte attends to the last ``size`` bytes up to itself
            window = mixed_span(full_layers, left=size - 1)
            variants.append(Variant(f"{prefix} windows", str(size), attending(window), "attention", size == SPAN))
            if variants[-1].name == EXPORTED:
                masked = attending(window, by_torch)
                name = f"{prefix} windows, by torch"
                variants.append(Variant(name, str(size), masked, "attention", False, variants[-1]))
        for size in sizes:  # or to those of its block up to itself
            block = mixed_span(full_layers, block_size=size)
            variants.append(Variant(f"{prefix} blocks", str(size), attending(block), "attention", size == SPAN))
        for share in (8,) if short or not full_layers else (8, 16):  # of the keys, the most similar ones
            similar = attending_to_similar_keys(full_layers, 1 / share, passages)
            variants.append(Variant(f"{prefix} similar keys", f"1/{share}", similar, "attention", share == 8))
    window = attending(mixed_span(FULL_LAYERS, left=SPAN - 1))
    half = routing.BLOCKS // 2
    setting = f"{half} of {routing.BLOCKS}"
    variants.append(Variant("full, routed", setting, routed(half, passages), "feed-forward"))
    variants.append(Variant(LORA, "", lambda dense: routing.adapt(copy.deepcopy(dense)), "feed-forward"))
    with_lora = routed(half, passages, routing.RANK)
    if not short:
        variants.append(Variant("full, routed, LoRA", setting, with_lora, "feed-forward", False))
    similar = attending_to_similar_keys(FULL_LAYERS, 1 / 8, passages)
    variants.append(Variant(SPT, "", then(similar, with_lora), "feed-forward"))
    for ratio in (3.0,) if short else (3.0, 4.0):
        setting = f"{ratio:.0f}x"
        factored = compressed(compression.factor, ratio, passages)
        low_rank = compressed(compression.lower_rank, ratio, passages)
        variants.append(Variant("full, factored", setting, then(factored, attending(full)), "linear", ratio == 3))
        variants.append(Variant("full, low rank", setting, then(low_rank, attending(full)), "linear", False))
        if ratio == 3:
            variants.append(Variant(f"{EXPORTED}, factored", setting, then(factored, window), "linear", not short))
    return variants
