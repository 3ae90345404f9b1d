r"""Linear layers whose weight is a sparse factor times a small dense basis (DSFormer).

A matrix M [rows, cols], whose columns are split into equal blocks, is written as

.. math::

    M_{r,\text{block } b} = \sum_{e < \text{nnz}} \text{values}_{r,b,e} \, \text{basis}_{b,\text{indices}_{r,b,e},:}

so every row of a block is a combination of nnz of the block's K basis vectors, its *atoms*. The sparse
factor stands on either side of a layer, better on the larger one:

=============  =====================  ==========  ==========
sparse factor  layer                  rows, cols  transpose
=============  =====================  ==========  ==========
on the output  y = x M^T + bias       out, in     False
on the input   y = x M + bias         in, out     True
=============  =====================  ==========  ==========

indices are uint8 for K <= 256 and int16 above, K at most 32767. The sums of sparse products are float32
(float64 for float64); the product of the input with the first factor is rounded to the input's dtype.

Source: DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization, 2023.
"""

from typing import Optional, Tuple

from torch import Tensor

from .._namespace import operators

__all__ = [
    "stf_factorize",
    "stf_linear",
    "stf_linear_packed",
    "stf_linear_straight_through",
    "stf_pack",
    "stf_project",
    "stf_select",
]


