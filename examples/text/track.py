"""The text track: a byte-level decoder, with full attention, with a mix of spans (MASFormer), with attention to similar
keys (SPT), with dense and with factored linear layers (DSFormer).

It is trained dense and with full attention. Then its weights go into variants that attend to windows, to blocks or to
the most similar keys in some layers or in all of them, or whose linear layers are factored; each is fine-tuned for a
short while, and loss, bytes, time and memory are compared.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchops

from ..common import export, measurement
from ..common.distributed import IS_MAIN, NUM_PROCESSES, wait_for_all
from ..common.report import Panel, Point, console, plot, print_table, write_results
from ..common.training import train
from . import codebooks, compression
from .data import VOCABULARY, Sources, load
from .decoder import Decoder, Span
from .variants import (
    BATCH_SIZE,
    CONTEXT,
    DEPTH,
    DIM,
    EXPORTED,
    FACTORED,
    NUM_HEADS,
    PARTS,
    Result,
    Variant,
    build_variants,
)


def byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per byte, of logits [B, L, VOCABULARY] and bytes [B, L]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.inference_mode()
def held_out_losses(model: nn.Module, passages: tuple[Tensor, Tensor]) -> Tensor:
    """Nats for every byte of the passages, [count, context]."""
    losses = [
        F.cross_entropy(model(symbols).transpose(1, 2), targets, reduction="none")
        for symbols, targets in zip(*(part.split(4) for part in passages), strict=True)
    ]
    return torch.cat(losses)


def share_of_pairs(model: Decoder) -> float:
    """How many pairs of bytes the layers compare, to those of full attention."""
    pairs = [layer.attend.visible_pairs(CONTEXT) for layer in model.layers]
    return sum(pairs) / len(pairs) / torchops.nn.visible_pairs(CONTEXT, is_causal=True)


def measure(variants: list[Variant], sources: Sources, contexts: Sequence[int], rounds: int) -> None:
    """Fills in throughput and memory: training steps at all contexts but the longest, and forward passes at the
    longest, for which factored layers are packed."""
    compared = [variant for variant in variants if variant.compared]
    for context in contexts[:-1]:
        batch_size, measured = (BATCH_SIZE, variants) if context == CONTEXT else (1, compared)
        symbols, targets = next(sources.batches(batch_size, context, seed=2))
        steps = {
            variant.name: measurement.training_step(variant.model, symbols, targets, byte_loss) for variant in measured
        }
        seconds = measurement.median_seconds(steps, rounds, f"measuring training, {context} bytes")
        for variant in measured:
            variant.result.training[context] = symbols.numel() / seconds[variant.name]
            if context == CONTEXT:
                variant.result.peak_memory = measurement.peak_memory(steps[variant.name])
    for variant in variants:
        compression.pack(variant.model)
    longest = contexts[-1]
    passage = sources.held_out_passages(1, longest)[0]
    forward_steps = {variant.name: measurement.forward_step(variant.model, passage) for variant in compared}
    seconds = measurement.median_seconds(forward_steps, rounds, f"measuring forward, {longest} bytes")
    for variant in compared:
        variant.result.forward[longest] = longest / seconds[variant.name]


def tabulate(variants: list[Variant], num_passages: int) -> None:
    full = variants[0].result
    longest_trained, longest = max(full.training), max(full.forward)

    def compare(throughput: dict[int, float], dense: dict[int, float], context: int) -> str:
        if context not in throughput:
            return ""
        return f"{throughput[context] / 1e3:.1f} ({throughput[context] / dense[context]:.2f}x)"

    rows = []
    for variant in variants:
        result = variant.result
        rows.append(
            [
                variant.name,
                f"{100 * result.visible_pairs:.0f} %",
                f"{result.weight_bytes / 1e3:.0f} ({full.weight_bytes / result.weight_bytes:.2f}x)",
                f"{result.loss_before:.3f}",
                f"{result.loss_after:.3f}",
                f"{result.excess:+.3f} ±{result.excess_error:.3f}",
                f"{1e3 * BATCH_SIZE * CONTEXT / result.training[CONTEXT]:.0f}",
                compare(result.training, full.training, CONTEXT),
                compare(result.training, full.training, longest_trained),
                compare(result.forward, full.forward, longest),
                f"{result.peak_memory / 2**20:.0f} ({result.peak_memory / full.peak_memory:.2f}x)",
                "" if result.recall is None else f"{100 * result.recall:.0f} %",
            ]
        )
    print_table(
        "Text: what shorter spans and factored layers cost and what they save",
        "Pairs: how many pairs of bytes attention compares, of those of full attention. Layers: bytes of the linear "
        "layers' weights in inference, masks included. Factored layers train straight through their choice of basis "
        "vectors, and are packed for the forward pass. Loss: nats per byte on "
        f"{num_passages} held-out passages of {CONTEXT} bytes, as converted and after fine-tuning, and its difference "
        f"to full attention with the standard error over passages. A step trains on {BATCH_SIZE} passages. Throughput: "
        f"median over interleaved rounds, {torch.get_num_threads()} thread(s); more than {CONTEXT} bytes are one "
        "passage. Memory: peak of torch's CPU allocations during a step, beyond weights and the optimizer's state. "
        "Keys found: of those with the largest scores, as many as a query attends to, the share that its codes choose.",
        [
            "variant",
            "pairs",
            "layers, kB\n(smaller)",
            "loss\nbefore",
            "loss\nafter",
            "after,\nto full",
            "step\nms",
            f"training, kB/s\nat {CONTEXT}",
            f"training, kB/s\nat {longest_trained}",
            f"forward, kB/s\nat {longest}",
            "memory\nMiB",
            "keys\nfound",
        ],
        rows,
    )


def draw(variants: list[Variant], path: Path) -> None:
    full = variants[0]
    compared = [variant for variant in variants if variant.compared and variant.about == "attention"]

    def points(about: str, place: Callable[[Result], float], extra: Sequence[Variant] = ()) -> list[Point]:
        """Losses of variants of a kind over something else."""
        shown = [*extra, *(variant for variant in variants if variant.about == about)]
        return [Point(v.series, v.setting, place(v.result), v.result.loss_after) for v in shown]

    loss, speed = "held-out loss, nats per byte", f"training, kB/s (context {CONTEXT})"

    def throughput(result: Result) -> float:
        return result.training[CONTEXT] / 1e3

    panels = [
        Panel("spans and lists of keys", speed, loss, points("attention", throughput)),
        Panel(
            "the same at longer contexts",
            "context in bytes",
            "training, kB/s",
            [
                Point(variant.series, "", context, per_second / 1e3)
                for variant in compared
                for context, per_second in variant.result.training.items()
            ],
            x_ticks=list(full.result.training),
        ),
        Panel("routed feed-forward layers, LoRA", speed, loss, points("feed-forward", throughput, [full])),
        Panel(
            "factored layers",
            "bytes of the linear layers, kB",
            loss,
            points("linear", lambda result: result.weight_bytes / 1e3, [full]),
        ),
        Panel(
            "spans and lists of keys, by position",
            "position of the byte",
            "loss more than full attention's, nats per byte",
            [
                Point(variant.series, "", (part + 0.5) * CONTEXT / PARTS, part_loss - full.result.loss_by_part[part])
                for variant in compared
                if variant.same_as is None
                for part, part_loss in enumerate(variant.result.loss_by_part)
            ],
        ),
    ]
    plot("Text: a byte-level decoder, converted and fine-tuned for a short while", panels, path)


def exported(variants: list[Variant]) -> Variant:
    return next(variant for variant in variants if variant.name == EXPORTED)


def summarize(variants: list[Variant]) -> str:
    full, mixed = variants[0].result, exported(variants).result
    factored = next(variant for variant in variants if variant.name == FACTORED)
    longest_trained, longest = max(full.training), max(full.forward)
    return (
        f"{EXPORTED}: loss {mixed.loss_after:.3f} nats per byte (full attention {full.loss_after:.3f}), "
        f"{mixed.training[CONTEXT] / full.training[CONTEXT]:.2f}x the training throughput "
        f"({mixed.training[longest_trained] / full.training[longest_trained]:.2f}x at {longest_trained} bytes), "
        f"{mixed.forward[longest] / full.forward[longest]:.2f}x the forward throughput at {longest} bytes; its "
        f"exports compute the same. {factored.name}: loss {factored.result.loss_after:.3f}, linear layers "
        f"{full.weight_bytes / factored.result.weight_bytes:.2f}x smaller."
    )


def run(short: bool, output: Path) -> str:
    """Runs the track.

    Args:
        short: train, tune and measure for a much shorter time, with fewer variants; shows that all works,
            not how well.
        output: folder to write to.

    Returns:
        what came out, in a sentence; empty in all processes but the main one.
    """
    dense_steps, tuning_steps, rounds, num_passages = (20, 5, 2, 8) if short else (200, 20, 3, 12)
    contexts = (CONTEXT, 4096, 8192) if short else (CONTEXT, 8192, 16384)
    folder = output / "text"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sources = load()
    passages = sources.held_out_passages(num_passages, CONTEXT)
    dense = Decoder(VOCABULARY, DIM, NUM_HEADS, [Span() for _ in range(DEPTH)])
    batches = functools.partial(sources.batches, BATCH_SIZE, CONTEXT)
    variants = build_variants(short, torch.cat([symbols for symbols, _ in islice(batches(seed=3), 4)]))

    num_weights = sum(weight.numel() for weight in dense.parameters())
    console.print(
        f"{len(sources.train) / 1e6:.1f} MB of the standard library's sources to train on, "
        f"{len(sources.held_out) / 1e6:.1f} MB to test. A byte-level decoder of {DEPTH} layers and dimension {DIM}, "
        f"{num_weights / 1e6:.2f} M weights, reads {CONTEXT} bytes at once. "
        f"Processes: {NUM_PROCESSES}, threads of each: {torch.get_num_threads()}."
    )
    console.print(f"\n1. Training it with full attention, {dense_steps} steps of {BATCH_SIZE} passages.")
    train(dense, batches(seed=0), byte_loss, dense_steps, 3e-3, "full")

    console.print(f"\n2. Giving its weights to every variant, and fine-tuning each for {tuning_steps} steps.")
    full_losses = torch.empty(0)
    for variant in variants:
        variant.model = variant.convert(dense)
        result = variant.result
        result.visible_pairs = share_of_pairs(variant.model)
        result.weight_bytes = compression.num_bytes(variant.model.layers)
        result.loss_before = held_out_losses(variant.model, passages).mean().item()
        if variant.same_as is None:
            train(variant.model, batches(seed=1), byte_loss, tuning_steps, 5e-4, variant.name)
        else:
            variant.model.load_state_dict(variant.same_as.model.state_dict())
        losses = held_out_losses(variant.model, passages)
        result.loss_after = losses.mean().item()
        result.recall = codebooks.recall(variant.model, passages[0][:2])
        result.loss_by_part = [part.mean().item() for part in losses.chunk(PARTS, 1)]
        if variant is variants[0]:
            full_losses = losses
        excess = (losses - full_losses).mean(1)
        result.excess, result.excess_error = excess.mean().item(), excess.std().item() / num_passages**0.5

    summary = ""
    if IS_MAIN:
        console.print("\n3. Measuring time and memory, all variants in turn.")
        measure(variants, sources, contexts, rounds)
        tabulate(variants, num_passages)
        results, image = folder / "results.json", folder / "loss_throughput.png"
        write_results({variant.name: variant.result for variant in variants}, results)
        draw(variants, image)
        console.print(f"Wrote {results} and {image}.")
        console.print(f"\n4. Saving '{EXPORTED}' and running it without its code.")
        export.save_and_check(exported(variants).model, passages[0][:2], folder, output / "cpp_build")
        summary = summarize(variants)
    wait_for_all()
    return summary
