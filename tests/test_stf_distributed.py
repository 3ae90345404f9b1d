"""Factored layers under torch.distributed: two processes on the CPU, with gloo."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import ProcessTest, needs_gloo, run_in_processes
from torch import nn

from torchops.nn import STFLinear

pytestmark = needs_gloo
TESTS: list[ProcessTest] = []


def test_in_two_processes(tmp_path: Path) -> None:
    run_in_processes(2, TESTS, tmp_path)


def in_two_processes(test: ProcessTest) -> ProcessTest:
    TESTS.append(test)
    return test


def agree(module: nn.Module) -> bool:
    """Whether all processes hold the same."""
    sums = torch.stack([tensor.double().sum() for tensor in full(module).values()])
    others = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(others, sums)
    return all(torch.equal(other, sums) for other in others)


def full(module: nn.Module) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    state = module.state_dict()
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def wide_layer(**options) -> STFLinear:
    return STFLinear(300, 40, basis_size=290, nnz=9, **options)  # positions of 16 bits


@in_two_processes
def data_parallel(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = nn.Sequential(wide_layer(), STFLinear(40, 30, 8, 3).straight_through(), STFLinear(30, 20, 10, 4).pack())
    assert not agree(model)
    # The first process's positions go to the others, before every forward too.
    parallel = DistributedDataParallel(model[:2])
    packed = DistributedDataParallel(nn.Sequential(model[2], nn.Linear(20, 5)))
    assert agree(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(torch.randn(4, 300)).square().sum().backward()
        optimizer.step()
        packed(torch.randn(4, 30)).sum().backward()
    assert agree(model)


@in_two_processes
def layers_of_other_sizes(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    # Tensors of straight-through layers look alike.
    parallel = DistributedDataParallel(STFLinear(12, 20, 8, nnz=3 + rank).straight_through())
    if rank:
        with pytest.raises(ValueError, match="expected the state of a layer with .*nnz=4.*, got one with .*nnz=3"):
            parallel.module(torch.randn(2, 12))


@in_two_processes
def fully_sharded_from_meta(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for form in ("factored", "straight_through"):
        with torch.device("meta"):
            model = nn.Sequential(wide_layer(), nn.ReLU(), STFLinear(40, 40, 8, 3))
        for layer in (model[0], model[2]):
            fully_shard(getattr(layer, form)())
        fully_shard(model)
        model.to_empty(device="cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for layer in (model[0], model[2]):
            layer.reset_parameters()
            assert layer.form().replace("-", "_") == form
        before = full(model)
        assert agree(model) and all(tensor.isfinite().all() for tensor in before.values())
        indices = before.get("0.indices")
        if indices is not None:
            numbers = indices.view(torch.int16).squeeze(-1)
            assert (numbers.diff(dim=-1) > 0).all() and numbers.min() >= 0 and numbers.max() < 290
        model(torch.randn(4, 300)).square().sum().backward()
        optimizer.step()
        after = full(model)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {name for name, _ in model.named_parameters()}


@in_two_processes
def state_from_the_first_process(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    for form in ("factored", "straight_through", "pack"):
        layer = nn.Sequential(getattr(wide_layer(), form)())
        state = copy.deepcopy(layer.state_dict()) if rank == 0 else {}
        model = nn.Sequential(getattr(wide_layer(), form)())
        fully_shard(model)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, dict(state), options=options)
        assert agree(model)
        loaded = full(model)
        assert rank or all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
