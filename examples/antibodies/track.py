"""The antibodies track: a masked language model whose linear layers are factored (DSFormer), and low-rank ones of as
many bytes to compare with, both fitted to what the layers compute of typical sequences, and to the weights alone.

Nothing is trained. How well a model tells amino acids that are masked is measured on sequences of other genes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.encoders import factored, linear_weights, truncated
from ..common.page import Table
from ..common.report import Panel, Point, console, plot, write_results
from ..common.weights import Spectra, WeightError, error_table, errors_by_bytes
from . import data
from .model import FIRST, MASK, PAD, MaskedLanguageModel, load, tokenize

COMPRESSIONS = (2.0, 2.8, 3.57)  # the paper's
SERIES = ("dense", "factored", "factored by weights", "low rank", "low rank by weights")
BATCH_SIZE = 32
MASKED = 0.15  # of each sequence, as in BERT
MASKINGS = 2  # of each sequence held out


@dataclass
class Quality:
    """How well masked amino acids are told.

    Args:
        losses: cross entropy in nats, a mean over what is masked of each sequence.
        hits: how often the most likely amino acid is the right one, likewise.
        cosine: of the last hidden states with the dense model's, a mean over tokens.
    """

    losses: list[float]
    hits: list[float]
    cosine: float

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * sum(self.hits) / len(self.hits)


def standard_error(ours: Sequence[float], others: Sequence[float]) -> float:
    """Of the difference of two means over the same sequences."""
    differences = torch.tensor(ours).double() - torch.tensor(others).double()
    return (differences.std() / len(differences) ** 0.5).item()


@dataclass
class Variant:
    """A model and what is found out about it.

    Args:
        series, compression: what it is called.
        num_bytes: of its encoder's linear layers in bfloat16, biases not.
        seconds: of one core, that it took to make it.
    """

    series: str
    compression: float
    num_bytes: int
    seconds: float
    quality: Quality

    @property
    def name(self) -> str:
        return self.series if self.compression == 1 else f"{self.series} {self.compression:g}x"


# ---- sequences --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Sequences as they are and with amino acids masked, and which ones of all they are."""

    tokens: Tensor  # [B, L]
    masked: Tensor  # [B, L]
    sequence: Tensor  # [B]


def batches_of(sequences: Sequence[str], maskings: int, seed: int) -> list[Batch]:
    """Sequences of one length together, so that few tokens are padding. Several maskings of one have nothing in
    common."""
    generator = torch.Generator().manual_seed(seed)
    in_order = torch.tensor(sorted(range(len(sequences)), key=lambda index: len(sequences[index])))
    batches = []
    for chosen in in_order.split(BATCH_SIZE):
        tokens = tokenize(sequences[index] for index in chosen)
        # Those that come first are masked first; what is no amino acid comes last.
        order = torch.rand(tokens.shape, generator=generator).masked_fill(tokens < FIRST, 2).argsort().argsort()
        share = MASKED * (tokens >= FIRST).sum(1, keepdim=True)
        for masking in range(maskings):
            is_masked = (order >= (masking * share).long()) & (order < ((masking + 1) * share).long())
            batches.append(Batch(tokens, tokens.masked_fill(is_masked, MASK), chosen))
    return batches


class Examination:
    """Sequences that all models read, and what the dense one makes of them."""

    def __init__(self, sequences: Sequence[str], dense: MaskedLanguageModel) -> None:
        self.num_sequences = len(sequences)
        self.batches = batches_of(sequences, MASKINGS, seed=1)
        with torch.inference_mode():
            self.dense = [dense(batch.masked) for batch in self.batches]

    def num_masked(self) -> int:
        return sum(batch.masked.eq(MASK).sum().item() for batch in self.batches)

    @torch.inference_mode()
    def examine(self, model: MaskedLanguageModel) -> Quality:
        losses, hits, counts = torch.zeros(3, self.num_sequences, dtype=torch.float64)
        cosines = []
        for batch, dense in zip(self.batches, self.dense, strict=True):
            states = model(batch.masked)
            is_masked, is_real = batch.masked.eq(MASK), batch.tokens.ne(PAD)
            scores, targets = model.scores(states[is_masked]).double(), batch.tokens[is_masked] - FIRST
            sequence = batch.sequence[is_masked.nonzero()[:, 0]]
            losses.index_add_(0, sequence, F.cross_entropy(scores, targets, reduction="none"))
            hits.index_add_(0, sequence, scores.argmax(1).eq(targets).double())
            counts.index_add_(0, sequence, torch.ones_like(targets).double())
            cosines.append(F.cosine_similarity(states[is_real], dense[is_real]))
        return Quality((losses / counts).tolist(), (hits / counts).tolist(), torch.cat(cosines).mean().item())


# ---- what came out ----------------------------------------------------------------------------------


