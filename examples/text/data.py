"""Python code: the sources of the standard library, which come with the interpreter."""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256  # bytes
HELD_OUT = 0.1  # of the files
# Not part of the library, its tests, and what holds tables instead of code: files of it are so much alike that
# those held out would be known from the others.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass
class Sources:
    """Files of bytes one after the other, with a zero behind each: uint8 [n]."""

    train: Tensor
    held_out: Tensor

    def batches(self, batch_size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random passages of the training files, without end: bytes, and the bytes that follow each,
        int64 [batch_size, context]."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - context, (batch_size, 1), generator=generator)
            passages = self.train[starts + torch.arange(context + 1)].long()
            yield passages[:, :-1], passages[:, 1:]

    def held_out_passages(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """Passages spread evenly over the held-out files, as in :meth:`batches`. They do not overlap as long
        as there is text enough."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, count).long().unsqueeze(1)
        passages = self.held_out[starts + torch.arange(context + 1)].long()
        return passages[:, :-1], passages[:, 1:]


def load() -> Sources:
    """Reads the files, and keeps some for testing."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*.py")) if LEFT_OUT.isdisjoint(path.relative_to(library).parts)]
    random.Random(0).shuffle(files)
    num_held_out = round(HELD_OUT * len(files))
    return Sources(concatenate(files[num_held_out:]), concatenate(files[:num_held_out]))


def concatenate(files: Sequence[Path]) -> Tensor:
    text = b"".join(path.read_bytes() + b"\0" for path in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
