"""The digits track: a Vision Transformer, dense and with fewer and fewer tokens.

It is trained dense. Then its weights go into variants that merge, prune or route tokens, each is
fine-tuned for a short while, and accuracy, time and memory are compared.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchops

from ..common import export, measurement
from ..common.distributed import IS_MAIN, NUM_PROCESSES, wait_for_all
from ..common.report import Panel, Point, console, plot, print_table, write_results
from ..common.training import train
from .data import IMAGE_SIZE, Digits, load
from .vision_transformer import Block, KeepTokens, MergeTokens, PruneTokens, VisionTransformer

PATCH_SIZE = 4
DIM = 64
DEPTH = 6
NUM_HEADS = 4
PRUNED_LAYERS = (1, 3, 4)  # behind a quarter, a half and three quarters of the layers, as EViT has it
BATCH_SIZE = 32
MEASURED_BATCH_SIZE = 64
EXPORTED_R = 12  # of the merging model that is exported


@dataclass
class Result:
    """What is found out about a variant; accuracies in percent, throughputs in images/s, memory in bytes."""

    accuracy_before: float = 0.0
    accuracy_after: float = 0.0
    tokens: list[int] = field(default_factory=list)
    forward: float = 0.0
    training: float = 0.0
    peak_memory: int = 0


@dataclass
class Variant:
    """A model to compare: what it does with its tokens, and how much of it."""

    series: str
    setting: str
    model: VisionTransformer
    result: Result = field(default_factory=Result)

    @property
    def name(self) -> str:
        return f"{self.series} {self.setting}".rstrip()


def transformer(
    reductions: Sequence[nn.Module] | None = None, ratios: Sequence[float] | None = None
) -> VisionTransformer:
    return VisionTransformer(IMAGE_SIZE, PATCH_SIZE, DIM, DEPTH, NUM_HEADS, 10, reductions, ratios)


def merging(r: int, modulation_dim: int | None = None) -> VisionTransformer:
    """Every layer merges r tokens away."""
    return transformer(reductions=[MergeTokens(r, modulation_dim) for _ in range(DEPTH)])


def pruning(keep: float, fuse: bool) -> VisionTransformer:
    """Three layers keep a share of their tokens."""
    return transformer(
        reductions=[PruneTokens(keep, fuse) if layer in PRUNED_LAYERS else KeepTokens() for layer in range(DEPTH)]
    )


def build_variants(short: bool) -> list[Variant]:
    """The dense model first; a short run has one of each kind."""
    variants = [Variant("dense", "", transformer())]
    for r in (EXPORTED_R,) if short else (4, 8, EXPORTED_R, 16):
        variants.append(Variant("merge (ToMe)", f"r={r}", merging(r)))
    variants.append(Variant("merge + PYRA", f"r={EXPORTED_R}", merging(EXPORTED_R, DIM)))
    for series, fuse in (("prune + fuse (EViT)", True), ("prune", False)):
        for keep in (0.5,) if short else (0.7, 0.5, 0.3):
            variants.append(Variant(series, f"keep={keep}", pruning(keep, fuse)))
    ratios = torchops.nn.mixture_of_depths_schedule(DEPTH)
    variants.append(Variant("route (p-MoD)", "", transformer(ratios=ratios)))
    return variants


@torch.inference_mode()
def accuracy(model: nn.Module, digits: Digits) -> float:
    predicted = model(digits.test_images).argmax(1)
    return 100 * (predicted == digits.test_labels).double().mean().item()


@torch.inference_mode()
def tokens_per_layer(model: nn.Module, images: Tensor) -> list[int]:
    """How many tokens of an image each layer's MLP works on."""
    counts: list[int] = []
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1])) for block in blocks
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return counts


def measure(variants: list[Variant], digits: Digits, rounds: int) -> None:
    """Fills in tokens, throughput and memory."""
    images, labels = digits.test_images[:MEASURED_BATCH_SIZE], digits.test_labels[:MEASURED_BATCH_SIZE]
    forward_steps = {variant.name: measurement.forward_step(variant.model, images) for variant in variants}
    training_steps = {
        variant.name: measurement.training_step(variant.model, images, labels, F.cross_entropy) for variant in variants
    }
    forward = measurement.median_seconds(forward_steps, rounds, "measuring forward passes")
    training = measurement.median_seconds(training_steps, rounds, "measuring training steps")
    for variant in variants:
        variant.result.tokens = tokens_per_layer(variant.model, images)
        variant.result.forward = MEASURED_BATCH_SIZE / forward[variant.name]
        variant.result.training = MEASURED_BATCH_SIZE / training[variant.name]
        variant.result.peak_memory = measurement.peak_memory(training_steps[variant.name])


