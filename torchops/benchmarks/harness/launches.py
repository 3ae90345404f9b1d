"""How many kernels, copies and fills one call starts on a GPU."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """None on the CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profile.events())