def quality_table(variants: Sequence[Variant], num_typical: int, num_masked: int) -> Table:
    dense, *others = variants
    loss, accuracy = dense.quality.loss, dense.quality.accuracy
    rows = [["dense", size(dense, dense), f"{loss:.3f}", "", f"{accuracy:.1f}", "", "1.000", ""]]
    for variant in others:
        quality = variant.quality
        loss_error = standard_error(quality.losses, dense.quality.losses)
        accuracy_error = 100 * standard_error(quality.hits, dense.quality.hits)
        rows.append(
            [
                variant.name,
                size(variant, dense),
                f"{quality.loss:.3f}",
                f"{quality.loss - loss:+.3f} ±{loss_error:.3f}",
                f"{quality.accuracy:.1f}",
                f"{quality.accuracy - accuracy:+.1f} ±{accuracy_error:.1f}",
                f"{quality.cosine:.3f}",
                f"{variant.seconds:.0f}",
            ]
        )
    return Table(
        "Quality",
        f"On {len(dense.quality.losses)} sequences held out, of which {num_masked} amino acids are masked. Cross "
        "entropy: of these, in nats, a mean over sequences; accuracy: how often the most likely one is right, in "
        "percent; and their differences to dense with the standard errors of these. Cosine: of the last hidden states "
        f"with the dense model's, a mean over all tokens. Fitted to {num_typical} other sequences, or to the weights "
        "alone. Seconds: of one core, to make the variant.",
        ["variant", "linear layers, MB", "cross entropy", "to dense", "accuracy", "to dense", "cosine", "seconds"],
        rows,
    )


def size(variant: Variant, dense: Variant) -> str:
    return f"{variant.num_bytes / 1e6:.2f} ({dense.num_bytes / variant.num_bytes:.2f}x)"


def draw(variants: Sequence[Variant], path: Path) -> None:
    dense, *others = variants

    def points(value: Callable[[Quality], float]) -> list[Point]:
        return [Point(one.series, "", one.compression, value(one.quality)) for one in others]

    x_label, loss = "compression in bytes", dense.quality.loss
    panels = [
        Panel(
            "masked amino acids (shaded: 0.02 around dense)",
            x_label,
            "cross entropy, nats",
            points(lambda quality: quality.loss),
            band=(loss - 0.02, loss + 0.02),
            x_ticks=COMPRESSIONS,
        ),
        Panel(
            "last hidden states",
            x_label,
            "cosine with dense",
            points(lambda quality: quality.cosine),
            x_ticks=COMPRESSIONS,
        ),
    ]
    plot("AntiBERTy with factored linear layers", panels, path)


def run(short: bool, output: Path) -> tuple[list[Table], Path]:
    """Runs the track.

    Args:
        short: two layers of the encoder, one compression, and few sequences; shows that all works, not how well.
        output: folder to write to.

    Returns:
        the tables, and the plot's file.
    """
    compressions = COMPRESSIONS[:1] if short else COMPRESSIONS
    num_typical, num_held_out = (16, 16) if short else (128, 128)
    folder = output / "antibodies"
    folder.mkdir(parents=True, exist_ok=True)
    dense, table = load()
    if short:
        del dense.layers()[2:]
    sequences = data.load(table, num_typical, num_held_out)
    typical = [batch.masked for batch in batches_of(sequences.typical, 1, seed=0)]
    examination = Examination(sequences.held_out, dense)
    weights = linear_weights(dense)
    dense_bytes = sum(2 * weight.numel() for weight in weights.values())
    console.print(
        f"AntiBERTy: {len(weights)} linear layers in {len(dense.layers())} layers of the encoder, "
        f"{dense_bytes / 2e6:.1f} M numbers. {num_typical} sequences to fit layers to, "
        f"{sum(tokens.ne(PAD).sum().item() for tokens in typical)} tokens; {num_held_out} to test."
    )

    variants = [Variant("dense", 1, dense_bytes, 0, examination.examine(dense))]

    def add(series: str, compression: float, num_bytes: int, seconds: float, model: MaskedLanguageModel) -> None:
        variants.append(Variant(series, compression, num_bytes, seconds, examination.examine(model)))
        quality = variants[-1].quality
        console.print(
            f"{variants[-1].name}: cross entropy {quality.loss:.3f}, accuracy {quality.accuracy:.1f} %, cosine "
            f"{quality.cosine:.3f}, made in {seconds:.0f} s of one core."
        )

    spectra = Spectra(weights)
    errors: dict[float, list[WeightError]] = {}
    for suffix, batches in ((" by weights", []), ("", typical)):
        for compression in compressions:
            start = process_time()
            model, report = factored(dense, compression, batches)
            seconds = process_time() - start
            add("factored" + suffix, compression, report.total().packed_bytes, seconds, model)
            # Sizes are the same with and without sequences; of the errors those are shown that know of none.
            of_layers = errors.setdefault(compression, errors_by_bytes(report, weights, spectra))
            start = process_time()
            model = truncated(dense, of_layers, batches)
            seconds = process_time() - start
            bytes_of_ranks = sum(2 * error.rank * sum(weights[error.layer].shape) for error in of_layers)
            add("low rank" + suffix, compression, bytes_of_ranks, seconds, model)
    variants.sort(key=lambda variant: SERIES.index(variant.series))
    tables = [
        error_table({f"{compression:g}x in bytes": found for compression, found in errors.items()}),
        quality_table(variants, num_typical, examination.num_masked()),
    ]
    for one in tables:
        one.show()
    results, image = folder / "results.json", folder / "antibodies.png"
    write_results({variant.name: variant for variant in variants}, results)
    draw(variants, image)
    console.print(f"Wrote {results} and {image}.")
    return tables, image
