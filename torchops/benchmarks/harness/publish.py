"""Pages and plots of reports."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from . import machine, page
from .results import Report
from .rows import Curves, Finding

DOCS = machine.REPOSITORY / "docs"
RECORDS = DOCS / "figures"  # of published runs, beside their pages
IMAGES = DOCS / "images"


def publish(report: Report, family: ModuleType, record: Path) -> list[Path]:
    """A page beside a report's record, and plots: where the record is one of the documentation, among its images, and
    the marked section of the family's page has them, too. Returns what was written."""
    # Measuring needs no matplotlib.
    from . import heat_map, plot

    published = record.resolve().parent == RECORDS
    stem = IMAGES / f"benchmark-{record.stem}" if published else record.with_suffix("")
    images = []
    for curves in curves_of(family):
        if report.on(curves):
            images.append(stem.with_name(f"{stem.name}-{curves.name}.png"))
            plot.draw_curves(report, curves, images[-1])
    images.append(stem.with_name(f"{stem.name}.png"))
    heat_map.draw_ratios(report, images[-1])
    text = record.with_suffix(".md")
    page.write(report, findings_of(family, report), images, text)
    written = [text, *images]
    family_page = DOCS / f"{report.family}.md"
    if published and page.insert(report, findings_of(family, report), images[:-1], text, family_page):
        written.append(family_page)
    return written


def curves_of(family: ModuleType) -> Sequence[Curves]:
    return getattr(family, "CURVES", ())


def findings_of(family: ModuleType, report: Report) -> Sequence[Finding]:
    return family.findings(report) if hasattr(family, "findings") else ()
