"""Routed layers under torch.distributed: two processes on the CPU, with gloo."""

from pathlib import Path

import torch
import torch.distributed as dist
from processes import needs_gloo, run_in_processes
from torch.nn.parallel import DistributedDataParallel

from torchops.nn import RoutedFFN, Router, balance_loss

pytestmark = needs_gloo


def test_in_two_processes(tmp_path: Path) -> None:
    run_in_processes(2, [all_choices_count, data_parallel], tmp_path)


def all_choices_count(rank: int) -> None:
    """Blocks 0 and 1 in one process, 0 and 2 in the other: the mean is 1."""
    router = Router(4, 4, 2)
    router.update_balance(torch.tensor([[0, 1 + rank]]), rate=1.0)
    assert router.balance_bias.tolist() == [-1.0, 0.0, 0.0, 1.0]


def data_parallel(rank: int) -> None:
    model = RoutedFFN(8, 16)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (parallel(torch.randn(20, 8)).square().mean() + balance_loss(parallel)).backward()
        optimizer.step()
        model.router.update_balance()
    state = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    others = [torch.empty_like(state) for _ in range(2)]
    dist.all_gather(others, state)
    assert torch.equal(others[0], others[1])
