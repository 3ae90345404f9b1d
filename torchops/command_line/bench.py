"""``python -m torchops bench``."""

import argparse
import importlib
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import benchmarks
from ..benchmarks.harness import Options, Report, Row, machine, rows_of
from ..benchmarks.harness.measure import QUICK, THOROUGH, Effort
from .errors import CommandError, need, user_errors

HELP = "measure torchops against its rivals in plain PyTorch"
DESCRIPTION = """\
Measures torchops against its rivals in plain PyTorch, interleaved in one
process, and prints ratios of their times. Results are compared before the
timing. A row that fails does not stop the others; the exit status then is 1.

In a checkout a complete run also writes a record of the machine and its page,
docs/figures/FAMILY-DEVICE-PROCESSOR.json and .md, the page's plots in
docs/images, and the marked section of docs/FAMILY.md. A partial one (--shape,
--quick, --filter, --dtype, --threads), or one of an installed package, prints
only, unless --output names a file."""
EXAMPLES = """\
examples:
  python -m torchops bench tokens --quick
  python -m torchops bench stf --list
  python -m torchops bench span_attention --shape n=4096 W=512 H=8 D=64"""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "float32")}
FAMILIES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg)
MAY_BE_ZERO = ("transpose", "warm", "protected")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="?", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument(
        "--shape",
        nargs="+",
        action="append",
        metavar="NAME=SIZE",
        help="measure these sizes in place of the published ones: every operation that has all of them, with "
        "defaults for its others (--list has the names); may be given several times",
    )
    parser.add_argument("--quick", action="store_true", help="a first look: few rows, few samples")
    parser.add_argument("--full", action="store_true", help="also the rows that need much time or memory")
    parser.add_argument("--filter", metavar="REGEX", help='only rows like "merge_tokens, B=1 .*, bfloat16, forward"')
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES))
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core")
    parser.add_argument("--device", choices=DEFAULT_DTYPES, default="cpu", help="default: cpu")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the figures there, page and plots beside")
    parser.add_argument("--no-plot", action="store_true", help="write the JSON only")
    parser.add_argument("--list", action="store_true", help="print the rows, their duration and sizes, and no more")
    parser.add_argument(
        "--publish", nargs="+", type=Path, metavar="JSON", help="write pages and plots of earlier runs, and no more"
    )


def run(arguments: argparse.Namespace) -> int:
    need("rich", "bench")
    if arguments.publish:
        publish(arguments.publish)
        return 0
    check(arguments)
    family, device = family_of(arguments.family), torch.device(arguments.device)
    dtypes = [DTYPES[name] for name in arguments.dtype or DEFAULT_DTYPES[device.type]]
    rows = chosen_rows(family, Options(device, dtypes, arguments.quick, arguments.full), arguments)
    if arguments.list:
        list_rows(family, rows, arguments)
        return 0
    record = record_of(arguments, device)
    if record and not arguments.no_plot:
        need("matplotlib", "bench")

    from rich.console import Console

    from ..benchmarks.harness import tables
    from ..benchmarks.harness.publish import findings_of
    from ..benchmarks.harness.run import measured

    console = Console()
    torch.set_num_threads(arguments.threads or machine.num_cores())
    asked = {tables.FILTER: arguments.filter} if arguments.filter else {}
    if arguments.shape:
        asked["only sizes"] = "; ".join(" ".join(shape) for shape in arguments.shape)
    report = measured(family, rows, device, effort(arguments), asked, console)
    # Findings are of the published rows.
    tables.show(report, () if arguments.shape else findings_of(family, report), console)
    if report.rows and record:
        report.save(record)
        console.print(f"Written: {record}")
        if not arguments.no_plot:
            publish([record])
    return 1 if report.failures else 0


def check(arguments: argparse.Namespace) -> None:
    if not arguments.family:
        raise CommandError(f"name a family: {', '.join(FAMILIES)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no CUDA device")
    if arguments.threads is not None and arguments.threads < 1:
        raise CommandError(f"--threads: expected 1 or more, got {arguments.threads}")
    if arguments.output and arguments.output.suffix != ".json":
        raise CommandError(f"--output: expected a file *.json, got {arguments.output}")


def chosen_rows(family: ModuleType, options: Options, arguments: argparse.Namespace) -> list[Row]:
    try:
        wanted = re.compile(arguments.filter or "")
    except re.error as error:
        raise CommandError(f"--filter: {arguments.filter!r} is no regular expression: {error}") from error
    rows: list[Row] = []
    for shape in arguments.shape or ():
        sizes = dict(map(size_of, shape))
        try:
            rows += rows_of(family.OPERATIONS, sizes, options)
        except (ValueError, ZeroDivisionError) as error:
            command = f"python -m torchops bench {arguments.family} --list"
            raise CommandError(f"--shape {' '.join(shape)}: {error} ({command} prints names of sizes)") from error
    if not arguments.shape:
        rows = list(family.rows(options))
    found = [row for row in rows if wanted.search(row.label)]
    if not found:
        raise CommandError(f"--filter: no row's label matches {arguments.filter!r}")
    return found


def size_of(word: str) -> tuple[str, Any]:
    name, _, value = word.partition("=")
    try:
        size = float(value)
    except ValueError:
        size = -1.0
    if not name or not (size > 0 or (size == 0 and name in MAY_BE_ZERO)) or size == float("inf"):
        raise CommandError(f"--shape: expected NAME=SIZE with a size above 0, got {word!r}")
    return name, int(size) if size.is_integer() else size


def list_rows(family: ModuleType, rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    expected = [effort(arguments).expected_seconds(row) for row in rows]
    for row, seconds in zip(rows, expected, strict=True):
        print(f"{seconds:5.0f} s  {row.label}")
    print(f"{len(rows)} rows: about {sum(expected) / 60:.0f} minutes on two cores with nothing else to do")
    print("\nOperations for --shape, with their sizes and defaults:")
    for name, operation in family.OPERATIONS.items():
        print(f"  {name}: {operation}")


def effort(arguments: argparse.Namespace) -> Effort:
    return QUICK if arguments.quick else THOROUGH


def record_of(arguments: argparse.Namespace, device: torch.device) -> Path | None:
    """Where the figures are written."""
    from ..benchmarks.harness.publish import RECORDS

    partial = arguments.shape or arguments.quick or arguments.filter or arguments.dtype or arguments.threads
    if arguments.output or partial or not machine.is_checkout():
        return arguments.output
    return RECORDS / f"{arguments.family}-{device.type}-{machine.slug(device)}.json"


def publish(records: Sequence[Path]) -> None:
    need("matplotlib", "bench")
    from ..benchmarks.harness import publish as pages

    for record in records:
        with user_errors():
            report = Report.load(record)
        print(f"Written: {', '.join(map(str, pages.publish(report, family_of(report.family), record)))}")


def family_of(name: str) -> ModuleType:
    return importlib.import_module(f"{benchmarks.__name__}.{name}")