def stf_factorize(
    weight: Tensor,
    basis_size: int,
    nnz: int,
    num_blocks: int = 1,
    num_iterations: int = 20,
    gram: Optional[Tensor] = None,
    row_gram: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Factors a matrix: the basis, and for every row and block the nnz basis vectors that come closest.

    Starts from an orthonormal basis turned to the rows, or, where rows combine 16 basis vectors or fewer, from the
    better of that and of rows of the weight, then alternates between the sparse factor and the basis. The error
    never rises from one iteration to the next. No gradient. Deterministic: the same bits from run to run (torch's
    dense decompositions, which it is composed of, may differ between numbers of threads).

    Args:
        weight: [rows, cols], float64, float32, bfloat16 or float16. 16 bits are computed in float32.
        basis_size: K, 1..32767.
        nnz: 0..K.
        num_blocks: equal parts of the columns, each with a basis of its own.
        num_iterations: how often both factors are improved, at most; it ends when nothing gets better.
        gram: [cols, cols], X^T X of inputs X of a layer with the sparse factor on the output's side: the error
            is then that of the layer's outputs.
        row_gram: [rows, rows], the same for a layer with the sparse factor on the input's side. It couples the
            rows: one makes up for what another misses. The basis is still a least-squares solution; nonzeros are
            found by conjugate gradients for all rows at once.

    Returns:
        basis [blocks, K, cols / blocks] of vectors of length 1 (a power of 2 where a row of the weight is longer
        than the dtype's largest number), values and indices [rows, blocks, nnz], as
        :func:`stf_linear` takes them; indices increase.

    Raises:
        ValueError: a wrong shape, dtype or device, sizes that do not fit, or a NaN or an infinity in weight, gram
            or row_gram.

    >>> weight = torch.randn(64, 16)
    >>> basis, values, indices = torchops.stf_factorize(weight, basis_size=12, nnz=6)
    >>> basis.shape, values.shape, indices.dtype
    (torch.Size([1, 12, 16]), torch.Size([64, 1, 6]), torch.uint8)
    """
    return operators.stf_factorize(
        weight, basis_size, nnz, num_blocks=num_blocks, num_iterations=num_iterations, gram=gram, row_gram=row_gram
    )


def stf_linear(
    input: Tensor,
    basis: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Optional[Tensor] = None,
    transpose: bool = False,
) -> Tensor:
    """A linear layer with a factored weight (see the module for the form).

    Differentiable in input, basis, values and bias.

    Args:
        input: [..., in], float64, float32, bfloat16 or float16.
        basis: [blocks, K, cols / blocks] in input's dtype.
        values: [rows, blocks, nnz] in input's dtype, nnz at most K.
        indices: uint8 or int16 [rows, blocks, nnz], which basis vector each value goes with. Any order;
            one that stands twice counts twice.
        bias: [out] in input's dtype.
        transpose: whether the sparse factor is on the input side: then in = rows and out = cols.

    Returns:
        [..., out] in input's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device, or (seen on the CPU) an index outside of 0..K-1, with its
            position.

    >>> basis = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> values = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])
    >>> indices = torch.tensor([[[0, 2]], [[0, 1]]], dtype=torch.uint8)
    >>> torchops.stf_linear(torch.tensor([1.0, 10.0]), basis, values, indices)
    tensor([23., -7.])
    >>> torchops.stf_linear(torch.tensor([1.0, 10.0]), basis, values, indices, transpose=True)
    tensor([33., -8.])
    """
    return operators.stf_linear(input, basis, values, indices, bias, transpose=transpose)


def stf_linear_straight_through(
    input: Tensor,
    basis: Tensor,
    latent: Tensor,
    nnz: int,
    bias: Optional[Tensor] = None,
    transpose: bool = False,
) -> Tensor:
    """:func:`stf_linear` whose sparse factor is selected from a dense one, for training.

    The forward goes by the entries that :func:`stf_select` keeps. The gradient to latent is that to a
    dense factor, for all entries, so that a dropped one can come back (straight-through estimator).
    Differentiable in input, basis, latent and bias.

    Args:
        input, basis, bias, transpose: as in :func:`stf_linear`.
        latent: [rows, blocks, K] in input's dtype.
        nnz: how many entries of every row and block count, 0..K.

    Returns:
        [..., out] in input's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device, or nnz outside of 0..K.

    >>> input, basis = torch.randn(4, 6), torch.randn(2, 5, 3)
    >>> latent = torch.randn(8, 2, 5, requires_grad=True)
    >>> output = torchops.stf_linear_straight_through(input, basis, latent, nnz=2)
    >>> values, indices = torchops.stf_select(latent, nnz=2)
    >>> torch.equal(output, torchops.stf_linear(input, basis, values, indices))
    True
    >>> output.sum().backward()
    >>> latent.grad.count_nonzero()
    tensor(80)
    """
    return operators.stf_linear_straight_through(input, basis, latent, nnz, bias, transpose=transpose)


def stf_select(latent: Tensor, nnz: int) -> Tuple[Tensor, Tensor]:
    """The nnz entries of every row and block that are largest in magnitude, the lower index among equals.

    A NaN counts as larger than any number. Differentiable: the gradient of values goes to the entries that
    were kept.

    Args:
        latent: [rows, blocks, K], float64, float32, bfloat16 or float16.
        nnz: 0..K.

    Returns:
        values [rows, blocks, nnz] in latent's dtype, and indices of the same shape, uint8 for K <= 256 and
        int16 above, in ascending order.

    Raises:
        ValueError: a wrong shape or dtype, or nnz outside of 0..K.

    >>> torchops.stf_select(torch.tensor([[[1.0, -3.0, 0.0, 2.0]]]), nnz=2)
    (tensor([[[-3.,  2.]]]), tensor([[[1, 3]]], dtype=torch.uint8))
    """
    return operators.stf_select(latent, nnz)


def stf_pack(values: Tensor, indices: Tensor, basis_size: int) -> Tuple[Tensor, Tensor]:
    """The sparse factor as inference keeps it, and as files hold it: K bits a row for the positions.

    Rows stand in groups of 16, the last one filled up with rows of zeros at columns 0..nnz-1. No gradient.

    Args:
        values: [rows, blocks, nnz], float64, float32, bfloat16 or float16.
        indices: uint8 or int16 [rows, blocks, nnz], increasing in every row and block, as
            :func:`stf_select` makes them.
        basis_size: the number of basis vectors of a block, K.

    Returns:
        packed_values [ceil(rows / 16), blocks, 16 * nnz], the values of a group and block in the order of
        columns and then rows, and mask, int16 [ceil(rows / 16), blocks, K]: bit r says that row r of the group
        has the column.

    Raises:
        ValueError: a wrong shape, dtype or device, basis_size outside of 1..32767, or (seen on the CPU) an index
            outside of 0..K-1, or one that is not larger than the one before.

    >>> values = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> indices = torch.tensor([[[0, 2]], [[1, 2]]], dtype=torch.uint8)
    >>> packed_values, mask = torchops.stf_pack(values, indices, basis_size=3)
    >>> packed_values[0, 0, :2], packed_values.shape
    (tensor([1., 0.]), torch.Size([1, 1, 32]))
    >>> mask[0, 0] & 3
    tensor([1, 2, 3], dtype=torch.int16)
    """
    return operators.stf_pack(values, indices, basis_size)


def stf_linear_packed(
    input: Tensor,
    basis: Tensor,
    packed_values: Tensor,
    mask: Tensor,
    rows: int,
    bias: Optional[Tensor] = None,
    transpose: bool = False,
) -> Tensor:
    """:func:`stf_linear` with a sparse factor from :func:`stf_pack`, for inference.

    Gradients to input and bias, so that what stands before the layer can be trained; basis and packed_values have none.

    Args:
        input, basis, bias, transpose: as in :func:`stf_linear`.
        packed_values, mask: as :func:`stf_pack` returns them, in input's dtype and int16.
        rows: of the sparse factor: out, or in with transpose.

    Returns:
        [..., out] in input's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device, or (seen on the CPU) a mask and packed_values that do not
            come from one :func:`stf_pack`.

    >>> input, basis = torch.randn(4, 6), torch.randn(2, 5, 3)
    >>> values, indices = torchops.stf_select(torch.randn(8, 2, 5), nnz=2)
    >>> packed_values, mask = torchops.stf_pack(values, indices, basis_size=5)
    >>> packed = torchops.stf_linear_packed(input, basis, packed_values, mask, rows=8)
    >>> torch.testing.assert_close(packed, torchops.stf_linear(input, basis, values, indices))
    """
    return operators.stf_linear_packed(input, basis, packed_values, mask, rows, bias, transpose=transpose)


def stf_project(weight: Tensor, basis: Tensor, nnz: int, num_iterations: int = 1) -> Tuple[Tensor, Tensor]:
    """The factored matrix that comes close to a weight from a basis, for training the dense weight through it.

    The Straight-Through Factorizer: the forward is the factorization's value, and the gradient to it is taken for
    that to the weight. The basis has none: it follows the weight, by what is returned here.
    Without an iteration it is returned as it is, else of vectors of length 1, where those that are zero give way to
    what rows lack. :class:`torchops.nn.STFProjectedLinear` keeps it. On CUDA it waits for the device. Deterministic as
    :func:`stf_factorize` is.

    Args:
        weight: [rows, cols], float64, float32, bfloat16 or float16. 16 bits are computed in float32.
        basis: [blocks, K, cols / blocks] in weight's dtype.
        nnz: how many basis vectors a row of a block combines, 0..K.
        num_iterations: how often basis and code are improved before the value is taken.

    Returns:
        projected [rows, cols], and the refined basis, of basis's shape.

    Raises:
        ValueError: a wrong shape, dtype or device, or nnz outside of 0..K.

    >>> weight = torch.randn(64, 16, requires_grad=True)
    >>> basis, values, indices = torchops.stf_factorize(weight.detach(), basis_size=12, nnz=6)
    >>> projected, basis = torchops.stf_project(weight, basis, nnz=6)
    >>> projected.square().sum().backward()
    >>> torch.equal(weight.grad, 2 * projected)
    True
    """
    return operators.stf_project(weight, basis, nnz, num_iterations=num_iterations)
