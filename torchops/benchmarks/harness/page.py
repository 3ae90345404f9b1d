"""A report as a page of the documentation."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import tables
from .results import TORCHOPS, Report, RowResult
from .rows import Finding

BEGIN, END = "<!-- figures: python -m torchops bench -->", "<!-- end of figures -->"


def write(report: Report, findings: Sequence[Finding], images: Sequence[Path], path: Path) -> None:
    """The whole report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(whole(report, findings, images, path)))


def insert(report: Report, findings: Sequence[Finding], images: Sequence[Path], whole: Path, path: Path) -> bool:
    """Its targets and losses in short, images, findings for this page, how many rows failed, and links to the whole
    page and those of other machines, between the two marks of a page that has them."""
    text = path.read_text() if path.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        return False
    section = [f"{machine(report)}\n", *image_links(images, path), *target_count(report), *loss_summary(report)]
    for finding in findings:
        if finding.on_family_page:
            section += [f"{finding.title}:\n", *table(finding.header, finding.lines)]
    if report.failures:
        section.append(f"Rows that failed: {len(report.failures)}; the page of all rows says why.\n")
    others = sorted(page for page in whole.parent.glob(f"{report.family}-*.md") if page != whole)
    links = f"[All rows]({relative(whole, path)})"
    if others:
        links += ", and of other machines: " + ", ".join(f"[{page.stem}]({relative(page, path)})" for page in others)
    section.append(f"{links}.\n")
    path.write_text("\n".join([before + begin, "", *section, end + after]))
    return True


def whole(report: Report, findings: Sequence[Finding], images: Sequence[Path], path: Path) -> Iterator[str]:
    yield f"# {report.family}: figures\n"
    yield f"Written by `python -m torchops bench {report.family}`. {machine(report)}\n"
    yield from (f"{paragraph}\n" for paragraph in report.notes.splitlines())
    yield from image_links(images, path)
    yield "## Targets and losses\n"
    yield from target_table(report)
    yield from loss_table(report)
    for finding in findings:
        yield f"## {finding.title}\n"
        yield from table(finding.header, finding.lines)
    yield "## Time / torchops's time\n"
    yield "Above 1 torchops is faster. In brackets: milliseconds of a call, and MB that it allocates at its peak.\n"
    for operation, rows in report.operations().items():
        yield f"### {operation}\n"
        yield from operation_table(rows)
    missing = tables.missing(report)
    if missing:
        yield "## What is missing, and why\n"
        yield from (f"- {sentence}" for sentence in missing)
        yield ""


def machine(report: Report) -> str:
    conditions = report.conditions
    versions = conditions["versions"]
    where = conditions.get("gpu") or f"{conditions['cpu']}, {conditions['threads']} threads, {versions['CPU level']}"
    built = f"torch {versions['running with torch']}, {versions['compiler']}"
    return f"{where}; {built}; {conditions['date'][:10]}, commit {conditions['commit']}."


def image_links(images: Sequence[Path], path: Path) -> Iterator[str]:
    yield from (f"![{image.stem}]({relative(image, path)})\n" for image in images)


def target_table(report: Report) -> Iterator[str]:
    targets = [
        [target.row.label, target.what, target.wanted, target.reached, "met" if target.is_met else "**not met**"]
        for target in report.targets()
    ]
    if targets:
        yield from table(["row", "what", "target", "reached", ""], targets)


def target_count(report: Report) -> Iterator[str]:
    are_met = [target.is_met for target in report.targets()]
    if are_met:
        yield f"Targets met: {sum(are_met)} of {len(are_met)}.\n"


def loss_table(report: Report) -> Iterator[str]:
    yield "Where torchops loses:\n"
    losses = [[row.label, name, f"{loser.ratio.median:.2f}"] for row, name, loser in report.losses()]
    yield from table(["row", "faster", "its time / torchops's"], losses) if losses else [f"{tables.NO_LOSSES}\n"]


def loss_summary(report: Report) -> Iterator[str]:
    """A line for all rows in which the same rival competes."""
    yield "Where torchops loses:\n"
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in report.rows:
        for name, contender in row.others():
            if not contender.is_bound:
                key = (row.operation, f"{row.dtype}, {row.direction}", name)
                groups.setdefault(key, []).append(contender.ratio.median)
    lines = [
        [*key, f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        for key, ratios in groups.items()
        if min(ratios) < 1
    ]
    header = ["operation", "", "faster", "in rows", "its time / torchops's, all rows"]
    yield from table(header, lines) if lines else [f"{tables.NO_LOSSES}\n"]


def relative(target: Path, page: Path) -> str:
    return os.path.relpath(target, page.parent)


def operation_table(rows: Sequence[RowResult]) -> Iterator[str]:
    """A column for each contender of any row."""
    names = list(dict.fromkeys(name for row in rows for name in row.contenders))
    return table(
        ["shape", "dtype", "direction", *names],
        [[row.shape, row.dtype, row.direction, *(cell(row, name) for name in names)] for row in rows],
    )


def cell(row: RowResult, name: str) -> str:
    contender = row.contenders.get(name)
    if contender is None:
        return ""
    milliseconds = tables.three_digits(1e3 * contender.seconds.median)
    cost = f"({milliseconds} ms, {contender.peak_extra_bytes / 1e6:.1f} MB)"
    return cost if name == TORCHOPS else f"{contender.ratio.median:.2f} {cost}"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    yield from (f"| {' | '.join(line)} |" for line in body)
    yield ""
