"""Draws a report's ratios, a panel for each operation and contender, a bar for each row; and a family's curves."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from .results import TORCHOPS, ContenderResult, Report, RowResult
from .rows import Curves

WIN, LOSS, BOUND = "#4477aa", "#ee6677", "#aaaaaa"
CURVES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")
SHORT = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "forward + backward": "fwd+bwd"}
ROOM_FOR_TITLE = 4  # in bars

Panel = tuple[str, list[tuple[RowResult, ContenderResult]]]


def draw_ratios(report: Report, path: Path) -> None:
    columns = two_columns(panels(report))
    tallest = max(column_height(column) for column in columns)
    figure = Figure(figsize=(15, 1 + 0.2 * tallest), layout="constrained", dpi=75)
    figure.suptitle(
        f"torchops / {report.family}: time / torchops's time, whiskers are quartiles. "
        f"Blue: torchops is faster, red: slower, grey: a bound, not a rival.\n{machine(report)}",
        fontsize=11,
    )
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        heights = [len(bars) + ROOM_FOR_TITLE for _, bars in column]
        all_axes = part.subplots(len(column), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (title, bars) in zip(all_axes, column, strict=True):
            draw_panel(axes, title, bars)
    save(figure, path)


def draw_curves(report: Report, curves: Curves, path: Path) -> None:
    """A panel for each dtype (down) and direction (across)."""
    rows = report.on(curves)
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    directions = list(dict.fromkeys(row.direction for row in rows))
    colors = dict(zip(dict.fromkeys(name for row in rows for name in row.contenders), CURVES, strict=False))
    figure = Figure(figsize=(5.5 * len(directions), 1 + 3.5 * len(dtypes)), layout="constrained", dpi=75)
    figure.suptitle(f"{curves.title}\n{machine(report)}", fontsize=11)
    grid = figure.subplots(len(dtypes), len(directions), squeeze=False, sharex=True, sharey=True)
    for dtype, line in zip(dtypes, grid, strict=True):
        for direction, axes in zip(directions, line, strict=True):
            panel = [row for row in rows if (row.dtype, row.direction) == (dtype, direction)]
            draw_curve_panel(axes, panel, curves, colors)
            axes.set_title(f"{SHORT.get(dtype, dtype)}, {direction}", fontsize=10, loc="left")
    save(figure, path)


def draw_curve_panel(axes: Axes, rows: list[RowResult], curves: Curves, colors: dict[str, str]) -> None:
    rows = sorted(rows, key=lambda row: row.parameters[curves.parameter])
    for name, color in colors.items():
        if curves.shows == "ratio" and name == TORCHOPS:
            continue
        found = [(row.parameters[curves.parameter], row.contenders[name]) for row in rows if name in row.contenders]
        if not found:
            continue
        places, contenders = zip(*found, strict=True)
        values = [getattr(contender, curves.shows).median for contender in contenders]
        width = 2 if name == TORCHOPS else 1
        axes.plot(places, values, color=color, label=name, marker="o", markersize=4, linewidth=width)
    if curves.shows == "ratio":
        axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(curves.parameter, fontsize=9)
    axes.set_ylabel("seconds of a call" if curves.shows == "seconds" else "time / torchops's time", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)


def machine(report: Report) -> str:
    conditions = report.conditions
    name = conditions.get("gpu") or f"{conditions['cpu']}, threads: {conditions['threads']}"
    return f"{name}, torch {conditions['versions']['running with torch']}"


def save(figure: Figure, path: Path) -> None:
    """As a PNG with a palette, a third as large. The palette is given: one made from the image would be
    without colors that are rare in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(palette=palette(), dither=Image.Dither.NONE).save(path, optimize=True)


def palette() -> Image.Image:
    """The colors and what lies between each of them and white, for smooth edges."""
    colors = [to_rgb(name) for name in dict.fromkeys(("black", WIN, LOSS, BOUND, *CURVES))]
    shades = [1 - share * (1 - channel) for color in colors for share in (1, 0.75, 0.5, 0.25, 0) for channel in color]
    image = Image.new("P", (1, 1))
    image.putpalette([round(255 * channel) for channel in shades])
    return image


def panels(report: Report) -> list[Panel]:
    result = []
    for operation, rows in report.operations().items():
        for name in dict.fromkeys(name for row in rows for name, _ in row.others()):
            bars = [(row, row.contenders[name]) for row in rows if name in row.contenders]
            result.append((f"{operation}: {name} / torchops", bars))
    return result


def two_columns(panels: list[Panel]) -> list[list[Panel]]:
    """Each panel goes below the shorter column."""
    columns: list[list[Panel]] = [[], []]
    for panel in panels:
        min(columns, key=column_height).append(panel)
    return [column for column in columns if column]


def column_height(column: list[Panel]) -> int:
    return sum(len(bars) + ROOM_FOR_TITLE for _, bars in column)


def draw_panel(axes: Axes, title: str, bars: list[tuple[RowResult, ContenderResult]]) -> None:
    ratios = [contender.ratio for _, contender in bars]
    medians = [ratio.median for ratio in ratios]
    whiskers = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
    colors = [BOUND if c.is_bound else LOSS if c.is_loss else WIN for _, c in bars]
    drawn = axes.barh(range(len(bars)), medians, xerr=whiskers, color=colors, error_kw={"linewidth": 0.8})
    axes.bar_label(drawn, [f"{median:.2f}" for median in medians], fontsize=8, padding=3)
    axes.axvline(1, color="black", linewidth=1)
    for target in {contender.target for _, contender in bars if contender.target is not None}:
        axes.axvline(target, color="black", linewidth=1, linestyle=":", label=f"target {target:.2f}")
        axes.legend(fontsize=8, loc="lower right")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_yticks(range(len(bars)), [bar_label(row) for row, _ in bars], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def bar_label(row: RowResult) -> str:
    return "  ".join([row.shape, *(SHORT.get(word, word) for word in (row.dtype, row.direction))])
