"""Training with a progress bar, in one process or several."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchops.nn import PQAttention, Router, balance_loss, quantization_loss

from .distributed import NUM_PROCESSES, RANK
from .report import console

CODEBOOKS = 0.01  # of their loss, as SPT has it


def with_losses_of(model: nn.Module, loss: Tensor) -> Tensor:
    """The loss of the task and those of the model's codebooks and routers, if it has any."""
    kinds = {type(module) for module in model.modules()}
    if PQAttention in kinds:
        loss = loss + CODEBOOKS * quantization_loss(model)
    if Router in kinds:
        loss = loss + balance_loss(model)
    return loss


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    learning_rate: float,
    title: str,
) -> None:
    """Trains with AdamW and a one-cycle learning rate.

    Args:
        model: trained in place, and left in evaluation mode.
        batches: inputs and targets, the same in all processes; each takes its share of every batch.
        loss: of the model's outputs and the targets, a mean over the batch.
        steps: how many batches to take.
        learning_rate: the highest of the cycle.
        title: what the progress bar is called.
    """
    model.train()
    replica = DistributedDataParallel(model) if NUM_PROCESSES > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    columns = "{task.description:36}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"))
        running = float("nan")
        for inputs, targets in islice(batches, steps):
            value = loss(replica(inputs[RANK::NUM_PROCESSES]), targets[RANK::NUM_PROCESSES])
            optimizer.zero_grad()
            with_losses_of(model, value).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            running = value.item() if running != running else 0.95 * running + 0.05 * value.item()
            progress.update(task, advance=1, loss=running)
    model.eval()
