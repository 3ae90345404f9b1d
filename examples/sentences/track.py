"""The sentences track: a real sentence encoder whose linear layers are factored (DSFormer), and low-rank ones of as
many bytes to compare with.

Weights are compared first. Then models are: as converted, with the same treatment of both kinds, and after a short
training in which each learns the hidden states of the dense model from plain sentences, the factored ones
straight-through. How long they take is measured last.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import measurement
from ..common.encoders import factored, in_form, linear_weights, truncated
from ..common.page import Table
from ..common.report import Panel, Point, console, plot, write_results
from ..common.training import train
from ..common.weights import Spectra, WeightError, error_panel, error_table, errors_by_bytes, errors_by_numbers
from .data import Texts, load
from .encoder import SentenceEncoder, Tokenizer
from .encoder import load as load_encoder

COMPRESSIONS = (2.0, 2.8, 3.57)  # the paper's
BATCH_SIZE = 32
LEARNING_RATE = 5e-4
LONGEST = 64  # tokens of a sentence
# How long which variants are trained: one until it is as good as the dense model, or nearly so.
STEPS = {f"{series} {ratio:g}x": 120 for series in ("factored", "low rank") for ratio in COMPRESSIONS}
STEPS["factored 2x"] = 1000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {"one sentence": (1, 16), "32 sentences": (32, 32)}  # sentences, tokens of each


@dataclass
class Quality:
    """How close a model is to the dense one on texts that nothing was trained on.

    Args:
        cosine: of its embedding of a text with the dense model's, a mean.
        correlation: Spearman's, of its similarities of summaries to descriptions with the dense model's.
        found: for each summary whether its description is the most similar of all.
    """

    cosine: float
    correlation: float
    found: list[bool]

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * sum(self.found) / len(self.found)

    def standard_error_to(self, other: "Quality") -> float:
        """Of the difference of two accuracies on the same texts, in percent."""
        differences = torch.tensor(self.found).double() - torch.tensor(other.found).double()
        return 100 * (differences.std() / len(differences) ** 0.5).item()


@dataclass
class Result:
    """What is found out about a variant. Bytes are those of its encoder's linear layers in bfloat16, biases not;
    seconds by shape and dtype."""

    num_bytes: int = 0
    steps: int = 0  # of training
    before: Quality | None = None
    after: Quality | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Variant:
    series: str
    compression: float
    model: SentenceEncoder
    result: Result = field(default_factory=Result)

    @property
    def name(self) -> str:
        return self.series if self.compression == 1 else f"{self.series} {self.compression:g}x"


class Examination:
    """Texts that all models read, and what the dense one makes of them."""

    def __init__(self, texts: Texts, tokenize: Tokenizer, dense: SentenceEncoder) -> None:
        self.batches = [batches_of(tokenize, side, LONGEST) for side in (texts.summaries, texts.descriptions)]
        self.dense = self.embed(dense)

    @torch.inference_mode()
    def embed(self, model: SentenceEncoder) -> list[Tensor]:
        """Summaries and descriptions, each [n, C], in the order of their lengths put right again."""
        sides = []
        for batches in self.batches:
            order = torch.cat([chosen for chosen, _ in batches])
            sides.append(torch.cat([model.embed(tokens) for _, tokens in batches])[order.argsort()])
        return sides

    def examine(self, model: SentenceEncoder) -> Quality:
        summaries, descriptions = self.embed(model)
        cosines = [(ours * dense).sum(1) for ours, dense in zip((summaries, descriptions), self.dense, strict=True)]
        similarities = summaries @ descriptions.T
        return Quality(
            torch.cat(cosines).mean().item(),
            rank_correlation(similarities, self.dense[0] @ self.dense[1].T),
            similarities.argmax(1).eq(torch.arange(len(similarities))).tolist(),
        )


def batches_of(tokenize: Tokenizer, texts: Sequence[str], longest: int) -> list[tuple[Tensor, Tensor]]:
    """Positions of texts, and their tokens; texts of one length together, so that few tokens are padding."""
    order = torch.tensor(sorted(range(len(texts)), key=lambda index: len(texts[index])))
    return [(chosen, tokenize([texts[index] for index in chosen], longest)) for chosen in order.split(BATCH_SIZE)]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([values.flatten().argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


# ---- training ---------------------------------------------------------------------------------------


def distillation(
    dense: SentenceEncoder, tokenize: Tokenizer, sentences: Sequence[str], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sentences of about one length, and the dense model's hidden states, without end."""
    generator = random.Random(seed)
    in_order = sorted(sentences, key=len)
    while True:
        start = generator.randrange(len(in_order) - 4 * BATCH_SIZE)
        tokens = tokenize(generator.sample(in_order[start : start + 4 * BATCH_SIZE], BATCH_SIZE), LONGEST)
        with torch.no_grad():
            states = dense(tokens)
        yield tokens, states


