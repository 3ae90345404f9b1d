"""Linear layers by means of PyTorch alone: dense, of low rank, and factored with a dense code."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def low_rank(rows: int, cols: int, rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two random factors of a weight [rows, cols]."""
    generator = torch.Generator().manual_seed(rank)
    first = torch.randn(rank, cols, generator=generator) / cols**0.5
    second = torch.randn(rows, rank, generator=generator) / rank**0.5
    return first.to(device, dtype), second.to(device, dtype)


def low_rank_linear(input: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return linear(linear(input, first), second)


def dense_code(basis: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The sparse factor [rows, K] of one block with its zeros, as a program without sparse operators has it."""
    code = values.new_zeros(values.shape[0], basis.shape[1])
    return code.scatter(1, indices[:, 0].long(), values[:, 0])


def dense_code_linear(input: Tensor, basis: Tensor, code: Tensor, transpose: bool) -> Tensor:
    first, second = (code.T, basis[0].T) if transpose else (basis[0], code)
    return linear(linear(input, first), second)
