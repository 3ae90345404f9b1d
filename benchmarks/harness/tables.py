"""A report in the terminal: ratios first, then times and memory, findings, targets, and where torchops loses."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .results import TORCHOPS, ContenderResult, Quartiles, Report, RowResult
from .rows import Finding

FILTER = "only rows like"
NO_LOSSES = "in none of these rows"


def show(report: Report, findings: Sequence[Finding], console: Console) -> None:
    console.rule(f"torchops / {report.family}")
    for name, value in report.conditions.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        console.print(f"{name}: {shown}", highlight=False, markup=False)
    console.rule("time / torchops's time (above 1 torchops is faster): median and quartiles")
    for operation, rows in report.operations().items():
        console.print(table(operation, rows, ratio_cell, without=TORCHOPS))
    console.rule("time of one call: median and quartiles; peak extra memory; on a GPU, what it launches")
    for operation, rows in report.operations().items():
        console.print(table(operation, rows, cost_cell))
    for finding in findings:
        console.print(finding_table(finding))
    console.rule("targets")
    console.print(target_table(report))
    for paragraph in (
        report.notes,
        f"Where torchops loses: {'; '.join(losses(report)) or NO_LOSSES}.",
        *missing(report),
    ):
        console.print(paragraph, highlight=False, markup=False)


def table(title: str, rows: list[RowResult], cell: Callable[[ContenderResult], Text], without: str = "") -> Table:
    """A column for each contender of any row."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row.contenders) if name != without]
    result = Table("shape", "dtype", "", title=title, title_justify="left", title_style="bold")
    for name in names:
        result.add_column(name, justify="right")
    for row in rows:
        cells = (cell(row.contenders[name]) if name in row.contenders else Text() for name in names)
        result.add_row(row.shape, row.dtype, row.direction, *cells)
    return result


def finding_table(finding: Finding) -> Table:
    result = Table(*finding.header, title=finding.title, title_justify="left", title_style="bold")
    for line in finding.lines:
        result.add_row(*line)
    return result


def target_table(report: Report) -> Table:
    result = Table("row", "what", "target", "reached", "")
    for target in report.targets():
        verdict = Text("met", "green") if target.is_met else Text("not met", "red")
        result.add_row(target.row.label, target.what, target.wanted, target.reached, verdict)
    return result


def ratio_cell(contender: ContenderResult) -> Text:
    ratio = contender.ratio
    style = "red" if contender.is_loss else "default" if contender.is_bound else "green"
    cell = Text(f"{ratio.median:.2f} [{ratio.lower:.2f} {ratio.upper:.2f}]", style)
    if contender.target is not None:
        verdict = ("not met", "red") if contender.misses_target else ("met", "green")
        cell.append(f" target {contender.target:.2f} ", "dim").append(*verdict)
    return cell


def cost_cell(contender: ContenderResult) -> Text:
    launches = "" if contender.launches is None else f"  {contender.launches} launches"
    return Text(f"{duration(contender.seconds)}  {contender.peak_extra_bytes / 1e6:.1f} MB{launches}")


def duration(seconds: Quartiles) -> str:
    unit, scale = ("ms", 1e3) if seconds.median >= 1e-3 else ("us", 1e6)
    lower, median, upper = (three_digits(scale * value) for value in (seconds.lower, seconds.median, seconds.upper))
    return f"{median} [{lower} {upper}] {unit}"


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def losses(report: Report) -> list[str]:
    return [
        f"{row.label}: {name} takes {contender.ratio.median:.2f} of its time"
        for row, name, contender in report.losses()
    ]


def missing(report: Report) -> list[str]:
    """Contenders and rows without figures."""
    absences = [
        f"Without {name}: {reason} ({labels[0]}{f'; and {len(labels) - 1} more rows' * (len(labels) > 1)})"
        for (name, reason), labels in report.absences().items()
    ]
    if FILTER in report.conditions:
        absences.append(f"Only rows like `{report.conditions[FILTER]}` were measured.")
    return absences + [f"FAILED: {label}: {reason}" for label, reason in report.failures.items()]