def missed(states: Tensor, targets: Tensor) -> Tensor:
    """The part of the dense model's hidden states [B, layers, L, C] that is missed, a mean over layers, and of
    their sum over the last one's tokens, which is the embedding."""
    of_layers = (states - targets).square().sum((0, 2, 3)) / targets.square().sum((0, 2, 3))
    embeddings, dense_embeddings = states[:, -1].sum(1), targets[:, -1].sum(1)
    cosine = nn.functional.cosine_similarity(embeddings, dense_embeddings, dim=1)
    return of_layers.mean() + (1 - cosine).mean()


# ---- time -------------------------------------------------------------------------------------------


def measure(variants: Sequence[Variant], rounds: int) -> None:
    """Fills in the times of forward passes. Factored layers are packed, as for inference; at the lowest compression
    they are measured before that, too."""
    measured = [
        variant
        for variant in variants
        if variant.series == "factored" or (variant.series != "by weights" and variant.compression <= COMPRESSIONS[0])
    ]
    for dtype_name, dtype in DTYPES.items():
        models: dict[tuple[str, str], nn.Module] = {}
        for variant in measured:
            model = copy.deepcopy(variant.model).to(dtype).eval()
            if variant.series == "factored" and variant.compression == COMPRESSIONS[0]:
                models[variant.name, "as trained, "] = in_form(copy.deepcopy(model), "factored")
            models[variant.name, ""] = in_form(model, "pack")
        for shape_name, shape in SHAPES.items():
            tokens = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0))
            steps = {" ".join(key): measurement.forward_step(model, tokens) for key, model in models.items()}
            many = rounds * (20 if shape[0] == 1 else 1)
            seconds = measurement.median_seconds(steps, many, f"measuring {shape_name}, {dtype_name}")
            for (name, form), step in zip(models, steps, strict=True):
                variant = next(variant for variant in measured if variant.name == name)
                variant.result.seconds[f"{form}{shape_name}, {dtype_name}"] = seconds[step]


# ---- what came out ----------------------------------------------------------------------------------


def quality_table(variants: Sequence[Variant], num_sentences: int) -> Table:
    dense = variants[0].result
    rows = []
    for variant in variants:
        row = [
            variant.name,
            f"{variant.result.num_bytes / 1e6:.2f} ({dense.num_bytes / variant.result.num_bytes:.2f}x)",
            f"{variant.result.steps or ''}",
        ]
        for quality in (variant.result.before, variant.result.after):
            if quality is None:
                row += [""] * 4
                continue
            difference = quality.accuracy - dense.before.accuracy
            error = quality.standard_error_to(dense.before)
            row += [f"{quality.cosine:.3f}", f"{quality.correlation:.3f}", f"{quality.accuracy:.1f}"]
            row.append("" if variant is variants[0] else f"{difference:+.1f} ±{error:.1f}")
        rows.append(row)
    num_texts = len(dense.before.found)
    return Table(
        "Quality",
        f"Before and after steps of {BATCH_SIZE} of {num_sentences} sentences, on {num_texts} docstrings held out."
        " Cosine: of the embedding of a text with the dense model's. Spearman: correlation of the similarities of "
        "all first sentences to all descriptions with the dense model's. Found: how often the description most like "
        f"a first sentence is its own, in percent (by chance {100 / num_texts:.2g}), and the difference to dense with "
        "the standard error of that difference.",
        ["variant", "linear layers, MB", "steps"]
        + [
            f"{column}\n{when}"
            for when in ("before", "after")
            for column in ("cosine", "Spearman", "found", "to dense")
        ],
        rows,
    )


def time_table(variants: Sequence[Variant]) -> Table:
    dense = variants[0].result.seconds
    columns = list(dense)
    rows = []
    for variant in variants:
        for form in ("as trained, ", ""):
            cells = [
                f"{1e3 * seconds:.1f} ({dense[column] / seconds:.2f}x)"
                for column in columns
                if (seconds := variant.result.seconds.get(form + column)) is not None
            ]
            if cells:
                packed = ", packed" if variant.series == "factored" and not form else ""
                rows.append([variant.name + packed, *cells])
    shapes = " and ".join(f"{sentences} of {tokens} tokens" for sentences, tokens in SHAPES.values())
    return Table(
        "Time",
        f"A forward pass of the whole model over {shapes}, in milliseconds, and how many times faster than dense; "
        f"medians over interleaved rounds, {torch.get_num_threads()} thread(s).",
        ["variant", *columns],
        rows,
    )


