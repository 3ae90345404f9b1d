"""Draws a report's ratios as heat maps, one for each operation: shapes down; contenders, dtypes, directions across."""

import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .plot import BOUND, LOSS, SHORT, WIN, machine, save
from .results import ContenderResult, Report, RowResult

# Inches.
CELL_WIDTH, CELL_HEIGHT = 0.5, 0.21
CHARACTER = 0.07
TITLE = 0.6

HEADER = 3  # in cells
FURTHEST = 2.5  # from 1, in powers of two: there colors end
COLORS = LinearSegmentedColormap.from_list("ratios", [LOSS, "white", WIN])

Column = tuple[str, str, str]  # contender, dtype, direction


def draw_ratios(report: Report, path: Path) -> None:
    operations = report.operations()
    columns = {name: columns_of(rows) for name, rows in operations.items()}
    shapes = {name: list(dict.fromkeys(row.shape for row in rows)) for name, rows in operations.items()}
    longest = max(len(shape) for some in shapes.values() for shape in some)
    left = CHARACTER * longest + 0.15
    width = left + CELL_WIDTH * max(len(some) for some in columns.values()) + 0.1
    heights = {name: CELL_HEIGHT * (HEADER + len(some)) for name, some in shapes.items()}
    height = TITLE + sum(heights.values()) + CELL_HEIGHT * len(heights)
    figure = Figure(figsize=(width, height), dpi=90)
    told = (
        (f"torchops / {report.family}: time / torchops's time", 0.12, {"fontsize": 11, "weight": "bold"}),
        (
            f"Blue: torchops is faster, red: slower, grey: a bound, not a rival. {machine(report)}",
            0.36,
            {"fontsize": 8},
        ),
    )
    for text, below, style in told:
        figure.text(0.1 / width, 1 - below / height, text, va="top", **style)
    top = height - TITLE
    for name, rows in operations.items():
        top -= heights[name]
        place = (left / width, top / height, CELL_WIDTH * len(columns[name]) / width, heights[name] / height)
        axes = figure.add_axes(place)
        axes.set_xlim(0, len(columns[name]))
        axes.set_ylim(len(shapes[name]), -HEADER)
        axes.axis("off")
        title = "\n".join(textwrap.wrap(name, longest - 6))
        axes.text(-0.2, -1.5, title, fontsize=9, weight="bold", ha="right", va="center")
        draw_headers(axes, columns[name], shapes[name])
        for row in rows:
            for contender, result in row.others():
                column = columns[name].index((contender, row.dtype, row.direction))
                draw_cell(axes, column, shapes[name].index(row.shape), result)
        top -= CELL_HEIGHT
    # Without those that the background could be taken for.
    save(figure, path, [shade for shade in COLORS(np.linspace(0, 1, 65)) if min(shade) < 0.95])


def columns_of(rows: list[RowResult]) -> list[Column]:
    found = {(name, row.dtype, row.direction) for row in rows for name, _ in row.others()}
    names = dict.fromkeys(name for row in rows for name, _ in row.others())
    kinds = dict.fromkeys((row.dtype, row.direction) for row in rows)
    return [(name, *kind) for name in names for kind in kinds if (name, *kind) in found]


def draw_headers(axes: Axes, columns: list[Column], shapes: list[str]) -> None:
    for place, (_, dtype, direction) in enumerate(columns):
        kind = f"{SHORT.get(dtype, dtype)}\n{SHORT.get(direction, direction)}"
        axes.text(place + 0.5, -0.15, kind, fontsize=6, ha="center", va="bottom", linespacing=0.95)
    for name in dict.fromkeys(name for name, _, _ in columns):
        places = [place for place, column in enumerate(columns) if column[0] == name]
        axes.plot([places[0] + 0.06, places[-1] + 0.94], [-1.75, -1.75], color="black", linewidth=0.6)
        wrapped = "\n".join(textwrap.wrap(name, max(12, 9 * len(places))))
        middle = (places[0] + places[-1] + 1) / 2
        axes.text(middle, -1.85, wrapped, fontsize=7.5, ha="center", va="bottom")
    for place, shape in enumerate(shapes):
        axes.text(-0.2, place + 0.5, shape, fontsize=7.5, ha="right", va="center")


def draw_cell(axes: Axes, column: int, row: int, contender: ContenderResult) -> None:
    ratio = contender.ratio.median
    share = min(max(math.log2(ratio) / FURTHEST, -1), 1)
    color = BOUND if contender.is_bound else COLORS(0.5 + share / 2)
    axes.add_patch(Rectangle((column + 0.02, row + 0.04), 0.96, 0.92, color=color, linewidth=0))
    axes.text(
        column + 0.5,
        row + 0.52,
        f"{ratio:.2f}" if ratio < 0.995 else f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}",
        fontsize=7,
        ha="center",
        va="center",
        weight="bold" if contender.is_loss else "normal",
        color="white" if share > 0.9 and not contender.is_bound else "black",
    )
