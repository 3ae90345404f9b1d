"""A report in the terminal: times, ratios and memory, findings, targets, and where torchops loses."""

from collections.abc import Sequence

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
    console.rule("ratio of times (above 1: torchops is faster), time of a call, memory")
    width = max((len(name) for row in report.rows for name in row.contenders), default=0)
    for operation, rows in report.operations().items():
        console.print(Text(operation, "bold"))
        for row in rows:
            console.print(f"{row.shape}, {row.dtype}, {row.direction}", highlight=False, markup=False)
            console.print(row_table(row, width))
    for finding in findings:
        console.print(finding_table(finding))
    if any(report.targets()):
        console.rule("targets")
        console.print(target_table(report))
    for paragraph in (
        report.notes,
        f"Where torchops loses: {'; '.join(losses(report)) or NO_LOSSES}.",
        *missing(report),
    ):
        console.print(paragraph, highlight=False, markup=False)


def row_table(row: RowResult, width: int) -> Table:
    """A line for each contender, whose name takes so many columns: medians, and quartiles in brackets."""
    result = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    result.add_column(min_width=width)
    result.add_column(justify="right", min_width=len("1.23 [1.23 1.23]"))
    result.add_column(justify="right", min_width=len("1.23 [1.23 1.23] ms"))
    result.add_column(justify="right")
    for name, contender in row.contenders.items():
        memory = f"{contender.peak_extra_bytes / 1e6:.1f} MB"
        launches = "" if contender.launches is None else f", {contender.launches} launches"
        ratio = Text() if name == TORCHOPS else ratio_of(contender)
        result.add_row(Text(name), ratio, Text(duration(contender.seconds)), Text(memory + launches))
    return result


def ratio_of(contender: ContenderResult) -> Text:
    ratio = contender.ratio
    style = "red" if contender.is_loss else "default" if contender.is_bound else "green"
    return Text(f"{three_digits(ratio.median)} [{three_digits(ratio.lower)} {three_digits(ratio.upper)}]", style)


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
