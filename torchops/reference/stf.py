"""Dense-sparse factorization of weights, in plain PyTorch: the factors are multiplied out."""

from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor


def dense(basis: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The matrix [rows, cols] that the factors stand for. Zeros that nobody stored are not multiplied: a NaN or an
    infinity of a basis vector is in the rows that combine it, and in no others."""
    blocks = torch.arange(basis.shape[0], device=basis.device)[:, None]
    return torch.einsum("rbe,rbec->rbc", values, basis[blocks, indices.long()]).flatten(1)


def stf_linear(
    input: Tensor,
    basis: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Optional[Tensor] = None,
    transpose: bool = False,
) -> Tensor:
    weight = dense(basis, values, indices)
    return torch.nn.functional.linear(input, weight.T if transpose else weight, bias)


def stf_select(latent: Tensor, nnz: int) -> Tuple[Tensor, Tensor]:
    # A stable sort leaves the lower index first among equals.
    indices = latent.abs().sort(dim=-1, descending=True, stable=True).indices[..., :nnz].sort(dim=-1).values
    return latent.gather(-1, indices), indices.to(torch.uint8 if latent.shape[-1] <= 256 else torch.int16)


class _StraightThrough(torch.autograd.Function):
    """latent -> the entries that stf_select keeps, the others 0; the gradient goes to all of them."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, nnz: int) -> Tensor:
        values, indices = stf_select(latent, nnz)
        return torch.zeros_like(latent).scatter(-1, indices.long(), values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return grad, None


def stf_linear_straight_through(
    input: Tensor, basis: Tensor, latent: Tensor, nnz: int, bias: Optional[Tensor] = None, transpose: bool = False
) -> Tensor:
    code = _StraightThrough.apply(latent, nnz)
    weight = torch.einsum("rbk,bkc->rbc", code, basis).flatten(1)
    return torch.nn.functional.linear(input, weight.T if transpose else weight, bias)


def _keep_largest(code: Tensor, nnz: int) -> Tensor:
    values, indices = stf_select(code[:, None], nnz)
    return torch.zeros_like(code).scatter(1, indices[:, 0].long(), values[:, 0])


def _refined(
    weight: Tensor, basis: Tensor, nnz: int, num_iterations: int, row_root: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    """Basis and code: the largest entries of the least-squares code for the basis, then the least-squares basis
    for the code, and so on. The operator finds better codes, starts from several bases, and drops what is worse."""
    code = _keep_largest(weight @ torch.linalg.pinv(basis), nnz)
    for _ in range(num_iterations):
        weighed = (code, weight) if row_root is None else (row_root.T @ code, row_root.T @ weight)
        basis = torch.linalg.pinv(weighed[0]) @ weighed[1]
        code = _keep_largest(weight @ torch.linalg.pinv(basis), nnz)
    return basis, code


def _root(gram: Union[int, Tensor], like: Tensor) -> Tensor:
    """L of gram + ridge = L L^T; of a size the identity, which weighs nothing."""
    if isinstance(gram, int):
        return torch.eye(gram, dtype=like.dtype, device=like.device)
    return torch.linalg.cholesky(gram + torch.eye(len(gram)).to(gram) * (gram.diagonal().mean() * 1e-3 + 1e-12))


def stf_factorize(
    weight: Tensor,
    basis_size: int,
    nnz: int,
    num_blocks: int = 1,
    num_iterations: int = 20,
    gram: Optional[Tensor] = None,
    row_gram: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    rows, width = weight.shape[0], weight.shape[1] // max(num_blocks, 1)
    bases, codes = weight.new_zeros(num_blocks, basis_size, width), weight.new_zeros(rows, num_blocks, basis_size)
    for block, part in enumerate(weight.split(width, 1) if weight.numel() else ()):
        # The error is that of row_root.T @ part @ root, whose squares are those of the layer's outputs.
        own = slice(block * width, (block + 1) * width)
        root = _root(width if gram is None else gram[own, own], weight)
        row_root = _root(rows if row_gram is None else row_gram, weight)
        start = torch.linalg.svd(row_root.T @ part @ root, full_matrices=False).Vh[:basis_size]
        start = torch.cat([start, start.new_zeros(basis_size - len(start), width)])
        basis, code = _refined(part @ root, start, nnz, num_iterations, row_root)
        bases[block], codes[:, block] = basis @ torch.linalg.inv(root), code
    return (bases, *stf_select(codes, nnz))


def stf_project(weight: Tensor, basis: Tensor, nnz: int, num_iterations: int = 1) -> Tuple[Tensor, Tensor]:
    projected, refined = torch.zeros_like(weight), torch.zeros_like(basis)
    width = basis.shape[2]
    with torch.no_grad():
        for block in range(basis.shape[0]):
            columns = slice(block * width, (block + 1) * width)
            if weight[:, columns].numel():
                refined[block], code = _refined(weight[:, columns], basis[block], nnz, num_iterations)
                projected[:, columns] = code @ refined[block]
            else:
                refined[block] = basis[block]
    # The gradient to the projection is that to the weight.
    return projected + (weight - weight.detach()), refined


ROWS_PER_GROUP = 16


def stf_pack(values: Tensor, indices: Tensor, basis_size: int) -> Tuple[Tensor, Tensor]:
    num_rows, num_blocks, nnz = values.shape
    missing = -num_rows % ROWS_PER_GROUP
    # Rows that complete the last group: zeros at the columns 0..nnz-1.
    values = torch.cat([values, values.new_zeros(missing, num_blocks, nnz)])
    columns = torch.arange(nnz, device=values.device).expand(missing, num_blocks, nnz)
    indices = torch.cat([indices.long(), columns])
    shape = ((num_rows + missing) // ROWS_PER_GROUP, ROWS_PER_GROUP, num_blocks, basis_size)
    there = torch.zeros(shape, dtype=torch.int64, device=values.device).flatten(0, 1).scatter(-1, indices, 1)
    code = values.new_zeros(there.shape).scatter(-1, indices, values)
    # [groups, blocks, columns, rows]: what is there, in the order of columns and then rows.
    there = there.view(shape).permute(0, 2, 3, 1)
    code = code.view(shape).permute(0, 2, 3, 1)
    packed = code[there.bool()].view(*there.shape[:2], ROWS_PER_GROUP * nnz)
    mask = (there << torch.arange(ROWS_PER_GROUP, device=values.device)).sum(-1)
    return packed, mask.to(torch.int16)


def stf_unpack(packed_values: Tensor, mask: Tensor, rows: int) -> Tuple[Tensor, Tensor]:
    """What stf_pack packed."""
    groups, num_blocks, basis_size = mask.shape
    nnz = packed_values.shape[-1] // ROWS_PER_GROUP
    bits = (mask.long()[..., None] >> torch.arange(ROWS_PER_GROUP, device=mask.device)) & 1
    code = torch.zeros(bits.shape, dtype=packed_values.dtype, device=mask.device)
    code[bits.bool()] = packed_values.flatten()
    # [groups, blocks, columns, rows] -> [rows, blocks, columns]
    shape = (groups * ROWS_PER_GROUP, num_blocks, basis_size)
    bits, code = (t.permute(0, 3, 1, 2).reshape(shape) for t in (bits, code))
    indices = bits.sort(dim=-1, descending=True, stable=True).indices[..., :nnz]
    dtype = torch.uint8 if basis_size <= 256 else torch.int16
    return code.gather(-1, indices)[:rows], indices[:rows].to(dtype)


def stf_linear_packed(
    input: Tensor,
    basis: Tensor,
    packed_values: Tensor,
    mask: Tensor,
    rows: int,
    bias: Optional[Tensor] = None,
    transpose: bool = False,
) -> Tensor:
    return stf_linear(input, basis, *stf_unpack(packed_values, mask, rows), bias, transpose)
