"""Measures torchops against its rivals: python -m benchmarks FAMILY.

A complete run writes benchmarks/results/FAMILY-DEVICE-PROCESSOR.json and a plot of it in docs/images. A
partial one (--quick, --filter, --dtype, --threads) only prints, unless --output names a file.
"""

import argparse
import dataclasses
import importlib
import pkgutil
import random
import re
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .harness import Options, Row, machine, tables
from .harness.measure import QUICK, THOROUGH, measure
from .harness.results import Report

PACKAGE = Path(__file__).resolve().parent
RESULTS = PACKAGE / "results"
IMAGES = machine.REPOSITORY / "docs" / "images"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "float32")}


def main() -> None:
    arguments = parse_arguments()
    # A terminal has a width of its own; a file or a pipe gets enough for the tables.
    console = Console(width=None if sys.stdout.isatty() else 180)
    if arguments.plot:
        for path in arguments.plot:
            plot(Report.load(path), path, console)
        return

    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads or machine.num_cores())
    report = run(arguments, device, console)
    tables.show(report, console)
    partial = arguments.quick or arguments.filter or arguments.dtype or arguments.threads
    path = RESULTS / f"{report.family}-{device.type}-{machine.slug(device)}.json"
    if arguments.output or not partial:
        path = arguments.output or path
        report.save(path)
        console.print(f"Written: {path}")
        if not arguments.no_plot:
            plot(report, path, console)


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
    parser.add_argument("--no-plot", action="store_true", help="write figures without drawing them")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="JSON", help="draw figures written before, and no more")
    arguments = parser.parse_args()
    if not arguments.family and not arguments.plot:
        parser.error(f"name a family: {', '.join(families)}")
    return arguments


def run(arguments: argparse.Namespace, device: torch.device, console: Console) -> Report:
    family = importlib.import_module(f"benchmarks.{arguments.family}")
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
    shuffler = random.Random(0)
    other_load = machine.OtherLoad()
    results = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows))
        for row in rows:
            progress.update(task, description=row.label)
            results.append(measure(row, device, effort, shuffler))
            progress.advance(task)
    conditions["share of the cores used by others meanwhile"] = other_load.share()
    return Report(arguments.family, conditions, family.NOTES, results)


def plot(report: Report, path: Path, console: Console) -> None:
    # Measuring needs no matplotlib.
    from .harness.plot import draw

    published = path.resolve().parent == RESULTS
    image = IMAGES / f"benchmark-{path.stem}.png" if published else path.with_suffix(".png")
    draw(report, image)
    console.print(f"Drawn: {image}")


if __name__ == "__main__":
    main()
