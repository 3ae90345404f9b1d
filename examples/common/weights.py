"""Dense-sparse factors of weights, and the low-rank ones of as many bytes: a truncated SVD, the best of its kind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from rich.progress import track
from torch import Tensor

import torchops

from .page import Table
from .report import Panel, Point, console

BYTES_PER_NUMBER = 2  # bfloat16
ROWS_PER_GROUP = 16  # a bit for each in a mask of 16


@dataclass
class WeightError:
    """A weight in factors: sizes, bytes in bfloat16 with masks, and errors relative to its norm."""

    layer: str
    kind: str  # out x in
    dense_bytes: int
    packed_bytes: int
    basis_size: int
    nnz: int
    rank: int  # of the SVD of as many bytes
    factored: float
    svd: float
    seconds: float | None  # to factor it


class Spectra:
    """The singular values of weights [out, in], by name: what a truncated SVD leaves out is its error."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.squares = {name: torch.linalg.svdvals(weight.double()).square() for name, weight in weights.items()}

    def error(self, name: str, rank: int) -> float:
        squares = self.squares[name]
        return (squares[rank:].sum() / squares.sum()).sqrt().item()


def rank_of_bytes(num_bytes: int, out_features: int, in_features: int) -> int:
    """That of the two dense factors that fit into as many bytes."""
    return num_bytes // (BYTES_PER_NUMBER * (out_features + in_features))


def errors_by_bytes(
    report: torchops.nn.FactorizationReport, weights: Mapping[str, Tensor], spectra: Spectra
) -> list[WeightError]:
    """What became of the layers of a bfloat16 model."""
    errors = []
    for layer in report.layers:
        shape = weights[layer.name].shape
        rank = rank_of_bytes(layer.packed_bytes, *shape)
        errors.append(
            WeightError(
                layer.name,
                kind_of(shape),
                layer.dense_bytes,
                layer.packed_bytes,
                layer.basis_size,
                layer.nnz,
                rank,
                factored=layer.error / layer.norm,
                svd=spectra.error(layer.name, rank),
                seconds=None,
            )
        )
    return errors


def errors_by_numbers(weights: Mapping[str, Tensor], spectra: Spectra, ratio: float) -> list[WeightError]:
    """Factors the weights alone, in float32, with sizes as the paper counts them: the numbers of a dense weight for
    one of its factors, positions free, and twice as many basis vectors as a row combines."""
    errors = []
    for name, weight in track(
        weights.items(), description=f"{f'factoring, 1/{ratio:g} of the numbers':36}", console=console
    ):
        matrix = weight if weight.shape[0] >= weight.shape[1] else weight.T.contiguous()
        rows, cols = matrix.shape
        nnz = int(rows * cols / ratio / (2 * cols + rows))
        basis_size = 2 * nnz
        start = perf_counter()
        basis, values, indices = torchops.stf_factorize(matrix, basis_size, nnz)
        seconds = perf_counter() - start
        difference = matrix - torchops.reference.stf.dense(basis, values, indices)
        numbers = basis_size * cols + nnz * rows
        packed_bytes = BYTES_PER_NUMBER * numbers + 2 * -(-rows // ROWS_PER_GROUP) * basis_size
        rank = rank_of_bytes(packed_bytes, rows, cols)
        errors.append(
            WeightError(
                name,
                kind_of(weight.shape),
                BYTES_PER_NUMBER * weight.numel(),
                packed_bytes,
                basis_size,
                nnz,
                rank,
                factored=(difference.norm() / matrix.norm()).item(),
                svd=spectra.error(name, rank),
                seconds=seconds,
            )
        )
    return errors


def kind_of(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def by_kind(errors: Sequence[WeightError]) -> dict[str, list[WeightError]]:
    kinds: dict[str, list[WeightError]] = {}
    for error in errors:
        kinds.setdefault(error.kind, []).append(error)
    return kinds


def mean(errors: Sequence[WeightError], value: Callable[[WeightError], float]) -> float:
    return sum(map(value, errors)) / len(errors)


def error_table(errors: Mapping[str, Sequence[WeightError]], remark: str = "") -> Table:
    """A row for every kind of layer and size; ``errors`` by what was asked for."""
    columns = ["out x in", "asked for", "bytes", "K", "nnz", "rank", "error", "SVD", "below SVD"]
    is_timed = any(error.seconds is not None for of_all in errors.values() for error in of_all)
    rows = []
    for asked, of_all in errors.items():
        for kind, of_kind in by_kind(of_all).items():
            first = of_kind[0]
            times = [error.seconds for error in of_kind if error.seconds is not None]
            row = [
                kind,
                asked,
                f"{first.dense_bytes / first.packed_bytes:.2f}x",
                f"{first.basis_size}",
                f"{first.nnz}",
                f"{first.rank}",
                f"{mean(of_kind, lambda error: error.factored):.3f}",
                f"{mean(of_kind, lambda error: error.svd):.3f}",
                f"{sum(error.factored < error.svd for error in of_kind)} of {len(of_kind)}",
            ]
            if is_timed:
                row.append(f"{sum(times) / len(times):.2f}" if times else "")
            rows.append(row)
    return Table(
        "Weights",
        "Error relative to the norm of the weight, a mean over layers, beside that of a truncated SVD whose two dense "
        f"factors take as many bytes. Bytes are those of bfloat16, masks included.{remark}",
        columns + ["s per layer"] * is_timed,
        rows,
    )


def error_panel(errors: Mapping[float, Sequence[WeightError]]) -> Panel:
    """Of a figure: errors over the compression in bytes."""
    points = [
        Point(kind + suffix, "", compression, mean(of_kind, value))
        for compression, of_all in errors.items()
        for kind, of_kind in by_kind(of_all).items()
        for suffix, value in (("", lambda error: error.factored), (", SVD", lambda error: error.svd))
    ]
    title = "weights, by kind of layer (out x in)"
    return Panel(title, "compression in bytes", "relative error", points, x_ticks=list(errors))
