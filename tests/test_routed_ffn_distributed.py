"""Routed layers under torch.distributed: two processes on the CPU, with gloo."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from torchops.nn import RoutedFFN, Router, balance_loss

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


def test_in_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(tmp_path / "store",), nprocs=2)


def work(rank: int, store: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    all_choices_count()
    data_parallel()
    dist.destroy_process_group()


def all_choices_count() -> None:
    """Blocks 0 and 1 in one process, 0 and 2 in the other: the mean is 1."""
    router = Router(4, 4, 2)
    router.update_balance(torch.tensor([[0, 1 + dist.get_rank()]]), rate=1.0)
    assert router.balance_bias.tolist() == [-1.0, 0.0, 0.0, 1.0]


def data_parallel() -> None:
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