def draw(errors: dict[float, list[WeightError]], variants: Sequence[Variant], path: Path) -> None:
    def quality(value: Callable[[Quality], float]) -> list[Point]:
        return [
            Point(f"{variant.series}, {when}", "", variant.compression, value(found))
            for variant in variants[1:]
            for when, found in (("as converted", variant.result.before), ("trained", variant.result.after))
            if found is not None
        ]

    dense, label = variants[0].result.before, "compression in bytes"
    panels = [
        error_panel(errors),
        Panel(
            "similarities",
            label,
            "Spearman correlation with dense",
            quality(lambda q: q.correlation),
            x_ticks=COMPRESSIONS,
        ),
        Panel(
            "docstrings (shaded: a point around dense)",
            label,
            "found, in %",
            quality(lambda q: q.accuracy),
            band=(dense.accuracy - 1, dense.accuracy + 1),
            x_ticks=COMPRESSIONS,
        ),
    ]
    plot("all-MiniLM-L6-v2 with factored linear layers", panels, path)


def run(short: bool, output: Path) -> tuple[list[Table], Path]:
    """Runs the track.

    Args:
        short: two layers of the encoder, one compression, and little of everything else; shows that all works, not
            how well.
        output: folder to write to.

    Returns:
        the tables, and the plot's file.
    """
    compressions = COMPRESSIONS[:1] if short else COMPRESSIONS
    num_docstrings, num_batches, rounds = (50, 2, 2) if short else (400, 40, 6)
    steps = {"factored 2x": 5, "low rank 2x": 5} if short else STEPS
    folder = output / "sentences"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    dense, tokenize = load_encoder()
    if short:
        del dense.layers()[2:]
    texts = load(num_docstrings)
    examination = Examination(texts, tokenize, dense)
    weights = linear_weights(dense)
    console.print(
        f"all-MiniLM-L6-v2: {len(weights)} linear layers in {len(dense.layers())} layers of the encoder, "
        f"{sum(weight.numel() for weight in weights.values()) / 1e6:.1f} M numbers. {len(texts.sentences)} sentences "
        f"of the language reference and docstrings to train on, {num_docstrings} docstrings to test."
    )

    console.print("\n1. Factoring its weights.")
    spectra = Spectra(weights)
    errors = {f"{ratio:g}x in numbers": errors_by_numbers(weights, spectra, ratio) for ratio in compressions}
    num_bytes = sum(2 * weight.numel() for weight in weights.values())
    variants = [Variant("dense", 1, dense, Result(num_bytes))]
    by_bytes: dict[float, list[WeightError]] = {}
    by_weights = []
    for compression in compressions:
        model, report = factored(dense, compression)
        by_bytes[compression] = errors_by_bytes(report, weights, spectra)
        by_weights.append(Variant("by weights", compression, model, Result(report.total().packed_bytes)))
    batches = distillation(dense, tokenize, texts.sentences, seed=2)
    sample = [tokens for tokens, _ in islice(batches, num_batches)]
    for compression in compressions:
        model, report = factored(dense, compression, sample)
        variants.append(Variant("factored", compression, model, Result(report.total().packed_bytes)))
    variants += by_weights
    for compression in compressions:
        bytes_of_ranks = sum(2 * error.rank * sum(weights[error.layer].shape) for error in by_bytes[compression])
        model = truncated(dense, by_bytes[compression], sample)
        variants.append(Variant("low rank", compression, model, Result(bytes_of_ranks)))
    errors |= {f"{compression:g}x in bytes": found for compression, found in by_bytes.items()}
    remark = (
        " Numbers: the size is chosen by numbers stored, as the paper counts, with K = 2 nnz; bytes: by `factorize_`."
    )
    tables = [error_table(errors, remark)]
    tables[-1].show()

    console.print("\n2. Training variants to do what the dense model does.")
    for variant in variants:
        variant.result.before = examination.examine(variant.model)
        variant.result.steps = steps.get(variant.name, 0)
        if not variant.result.steps:
            continue
        in_form(variant.model, "straight_through")
        batches = distillation(dense, tokenize, texts.sentences, seed=1)
        train(variant.model, batches, missed, variant.result.steps, LEARNING_RATE, variant.name)
        variant.result.after = examination.examine(variant.model)
    tables.append(quality_table(variants, len(texts.sentences)))
    tables[-1].show()

    console.print("\n3. Measuring forward passes, all variants in turn.")
    measure(variants, rounds)
    tables.append(time_table(variants))
    tables[-1].show()

    results, image = folder / "results.json", folder / "sentences.png"
    write_results({variant.name: variant.result for variant in variants}, results)
    draw(by_bytes, variants, image)
    of_layers = folder / "weights.json"
    of_layers.write_text(
        json.dumps({asked: list(map(asdict, found)) for asked, found in errors.items()}, indent=2) + "\n"
    )
    console.print(f"Wrote {results}, {of_layers} (every layer) and {image}.")
    return tables, image
