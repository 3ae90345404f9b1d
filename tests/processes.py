"""Processes under torch.distributed on the CPU, with gloo. They run all tests of a file: starting takes longer."""

import functools
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# Of a process; it is called with the rank.
ProcessTest = Callable[[int], None]

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


def collected_in(tests: list[ProcessTest]) -> Callable[[ProcessTest], ProcessTest]:
    """A decorator for the tests of a file."""

    def collect(test: ProcessTest) -> ProcessTest:
        tests.append(test)
        return test

    return collect


def run_in_processes(world_size: int, tests: Iterable[ProcessTest], tmp_path: Path) -> None:
    """Runs tests, functions of a module, one after the other in that many processes. The first error ends all."""
    torch.multiprocessing.spawn(_run, args=(world_size, list(tests), tmp_path / "store"), nprocs=world_size)


@functools.cache
def groups() -> list[dist.ProcessGroup]:
    """This process's pair, in which ranks are others than in the whole group for half of them, and all processes."""
    return [dist.new_subgroups(group_size=2)[0], dist.group.WORLD]


def _run(rank: int, world_size: int, tests: list[ProcessTest], store: Path) -> None:
    torch.set_num_threads(1)
    # A process that waits for one that failed, or for a message that nobody sends, ends before the suite does.
    timeout = timedelta(minutes=2)
    dist.init_process_group("gloo", f"file://{store}", timeout=timeout, rank=rank, world_size=world_size)
    for test in tests:
        torch.manual_seed(rank)
        try:
            test(rank)
        except BaseException as error:
            raise AssertionError(f"{test.__name__}, process {rank}") from error
    dist.destroy_process_group()
