"""Time and memory, so that variants can be compared."""

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .report import console
from .training import with_losses_of


def forward_step(model: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    return torch.inference_mode()(lambda: model(inputs))


def training_step(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    """A training step on a copy of the model, so that measuring does not change it."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with_losses_of(model, loss(model(inputs), targets)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def median_seconds(steps: Mapping[str, Callable[[], object]], rounds: int, title: str) -> dict[str, float]:
    """Median time of each step. Every round runs each step once, in alternating order, so that whatever
    else the machine does meets all of them alike. One more round goes first and does not count.

    Args:
        steps: what to time, by name.
        rounds: how many times.
        title: what the progress bar is called.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in track(range(rounds + 1), description=f"{title:36}", console=console):
        for name in order:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
        order.reverse()
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def peak_memory(step: Callable[[], object]) -> int:
    """Bytes that a step holds at its peak beyond what was there before: the highest sum of allocations
    less releases in torch's CPU allocator, as torch.profiler records them one by one. What operators
    take from elsewhere (workspaces of the BLAS library, for one) does not show."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would print a line for each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recording.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
