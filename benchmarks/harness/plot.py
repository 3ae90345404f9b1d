"""Draws a report's ratios: a panel for each operation and contender, a bar for each row."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .results import ContenderResult, Report, RowResult

WIN, LOSS, BOUND = "#4477aa", "#ee6677", "#aaaaaa"
SHORT = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "forward + backward": "fwd+bwd"}
ROOM_FOR_TITLE = 4  # in bars

Panel = tuple[str, list[tuple[RowResult, ContenderResult]]]


def draw(report: Report, path: Path) -> None:
    columns = two_columns(panels(report))
    tallest = max(column_height(column) for column in columns)
    figure = Figure(figsize=(15, 1 + 0.2 * tallest), layout="constrained", dpi=75)
    conditions = report.conditions
    machine = conditions.get("gpu") or f"{conditions['cpu']}, threads: {conditions['threads']}"
    figure.suptitle(
        f"torchops / {report.family}: time / torchops's time, whiskers are quartiles. "
        f"Blue: torchops is faster, red: slower, grey: a bound, not a rival.\n"
        f"{machine}, torch {conditions['versions']['running with torch']}",
        fontsize=11,
    )
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        heights = [len(bars) + ROOM_FOR_TITLE for _, bars in column]
        all_axes = part.subplots(len(column), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (title, bars) in zip(all_axes, column, strict=True):
            draw_panel(axes, title, bars)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """As a PNG with a palette, a third as large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(12).save(path, optimize=True)


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