def report(variants: list[Variant], digits: Digits, folder: Path) -> None:
    """Prints the table, and writes it as results.json and as a plot."""
    dense = variants[0].result
    rows = []
    for variant in variants:
        result = variant.result
        rows.append(
            [
                variant.name,
                f"{result.accuracy_before:.1f}",
                f"{result.accuracy_after:.1f}",
                f"{result.tokens[-1]}",
                f"{sum(result.tokens) / len(result.tokens):.1f}",
                f"{result.forward:.0f} ({result.forward / dense.forward:.2f}x)",
                f"{result.training:.0f} ({result.training / dense.training:.2f}x)",
                f"{result.peak_memory / 2**20:.0f} ({result.peak_memory / dense.peak_memory:.2f}x)",
            ]
        )
    num_images = len(digits.test_labels)
    share = dense.accuracy_after / 100
    standard_error = 100 * math.sqrt(share * (1 - share) / num_images)
    print_table(
        "Digits: what fewer tokens cost and what they save",
        f"Accuracy on {num_images} test images as converted and after fine-tuning: one image is "
        f"{100 / num_images:.2f} %, the standard error of dense {standard_error:.1f} %. Tokens as the last layer's MLP "
        "sees them, and the mean over layers. Throughput: median over interleaved rounds, batches of "
        f"{MEASURED_BATCH_SIZE}, {torch.get_num_threads()} thread(s). Memory: peak of torch's CPU allocations during "
        "a training step, beyond weights and the optimizer's state.",
        [
            "variant",
            "accuracy\nbefore",
            "accuracy\nafter",
            "tokens\nlast",
            "tokens\nmean",
            "forward\nimages/s",
            "training\nimages/s",
            "memory\nMiB",
        ],
        rows,
    )
    write_results({variant.name: variant.result for variant in variants}, folder / "results.json")

    def panel(title: str, throughput: str, accuracy_at: str) -> Panel:
        points = []
        for variant in variants:
            values = asdict(variant.result)
            points.append(Point(variant.series, variant.setting, values[throughput], values[accuracy_at]))
        middle = points[0].y
        band = (middle - standard_error, middle + standard_error)
        return Panel(title, f"{throughput}, images/s", "test accuracy in %", points, band)

    panels = [
        panel("as converted", "forward", "accuracy_before"),
        panel("fine-tuned", "training", "accuracy_after"),
    ]
    image = folder / "accuracy_throughput.png"
    plot("Digits: accuracy against throughput (shaded: a standard error of dense)", panels, image)
    console.print(f"Wrote {folder / 'results.json'} and {image}.")


def summarize(variants: list[Variant]) -> str:
    dense, merged = variants[0].result, exported(variants).result
    return (
        f"{exported(variants).name}: accuracy {merged.accuracy_after:.1f} % (dense {dense.accuracy_after:.1f} %), "
        f"{merged.forward / dense.forward:.2f}x the forward and {merged.training / dense.training:.2f}x the training "
        f"throughput, {merged.peak_memory / dense.peak_memory:.2f}x the memory of a training step; its exports "
        "compute the same."
    )


def exported(variants: list[Variant]) -> Variant:
    return next(variant for variant in variants if variant.setting == f"r={EXPORTED_R}")


def run(short: bool, output: Path) -> str:
    """Runs the track.

    Args:
        short: train, tune and measure for a much shorter time, with fewer variants; shows that all works,
            not how well.
        output: folder to write to.

    Returns:
        what came out, in a sentence; empty in all processes but the main one.
    """
    dense_epochs, tuning_epochs, rounds = (3, 1, 5) if short else (10, 1, 6)
    folder = output / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    digits = load()
    steps_per_epoch = len(digits.train_images) // BATCH_SIZE
    variants = build_variants(short)
    dense = variants[0].model

    num_tokens = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1
    console.print(
        f"{len(digits.train_images)} images of handwritten digits to train on, {len(digits.test_images)} to test. A "
        f"Vision Transformer of {DEPTH} layers and dimension {DIM} reads each as {num_tokens} tokens. "
        f"Processes: {NUM_PROCESSES}, threads of each: {torch.get_num_threads()}."
    )
    console.print(f"\n1. Training it dense, {dense_epochs} epochs.")
    batches = digits.batches(BATCH_SIZE, seed=0)
    train(dense, batches, F.cross_entropy, dense_epochs * steps_per_epoch, 2e-3, "dense")
    weights = copy.deepcopy(dense.state_dict())

    console.print(f"\n2. Giving its weights to every variant, and fine-tuning each for {tuning_epochs} epoch(s).")
    for variant in variants:
        variant.model.load_dense_weights(weights)
        variant.result.accuracy_before = accuracy(variant.model, digits)
        batches = digits.batches(BATCH_SIZE, seed=1)
        train(variant.model, batches, F.cross_entropy, tuning_epochs * steps_per_epoch, 5e-4, variant.name)
        variant.result.accuracy_after = accuracy(variant.model, digits)

    summary = ""
    if IS_MAIN:
        console.print("\n3. Measuring throughput and memory, all variants in turn.")
        measure(variants, digits, rounds)
        report(variants, digits, folder)
        console.print(f"\n4. Saving '{exported(variants).name}' and running it without its code.")
        export.save_and_check(exported(variants).model, digits.test_images, folder, output / "cpp_build")
        summary = summarize(variants)
    wait_for_all()
    return summary
