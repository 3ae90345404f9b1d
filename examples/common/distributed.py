"""The same program alone or under torchrun: one process group, and which process speaks for all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

RANK = int(os.environ.get("RANK", "0"))
NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
IS_MAIN = RANK == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the other processes when torchrun started several, for as long as the block lasts."""
    if NUM_PROCESSES == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if NUM_PROCESSES > 1:
        dist.barrier()
