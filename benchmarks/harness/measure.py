"""Measures a row: contenders take turns in one process, so that they meet the same machine."""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .launches import launches
from .memory import peak_extra_bytes
from .results import TORCHOPS, ContenderResult, Quartiles, RowResult
from .rows import Contender, Row, dtype_name

# By dtype of the activations: relative, and absolute as a share of the largest magnitude.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Effort:
    """How long is measured. A sample is the mean time of as many calls as fill sample_seconds; a round
    is one sample of each contender; there are as many rounds as fill row_seconds, within limits."""

    sample_seconds: float
    row_seconds: float
    min_rounds: int
    max_rounds: int


THOROUGH = Effort(sample_seconds=5e-3, row_seconds=1.5, min_rounds=11, max_rounds=51)
QUICK = Effort(sample_seconds=2e-3, row_seconds=0.2, min_rounds=5, max_rounds=11)


def measure(row: Row, device: torch.device, effort: Effort, shuffler: random.Random) -> RowResult:
    """Raises AssertionError if contenders disagree."""
    contenders = row.contenders()
    check_agreement(row, contenders)
    calls = {name: calls_per_sample(contender, device, effort) for name, contender in contenders.items()}
    samples = take_samples(contenders, calls, device, effort, shuffler)
    results = {
        name: ContenderResult(
            seconds=Quartiles.of(samples[name]),
            ratio=Quartiles.of([own / ours for own, ours in zip(samples[name], samples[TORCHOPS], strict=True)]),
            peak_extra_bytes=peak_extra_bytes(contender.run, device),
            is_bound=contender.is_bound,
            target=contender.target,
            calls=calls[name],
            samples=[float(f"{sample:.4g}") for sample in samples[name]],
            launches=launches(contender.run, device),
        )
        for name, contender in contenders.items()
    }
    return RowResult(row.operation, row.shape, dtype_name(row.dtype), row.direction, results)


def check_agreement(row: Row, contenders: Mapping[str, Contender]) -> None:
    ours = contenders[TORCHOPS]
    expected = ours.align(ours.run())
    for name, contender in contenders.items():
        if contender is ours or contender.is_bound:
            continue
        for position, (actual, wanted) in enumerate(zip(contender.align(contender.run()), expected, strict=True)):
            tolerance = TOLERANCE[row.dtype] if wanted.is_floating_point() else 0.0
            torch.testing.assert_close(
                actual,
                wanted,
                rtol=tolerance,
                atol=tolerance * wanted.abs().max().item(),
                check_dtype=False,
                msg=lambda reason, name=name, position=position: (
                    f"{row.label}: {name} and torchops disagree in result {position}\n{reason}"
                ),
            )


def calls_per_sample(contender: Contender, device: torch.device, effort: Effort) -> int:
    """Warms up on the way."""
    seconds_per_call(contender.run, 2, device)
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
        for done in range(effort.max_rounds):
            if done >= effort.min_rounds and time.perf_counter() - start > effort.row_seconds:
                break
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
