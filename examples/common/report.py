"""What the user sees: plain sentences, tables and plots."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import torchops

from .distributed import IS_MAIN

console = Console(quiet=not IS_MAIN, highlight=False)
if not console.is_terminal:
    console.width = 140


def print_table(title: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column is text and whose others are numbers."""
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Writes what was found out about each variant, a dataclass by name, and on which machine, as JSON."""
    machine = torchops.utils.config() | {"threads": torch.get_num_threads()}
    variants = {name: asdict(result) for name, result in results.items()}
    path.write_text(json.dumps({"machine": machine, "variants": variants}, indent=2) + "\n")


@dataclass
class Point:
    """One variant in a panel. The points of a series have one colour in all panels and are joined by a line."""

    series: str
    label: str
    x: float
    y: float


@dataclass
class Panel:
    """One diagram of a figure.

    Args:
        title, x_label, y_label: what stands around it.
        points: what it shows.
        band: a range of y that is shaded, such as a standard error around what the others compare with.
        x_ticks: the values of x to name, at equal ratios; None for even ticks.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[Point]
    band: tuple[float, float] | None = None
    x_ticks: Sequence[float] | None = None


# Ten strong ones, and their light companions where there are more series.
COLORS = [*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2]]


def plot(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Draws panels side by side into an image file."""
    figure = Figure(figsize=(5.2 * len(panels), 5.2))
    axes = figure.subplots(1, len(panels), squeeze=False)
    all_series = list(dict.fromkeys(point.series for panel in panels for point in panel.points))
    lines = {}
    for panel, axis in zip(panels, axes[0], strict=True):
        if panel.band is not None:
            axis.axhspan(*panel.band, color="grey", alpha=0.15)
        for index, series in enumerate(all_series):
            points = [point for point in panel.points if point.series == series]
            if not points:
                continue
            color = COLORS[index % len(COLORS)]
            (lines[series],) = axis.plot(
                [point.x for point in points], [point.y for point in points], "o-", color=color
            )
            for point in points:
                axis.annotate(
                    point.label,
                    (point.x, point.y),
                    (0, 6 if index % 2 else -14),  # neighbours in the list above and below, so that both can be read
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=color,
                )
        axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.x_ticks is not None:
            axis.set_xscale("log")
            axis.set_xticks(panel.x_ticks, [f"{tick:g}" for tick in panel.x_ticks])
            axis.minorticks_off()
        axis.margins(0.08)
        axis.grid(alpha=0.3)
    handles, columns = [lines[series] for series in all_series], 7
    figure.legend(handles, all_series, loc="lower center", ncols=columns, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.05 * math.ceil(len(handles) / columns), 1, 1))
    figure.savefig(path, dpi=130)
