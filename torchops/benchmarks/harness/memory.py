"""Peak of the memory that one call takes besides what was there before it: what it returns, what it
saves for backward and what it uses in between. peak_extra_bytes counts what torch's allocators hand out;
scratch that an operator takes elsewhere (packed panels of a matrix product, torch's as torchops's) is not
seen. peak_resident_bytes sees all of it, rounded to what the system hands out."""

import ctypes
import gc
import json
import os
import re
import tempfile
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import torch


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    return peak_on_cuda(run, device) if device.type == "cuda" else peak_on_cpu(run)


def peak_on_cuda(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(run: Callable[[], object]) -> int:
    """The CPU's allocator keeps no peak, but the profiler sees each allocation and each release."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    allocated = peak = 0
    for _, change in sorted(changes, key=itemgetter(0)):
        allocated += change
        peak = max(peak, allocated)
    return peak


def peak_resident_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """How much the process grows during a call, as the system counts it. None where it does not tell: only
    Linux does, of the CPU's memory."""
    reset = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not os.access(reset, os.W_OK):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before is used again unseen
    reset.write_text("5")  # the peak is what is resident now
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """VmRSS is what is resident now, VmHWM its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024
