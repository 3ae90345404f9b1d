"""Handwritten digits: the 1797 images of scikit-learn, which come with the package."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

IMAGE_SIZE = 40
MAX_SHIFT = 2


@dataclass
class Digits:
    """Images [n, 1, IMAGE_SIZE, IMAGE_SIZE] of mean 0 and standard deviation 1, and labels [n] in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images in random order, shifted by up to MAX_SHIFT pixels, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train_images), generator=generator)
            for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
                yield shift_randomly(self.train_images[chosen], generator), self.train_labels[chosen]


def load() -> Digits:
    """Reads the images, enlarges them from 8 x 8 pixels so that a model has tokens to save, and keeps a
    quarter of each digit's images for testing."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    labels = torch.tensor(labels)
    return Digits(images[train], labels[train], images[test], labels[test])


def shift_randomly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image [B, 1, S, S] by up to MAX_SHIFT pixels either way; borders repeat."""
    batch, _, size, _ = images.shape
    padded = F.pad(images, (MAX_SHIFT,) * 4, mode="replicate").squeeze(1)
    shifts = torch.randint(2 * MAX_SHIFT + 1, (2, batch, 1), generator=generator)
    rows, columns = shifts + torch.arange(size)  # each [B, S]
    index = torch.arange(batch).view(-1, 1, 1)
    return padded[index, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)
