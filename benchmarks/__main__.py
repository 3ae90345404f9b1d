"""Measures torchops against its rivals: python -m benchmarks FAMILY.

A complete run writes benchmarks/results/FAMILY-DEVICE-PROCESSOR.json, a page of it in docs/figures, the
page's plots in docs/images, and the marked section of docs/FAMILY.md. A partial one (--quick, --filter,
--dtype, --threads) only prints, unless --output names a file. A row that fails does not stop the others;
the exit status then is 1.
"""

import argparse
import dataclasses
import importlib
import pkgutil
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .harness import Curves, Finding, Options, Report, Row, machine, page, tables
from .harness.measure import QUICK, THOROUGH, in_one_line, measure

PACKAGE = Path(__file__).resolve().parent
RESULTS = PACKAGE / "results"
DOCS = machine.REPOSITORY / "docs"
IMAGES = DOCS / "images"
PAGES = DOCS / "figures"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "float32")}


def main() -> None:
    arguments = parse_arguments()
    # A terminal has a width of its own; a file or a pipe gets enough for the tables.
    console = Console(width=None if sys.stdout.isatty() else 180)
    if arguments.publish:
        for path in arguments.publish:
            publish(Report.load(path), path, console)
        return

    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads or machine.num_cores())
    report = run(arguments, device, console)
    tables.show(report, findings(report), console)
    partial = arguments.quick or arguments.filter or arguments.dtype or arguments.threads
    path = RESULTS / f"{report.family}-{device.type}-{machine.slug(device)}.json"
    if report.rows and (arguments.output or not partial):
        path = arguments.output or path
        report.save(path)
        console.print(f"Written: {path}")
        if not arguments.no_plot:
            publish(report, path, console)
    sys.exit(1 if report.failures else 0)


def parse_arguments() -> argparse.Namespace:
    families = [module.name for module in pkgutil.iter_modules([str(PACKAGE)]) if not module.ispkg]
    families.remove("__main__")
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("family", nargs="?", choices=families, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="a first look: few rows, few samples")
    parser.add_argument("--full", action="store_true", help="also the rows that need much time or memory")
    parser.add_argument("--filter", metavar="REGEX", help='only rows like "merge_tokens, B=1 .*, bfloat16, forward"')
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help=f"default: {DEFAULT_DTYPES}")
    parser.add_argument("--threads", type=int, help="default: one for each core")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the figures there")
    parser.add_argument("--no-plot", action="store_true", help="write the JSON only")
    parser.add_argument("--list", action="store_true", help="print the rows and how long they take, and no more")
    parser.add_argument(
        "--publish", nargs="+", type=Path, metavar="JSON", help="write pages and plots of earlier runs, and no more"
    )
    arguments = parser.parse_args()
    if not arguments.family and not arguments.publish:
        parser.error(f"name a family: {', '.join(families)}")
    return arguments


def run(arguments: argparse.Namespace, device: torch.device, console: Console) -> Report:
    family = family_module(arguments.family)
    dtypes = [DTYPES[name] for name in arguments.dtype or DEFAULT_DTYPES[device.type]]
    effort = QUICK if arguments.quick else THOROUGH
    conditions = {**machine.describe(device), "effort": dataclasses.asdict(effort)}
    wanted = re.compile(arguments.filter or "")
    rows: list[Row] = [
        row
        for row in family.rows(Options(device, dtypes, quick=arguments.quick, full=arguments.full))
        if wanted.search(row.label)
    ]
    if not rows:
        sys.exit(f"No row's label matches {arguments.filter}.")
    expected = [effort.expected_seconds(row) for row in rows]
    if arguments.list:
        for row, seconds in zip(rows, expected, strict=True):
            console.print(f"{seconds:5.0f} s  {row.label}", highlight=False, markup=False)
    console.print(f"{len(rows)} rows: about {sum(expected) / 60:.0f} minutes on two cores with nothing else to do")
    if arguments.list:
        sys.exit()
    shuffler = random.Random(0)
    other_load = machine.OtherLoad()
    results, failures = [], {}
    told: set[tuple[str, str]] = set()  # reasons are printed once
    columns = (BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(expected))
        for row, seconds in zip(rows, expected, strict=True):
            progress.update(task, description=row.label)
            try:
                results.append(measure(row, device, effort, shuffler))
                for absence in results[-1].absent.items() - told:
                    console.print(f"{row.label}: without {': '.join(absence)}", highlight=False, markup=False)
                    told.add(absence)
            except Exception as error:  # the other rows are still worth having
                failures[row.label] = in_one_line(error)
                console.print(f"FAILED: {row.label}: {failures[row.label]}", highlight=False, markup=False)
            progress.advance(task, seconds)
    conditions["share of the cores used by others meanwhile"] = other_load.share()
    if arguments.filter:
        conditions[tables.FILTER] = arguments.filter
    return Report(arguments.family, conditions, family.NOTES, results, failures)


def publish(report: Report, path: Path, console: Console) -> None:
    """A page and plots: in the documentation if the figures are in benchmarks/results, else beside them."""
    # Measuring needs no matplotlib.
    from .harness import heat_map, plot

    published = path.resolve().parent == RESULTS
    stem = IMAGES / f"benchmark-{path.stem}" if published else path.with_suffix("")
    images = []
    for curves in family_curves(report):
        if report.on(curves):
            images.append(stem.with_name(f"{stem.name}-{curves.name}.png"))
            plot.draw_curves(report, curves, images[-1])
    images.append(stem.with_name(f"{stem.name}.png"))
    heat_map.draw_ratios(report, images[-1])
    text = PAGES / f"{path.stem}.md" if published else path.with_suffix(".md")
    page.write(report, findings(report), images, text)
    written = [text, *images]
    family_page = DOCS / f"{report.family}.md"
    if published and page.insert(report, findings(report), images[:-1], text, family_page):
        written.append(family_page)
    console.print(f"Written: {', '.join(map(str, written))}")


def family_module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def family_curves(report: Report) -> Sequence[Curves]:
    return getattr(family_module(report.family), "CURVES", ())


def findings(report: Report) -> Sequence[Finding]:
    module = family_module(report.family)
    return module.findings(report) if hasattr(module, "findings") else ()


if __name__ == "__main__":
    main()
