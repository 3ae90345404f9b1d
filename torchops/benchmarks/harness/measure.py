"""Measures a row: contenders take turns in one process, so that they meet the same machine."""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .launches import launches
from .memory import peak_extra_bytes, peak_resident_bytes
from .results import TORCHOPS, ContenderResult, Quartiles, RowResult
from .rows import Absent, Contender, Row, Tensors, dtype_name

# By dtype of the activations: relative, and absolute as a share of the largest magnitude.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Effort:
    """How long is measured. A sample is the mean time of as many calls as fill sample_seconds; a round
    is one sample of each contender; there are as many rounds as fill row_seconds, within limits. Of rounds
    that take longer than long_row_seconds together there are few_rounds."""

    sample_seconds: float
    row_seconds: float
    min_rounds: int
    max_rounds: int
    long_row_seconds: float
    few_rounds: int

    def is_enough(self, rounds: int, seconds: float) -> bool:
        return (
            rounds >= self.max_rounds
            or (rounds >= self.min_rounds and seconds > self.row_seconds)
            or (rounds >= self.few_rounds and seconds > self.long_row_seconds)
        )

    def expected_seconds(self, row: Row) -> float:
        """About what measuring the row takes on a machine of two cores."""
        rounds = min(self.min_rounds, max(self.few_rounds, self.long_row_seconds / max(row.round_seconds, 1e-3)))
        return row.setup_seconds + max(1.3 * self.row_seconds, (WARM_UP_CALLS + rounds) * row.round_seconds)


THOROUGH = Effort(
    sample_seconds=5e-3, row_seconds=1.5, min_rounds=11, max_rounds=51, long_row_seconds=3.0, few_rounds=3
)
QUICK = Effort(sample_seconds=2e-3, row_seconds=0.2, min_rounds=5, max_rounds=11, long_row_seconds=1.0, few_rounds=3)
# One is compared with torchops, one is watched for its memory, one tells how many calls fill a sample.
WARM_UP_CALLS = 3


def measure(row: Row, device: torch.device, effort: Effort, shuffler: random.Random) -> RowResult:
    """Raises AssertionError if contenders disagree, and what torchops raises."""
    contenders, absent = warmed_up(row)
    memory = {name: peak_extra_bytes(contender.run, device) for name, contender in contenders.items()}
    resident = {
        name: peak_resident_bytes(contender.run, device)
        for name, contender in contenders.items()
        if contender.memory_target is not None
    }
    calls = {name: calls_per_sample(contender, device, effort) for name, contender in contenders.items()}
    samples = take_samples(contenders, calls, device, effort, shuffler)
    results = {
        name: ContenderResult(
            seconds=Quartiles.of(samples[name]),
            ratio=Quartiles.of([own / ours for own, ours in zip(samples[name], samples[TORCHOPS], strict=True)]),
            peak_extra_bytes=memory[name],
            is_bound=contender.is_bound,
            target=contender.target,
            calls=calls[name],
            samples=[float(f"{sample:.4g}") for sample in samples[name]],
            launches=launches(contender.run, device),
            memory_target=contender.memory_target,
            peak_resident_bytes=resident.get(name),
        )
        for name, contender in contenders.items()
    }
    return RowResult(
        row.operation, row.shape, dtype_name(row.dtype), row.direction, results, dict(row.parameters), absent
    )


def warmed_up(row: Row) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders, each of which ran once and agrees with torchops, and why others are absent."""
    declared = row.contenders()
    ours = declared[TORCHOPS]
    assert isinstance(ours, Contender) and ours.align is not None
    expected = ours.align(ours.run())
    contenders, absent = {TORCHOPS: ours}, {}
    for name, contender in declared.items():
        if contender is ours:
            continue
        if isinstance(contender, Absent):
            absent[name] = contender.reason
            continue
        try:
            actual = contender.run()
        except Exception as error:  # whatever a rival raises is a reason for having no figures of it
            absent[name] = in_one_line(error)
            continue
        contenders[name] = contender
        if contender.align is not None and not contender.is_bound:
            check_agreement(row, name, contender.align(actual), expected)
    return contenders, absent


def in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"


def check_agreement(row: Row, name: str, results: Tensors, expected: Tensors) -> None:
    assert 0 < len(results) <= len(expected), f"{name} has {len(results)} results, torchops {len(expected)}"
    for position, (actual, wanted) in enumerate(zip(results, expected, strict=False)):
        tolerance = TOLERANCE[row.dtype] if wanted.is_floating_point() else 0.0

        def message(reason: str, position: int = position) -> str:
            return f"{name} and torchops disagree in result {position}: {reason}"

        torch.testing.assert_close(
            actual,
            wanted,
            rtol=tolerance,
            atol=tolerance * wanted.abs().max().item(),
            check_dtype=False,
            msg=message,
        )


def calls_per_sample(contender: Contender, device: torch.device, effort: Effort) -> int:
    """Measured on a contender that is warm."""
    seconds = seconds_per_call(contender.run, 1, device)
    if seconds < effort.sample_seconds:
        seconds = min(seconds_per_call(contender.run, 1, device) for _ in range(3))
    return max(1, math.ceil(effort.sample_seconds / seconds))


def take_samples(
    contenders: Mapping[str, Contender],
    calls: Mapping[str, int],
    device: torch.device,
    effort: Effort,
    shuffler: random.Random,
) -> dict[str, list[float]]:
    """Seconds per call, one sample of each contender a round, in an order that changes every round."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while not effort.is_enough(rounds, time.perf_counter() - start):
            rounds += 1
            shuffler.shuffle(order)
            for name in order:
                samples[name].append(seconds_per_call(contenders[name].run, calls[name], device))
    finally:
        gc.enable()
    return samples


def seconds_per_call(run: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls
