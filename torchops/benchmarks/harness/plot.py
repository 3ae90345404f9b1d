"""Draws a family's curves, and saves images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from .results import TORCHOPS, Report, RowResult
from .rows import Curves

WIN, LOSS, BOUND = "#4477aa", "#ee6677", "#aaaaaa"
CURVES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")
SHORT = {
    "float32": "fp32",
    "float64": "fp64",
    "bfloat16": "bf16",
    "float16": "fp16",
    "forward": "fwd",
    "forward + backward": "fwd+bwd",
}

Shade = tuple[float, float, float, float]


def draw_curves(report: Report, curves: Curves, path: Path) -> None:
    """A panel for each dtype (down) and direction (across); where there is but one, curves are named at their ends."""
    rows = report.on(curves)
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    directions = list(dict.fromkeys(row.direction for row in rows))
    colors = dict(zip(dict.fromkeys(name for row in rows for name in row.contenders), CURVES, strict=False))
    is_single = len(dtypes) == len(directions) == 1
    size = (8.5, 4.2) if is_single else (5.5 * len(directions), 1 + 3.5 * len(dtypes))
    figure = Figure(figsize=size, layout="constrained", dpi=100 if is_single else 75)
    figure.suptitle(f"{curves.title}\n{machine(report)}", fontsize=11)
    grid = figure.subplots(len(dtypes), len(directions), squeeze=False, sharex=True, sharey=True)
    for dtype, line in zip(dtypes, grid, strict=True):
        for direction, axes in zip(directions, line, strict=True):
            panel = [row for row in rows if (row.dtype, row.direction) == (dtype, direction)]
            draw_curve_panel(axes, panel, curves, colors)
            axes.set_title(f"{SHORT.get(dtype, dtype)}, {direction}", fontsize=10, loc="left")
            if is_single:
                name_at_ends(axes)
            else:
                axes.legend(fontsize=8)
    save(figure, path)


def name_at_ends(axes: Axes) -> None:
    for curve in axes.lines:
        place, value = np.asarray(curve.get_xydata())[-1]
        axes.annotate(
            str(curve.get_label()),
            (place, value),
            (7, 0),
            textcoords="offset points",
            color=curve.get_color(),
            fontsize=9,
            va="center",
        )
    axes.margins(x=0.02)
    axes.set_xlim(right=axes.get_xlim()[1] * 2.5)


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


def machine(report: Report) -> str:
    conditions = report.conditions
    name = conditions.get("gpu") or f"{conditions['cpu']}, threads: {conditions['threads']}"
    return f"{name}, torch {conditions['versions']['running with torch']}"


def save(figure: Figure, path: Path, shades: Sequence[Shade] = ()) -> None:
    """As a PNG with a palette, a third as large. The palette is given: one made from the image would be
    without colors that are rare in it.

    Args:
        shades: colors besides those of curves and marks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(palette=palette(shades), dither=Image.Dither.NONE).save(path, optimize=True)


def palette(shades: Sequence[Shade]) -> Image.Image:
    """The colors and what lies between each of them and white, for smooth edges; and the shades."""
    colors = [to_rgb(name) for name in dict.fromkeys(("black", WIN, LOSS, BOUND, *CURVES))]
    tints = [1 - share * (1 - channel) for color in colors for share in (1, 0.75, 0.5, 0.25, 0) for channel in color]
    image = Image.new("P", (1, 1))
    image.putpalette([round(255 * channel) for channel in [*tints, *(c for shade in shades for c in to_rgb(shade))]])
    return image
