"""What a run of a family brings, and its JSON."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .rows import Curves

TORCHOPS = "torchops"


@dataclass(frozen=True)
class Quartiles:
    lower: float
    median: float
    upper: float

    @staticmethod
    def of(samples: Sequence[float]) -> "Quartiles":
        return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


@dataclass(frozen=True)
class ContenderResult:
    """What one contender took in one row.

    samples are in seconds per call, one a round; calls is how many calls a sample is the mean of.
    launches is how many kernels a call starts on a GPU.
    ratio is this contender's time / torchops's time, taken round by round, so that what slows a whole
    round down (a busy machine, a lower clock) drops out.
    """

    seconds: Quartiles
    ratio: Quartiles
    peak_extra_bytes: int
    is_bound: bool
    target: float | None
    calls: int
    samples: list[float]
    launches: int | None = None
    memory_target: int | None = None
    peak_resident_bytes: int | None = None  # measured where there is a target, and where the system tells it

    @property
    def is_loss(self) -> bool:
        return not self.is_bound and self.ratio.median < 1

    @property
    def misses_target(self) -> bool:
        return self.target is not None and self.ratio.median < self.target


@dataclass(frozen=True)
class RowResult:
    """parameters are the numbers behind shape; absent says of contenders why they have no figures."""

    operation: str
    shape: str
    dtype: str
    direction: str
    contenders: dict[str, ContenderResult]
    parameters: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.operation}, {self.shape}, {self.dtype}, {self.direction}"

    def others(self) -> Iterator[tuple[str, ContenderResult]]:
        """Everyone but torchops."""
        return ((name, contender) for name, contender in self.contenders.items() if name != TORCHOPS)


@dataclass(frozen=True)
class Target:
    """One target of a run, in words, and what was reached of it."""

    row: RowResult
    what: str
    wanted: str
    reached: str
    is_met: bool


@dataclass(frozen=True)
class Report:
    """One run of one family: conditions is what it ran on and how, failures why rows have no figures, by label."""

    family: str
    conditions: dict[str, Any]
    notes: str
    rows: list[RowResult]
    failures: dict[str, str] = field(default_factory=dict)

    def operations(self) -> dict[str, list[RowResult]]:
        """Rows by operation, in the order in which they ran."""
        groups: dict[str, list[RowResult]] = {}
        for row in self.rows:
            groups.setdefault(row.operation, []).append(row)
        return groups

    def on(self, curves: Curves) -> list[RowResult]:
        return [
            row
            for row in self.operations().get(curves.operation, [])
            if curves.parameter in row.parameters
            and curves.fixed.items() <= row.parameters.items()
            and (not curves.only or {row.dtype, row.direction} <= set(curves.only))
        ]

    def losses(self) -> list[tuple[RowResult, str, ContenderResult]]:
        """Where a rival takes less time than torchops, with the rival's name."""
        return [(row, name, contender) for row in self.rows for name, contender in row.others() if contender.is_loss]

    def absences(self) -> dict[tuple[str, str], list[str]]:
        """Labels of rows by contender that they are without, and reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            for name, reason in row.absent.items():
                groups.setdefault((name, reason), []).append(row.label)
        return groups

    def targets(self) -> Iterator[Target]:
        for row in self.rows:
            for name, contender in row.contenders.items():
                if contender.target is not None:
                    reached = f"{contender.ratio.median:.2f}"
                    yield Target(
                        row, f"{name} / torchops", f"{contender.target:.2f}", reached, not contender.misses_target
                    )
                if contender.memory_target is not None and contender.peak_resident_bytes is not None:
                    reached, wanted = (
                        f"{size / 2**20:.0f} MiB" for size in (contender.peak_resident_bytes, contender.memory_target)
                    )
                    is_met = contender.peak_resident_bytes <= contender.memory_target
                    yield Target(row, f"{name}: peak extra memory", f"at most {wanted}", reached, is_met)

    def save(self, path: Path) -> None:
        """One line a row, so that two runs can be compared with diff."""
        document = dataclasses.asdict(self)
        rows = ",\n  ".join(json.dumps(row) for row in document.pop("rows"))
        head = json.dumps(document, indent=1).removesuffix("\n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')

    @staticmethod
    def load(path: Path) -> "Report":
        document = json.loads(path.read_text())
        rows = [
            RowResult(**{**row, "contenders": {name: contender(c) for name, c in row["contenders"].items()}})
            for row in document.pop("rows")
        ]
        return Report(**document, rows=rows)


def contender(document: dict[str, Any]) -> ContenderResult:
    seconds, ratio = (Quartiles(**document.pop(name)) for name in ("seconds", "ratio"))
    return ContenderResult(seconds=seconds, ratio=ratio, **document)
