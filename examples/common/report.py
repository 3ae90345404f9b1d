"""What the user sees: plain sentences, tables and plots."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from adjustText import adjust_text
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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
PANELS_ACROSS = 2  # what a page has room for
NAMES_ACROSS = 4


def plot(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Draws panels into an image file, two in a line."""
    all_series = list(dict.fromkeys(point.series for panel in panels for point in panel.points))
    colors = {series: COLORS[index % len(COLORS)] for index, series in enumerate(all_series)}
    lines, names = math.ceil(len(panels) / PANELS_ACROSS), math.ceil(len(all_series) / NAMES_ACROSS)
    figure = Figure(figsize=(11, 4.5 * lines + 0.25 * names + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, PANELS_ACROSS, squeeze=False).flatten()
    for panel, axis in zip(panels, grid, strict=False):
        draw(panel, axis, colors)
    for unused in grid[len(panels) :]:
        unused.remove()
    handles = [Line2D([], [], color=colors[series], marker="o") for series in all_series]
    figure.legend(handles, all_series, loc="outside lower center", ncols=NAMES_ACROSS, frameon=False)
    figure.suptitle(title)
    figure.draw_without_rendering()  # where panels stand is known from here on, and labels can make room
    for axis in grid[: len(panels)]:
        labels = list(axis.texts)
        if labels:
            places = [point for curve in axis.lines for point in curve.get_xydata()]
            adjust_text(labels, *zip(*places, strict=True), ax=axis, expand=(1.1, 1.3), ensure_inside_axes=True)
    figure.savefig(path, dpi=110)


def draw(panel: Panel, axis: Axes, colors: Mapping[str, Any]) -> None:
    if panel.band is not None:
        axis.axhspan(*panel.band, color="grey", alpha=0.15)
    for series in dict.fromkeys(point.series for point in panel.points):
        points = [point for point in panel.points if point.series == series]
        axis.plot([point.x for point in points], [point.y for point in points], "o-", color=colors[series])
        for point in points:
            if point.label:
                axis.text(point.x, point.y, point.label, fontsize=8, color=colors[series])
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.x_ticks is not None:
        axis.set_xscale("log")
        axis.set_xticks(panel.x_ticks, [f"{tick:g}" for tick in panel.x_ticks])
        axis.minorticks_off()
    axis.margins(0.1)
    axis.grid(alpha=0.3)
