"""Measures the rows of a family, one after the other."""

import dataclasses
import random
from collections.abc import Sequence
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine
from .measure import Effort, in_one_line, measure
from .results import Report
from .rows import Row


def measured(
    family: ModuleType,
    rows: Sequence[Row],
    device: torch.device,
    effort: Effort,
    asked: dict[str, str],
    console: Console,
) -> Report:
    """Rows that fail stand in the report. asked is what the command line asked of rows, for the conditions."""
    conditions = {**machine.describe(device), "effort": dataclasses.asdict(effort)}
    shuffler = random.Random(0)
    other_load = machine.OtherLoad()
    results, failures = [], {}
    told: set[tuple[str, str]] = set()  # reasons are printed once
    columns = (BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn(), TextColumn("{task.description}"))
    expected = [effort.expected_seconds(row) for row in rows]
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
    name = family.__name__.rpartition(".")[2]
    return Report(name, {**conditions, **asked}, family.NOTES, results, failures)
