"""How many kernels an operator launches on CUDA, which costs microseconds each whatever their size."""

from collections.abc import Callable

import cuda_on_host
import pytest
import torch
from cases import KERNEL_OPS
from contract import OpCase
from torch.autograd import DeviceType

DEVICE = "cpu" if cuda_on_host.ACTIVE else "cuda"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not cuda_on_host.ACTIVE and not torch.cuda.is_available(),
        reason="this machine has no CUDA device; test_cuda_on_host.py counts launches on the host",
    ),
]


def launches(run: Callable[[], object]) -> int:
    if cuda_on_host.ACTIVE:
        before = cuda_on_host.num_launches()
        run()
        return cuda_on_host.num_launches() - before
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    # Copies and fills count: they are launches too. Dense products are torch's, by as many kernels as it sees fit.
    return sum(
        event.device_type == DeviceType.CUDA and event.name.startswith(("torchops::", "void torchops::", "Mem"))
        for event in profile.events()
    )


@KERNEL_OPS
def test_number_of_launches(case: OpCase) -> None:
    inputs = case.sized(torch.float32, DEVICE, 70)
    with torch.no_grad():
        assert launches(lambda: case.op(**inputs)) == case.launches
