"""Factored linear layers against dense ones, and against layers of low rank that take as many bytes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear

import torchops

from .eager import stf as eager
from .harness import (
    FORWARD,
    FORWARD_BACKWARD,
    Contender,
    Curves,
    Finding,
    Operation,
    Options,
    Report,
    Row,
    Sizes,
    Tensors,
    contender,
    machine,
)

NOTES = """\
T: tokens. A layer is in x out; "sparse factor on the output" (or the input) says on which side its nnz numbers a row \
are. K: basis vectors, nnz: how many of them a row combines, K = 2 nnz. "2x" means half as many stored numbers as \
the dense layer has, positions not counted; what that is in bytes is told below.
torchops is stf_linear_packed, the form for inference, where there is no backward pass, with stf_linear beside it as a \
contender; with one it is stf_linear. Training with the choice is stf_linear_straight_through.
dense is torch's linear with the weight that the factors stand for, so that all contenders but low rank have the \
same result, which was checked before the timing. Low rank is two dense products with as many bytes as the packed \
layer takes, masks included. dense code is the same layer with the zeros of the sparse factor stored.
Forward is without autograd. Forward + backward is the forward pass with autograd, then all gradients, from a \
gradient of the output that was made beforehand.
Up to 8 tokens the weights come from memory, as in decoding, where all other layers run in between: every contender \
goes round copies of its weights that together are more than twice the last-level cache. Where a row says "warm" it \
does not."""

DENSE = "dense"
LOW_RANK = "low rank"
DENSE_CODE = "dense code"
FACTORED = "stf_linear"
WITH_THE_CHOICE = "linear layer, training with the choice"

CURVES = (
    Curves(
        "tokens",
        "4096 x 4096, half the numbers, output side:\ntime / torchops's time over tokens",
        "linear layer",
        "T",
        {"in": 4096, "out": 4096, "transpose": 0, "compression": 200, "warm": 0, "backward": 0},
        "ratio",
    ),
)

USUAL_CACHE_BYTES = 32 * 2**20  # the last-level cache, where the system does not tell
FEW_TOKENS = 8
# For the estimate of a run's duration, on two cores.
OPERATIONS_PER_SECOND = {"cpu": 1.2e11, "cuda": 1e14}
BYTES_PER_SECOND = {"cpu": 1.5e10, "cuda": 2e12}


@dataclass(frozen=True)
class Layer:
    in_features: int
    out_features: int
    transpose: bool = False
    compression: float = 2.0

    @property
    def rows(self) -> int:
        return self.in_features if self.transpose else self.out_features

    @property
    def cols(self) -> int:
        return self.out_features if self.transpose else self.in_features

    @property
    def nnz(self) -> int:
        return round(self.rows * self.cols / self.compression / (2 * self.cols + self.rows))

    @property
    def basis_size(self) -> int:
        return 2 * self.nnz

    @property
    def is_target(self) -> bool:
        return self.in_features == self.out_features >= 1024 and self.compression == 2

    def packed_bytes(self, dtype: torch.dtype) -> int:
        groups = -(-self.rows // 16)
        numbers = self.basis_size * self.cols + 16 * groups * self.nnz
        return numbers * dtype.itemsize + 2 * groups * self.basis_size

    def indexed_bytes(self, dtype: torch.dtype) -> int:
        index = 1 if self.basis_size <= 256 else 2
        return self.basis_size * self.cols * dtype.itemsize + self.rows * self.nnz * (dtype.itemsize + index)

    def __str__(self) -> str:
        side = "input" if self.transpose else "output"
        return f"{self.in_features} x {self.out_features}, {self.compression:g}x, sparse factor on the {side}"


COMPRESSIONS = (2.0, 2.8, 3.57)
SQUARE = tuple(Layer(size, size) for size in (1024, 2048, 4096))
ON_THE_INPUT = tuple(replace(layer, transpose=True) for layer in SQUARE)
# Of BERT's size: attention, and both layers of the feed-forward part, sparse on their larger side.
BERT = (Layer(768, 768), Layer(768, 3072), Layer(3072, 768, transpose=True))
FORWARD_TARGETS = {1: 1.7, 8: 2.0, 64: 1.9, 512: 1.5, 2048: 1.5}
TRAINING_TARGETS = {512: 1.4}
# On processors with tiles, whose two 512-bit units multiply dense matrices faster than nonzeros can be read.
FORWARD_TARGETS_WITH_TILES = {1: 1.7, 8: 2.0, 64: 1.4, 512: 1.4, 2048: 1.4}
TRAINING_TARGETS_WITH_TILES = {512: 1.25}


def rows(options: Options) -> Iterator[Row]:
    """Each question has its rows: the targets on both sides, BERT's layers, compressions, training, warm weights."""
    forward: list[tuple[Layer, int]] = []
    if options.quick:
        forward = [(SQUARE[0], 1), (SQUARE[0], 64)]
        trained = [(SQUARE[0], 512)]
    else:
        forward += [(layer, tokens) for layer in (*SQUARE, *ON_THE_INPUT) for tokens in FORWARD_TARGETS]
        forward += [(layer, tokens) for layer in BERT for tokens in ((1, 8, 64, 512) if options.full else (8, 512))]
        compressed = [SQUARE[0], SQUARE[2]] if options.full else [SQUARE[0]]
        forward += [
            (replace(layer, compression=compression), tokens)
            for layer in compressed
            for compression in COMPRESSIONS[1:]
            for tokens in (1, 512)
        ]
        trained = [(layer, 512) for layer in (*SQUARE, *ON_THE_INPUT, *BERT)]
        trained += [(replace(SQUARE[0], compression=compression), 512) for compression in COMPRESSIONS[1:]]
        if options.full:
            trained += [(layer, 2048) for layer in (*SQUARE, *ON_THE_INPUT)]
    for dtype in options.dtypes:
        for layer, tokens in forward:
            yield layer_row(layer, tokens, dtype, FORWARD, options)
        for layer in () if options.quick else (SQUARE[0], SQUARE[1]):
            yield layer_row(layer, 1, dtype, FORWARD, options, warm=True)
        for layer, tokens in trained:
            yield layer_row(layer, tokens, dtype, FORWARD_BACKWARD, options)
        for layer in () if options.quick else (SQUARE[0], ON_THE_INPUT[0]):
            yield layer_row(layer, 512, dtype, FORWARD_BACKWARD, options, straight_through=True)


def layer_row(
    layer: Layer,
    tokens: int,
    dtype: torch.dtype,
    direction: str,
    options: Options,
    warm: bool = False,
    straight_through: bool = False,
) -> Row:
    backward = direction == FORWARD_BACKWARD
    weights = layer.in_features * layer.out_features
    seconds = 2 * tokens * weights * (3 if backward else 1) / OPERATIONS_PER_SECOND[options.device.type]
    seconds += 4 * weights / BYTES_PER_SECOND[options.device.type]
    return Row(
        WITH_THE_CHOICE if straight_through else "linear layer",
        f"T={tokens}{' warm' if warm else ''} {layer}",
        dtype,
        direction,
        partial(contenders, layer, tokens, dtype, options.device, backward, warm, straight_through),
        {
            "T": tokens,
            "in": layer.in_features,
            "out": layer.out_features,
            "transpose": int(layer.transpose),
            "compression": round(100 * layer.compression),
            "warm": int(warm),
            "backward": int(backward),
        },
        setup_seconds=0.2 + 2e-8 * weights,
        round_seconds=3 * seconds,
    )


def row_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return layer_row(layer_of(sizes), sizes["T"], dtype, direction, options, warm=bool(sizes["warm"]))


def trained_row_of(sizes: Sizes, dtype: torch.dtype, direction: str, options: Options) -> Row:
    return layer_row(layer_of(sizes), sizes["T"], dtype, direction, options, straight_through=True)


def layer_of(sizes: Sizes) -> Layer:
    return Layer(sizes["in"], sizes["out"], bool(sizes["transpose"]), sizes["compression"])


LAYER_SIZES = {"T": 512, "in": 1024, "out": 1024, "transpose": 0, "compression": 2}
OPERATIONS = {
    "linear layer": Operation({**LAYER_SIZES, "warm": 0}, row_of),
    WITH_THE_CHOICE: Operation(LAYER_SIZES, trained_row_of, (FORWARD_BACKWARD,)),
}

Weights = tuple[Tensor, ...]


def contenders(
    layer: Layer,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    warm: bool,
    straight_through: bool,
) -> dict[str, Contender]:
    few = tokens <= FEW_TOKENS
    cache_bytes = machine.last_level_cache_bytes(device) or USUAL_CACHE_BYTES
    transpose, rows = layer.transpose, layer.rows
    input = randn((tokens, layer.in_features), 0, dtype, device).requires_grad_(backward)
    grad = randn((tokens, layer.out_features), 1, dtype, device)
    basis, values, indices = factors(layer, dtype, device)
    code = eager.dense_code(basis, values, indices)
    weight = code.double() @ basis[0].double()
    weight = (weight.T if transpose else weight).to(dtype).contiguous()
    numbers = layer.packed_bytes(dtype) // dtype.itemsize
    low_rank = eager.low_rank(
        layer.out_features,
        layer.in_features,
        max(1, numbers // (layer.in_features + layer.out_features)),
        dtype,
        device,
    )

    def make(run: Callable[..., Tensor], weights: Weights, target: float | None = None) -> Contender:
        """`run` takes the input and the weights."""
        if few and not (warm or backward):
            size = sum(tensor.nbytes for tensor in weights)
            copies = [weights] + [tuple(map(torch.clone, weights)) for _ in range(2 * cache_bytes // size)]
            turn = cycle(copies)
            return Contender(lambda: (run(input, *next(turn)),), target=target)
        trained = [t.requires_grad_(backward) if t.is_floating_point() else t for t in weights]
        inputs = [input, *(t for t in trained if t.is_floating_point())]
        return contender(lambda: (run(input, *trained),), inputs, grad, target=target)

    def stf_linear(input: Tensor, basis: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        return torchops.stf_linear(input, basis, values, indices, None, transpose)

    def packed(input: Tensor, basis: Tensor, packed_values: Tensor, mask: Tensor) -> Tensor:
        return torchops.stf_linear_packed(input, basis, packed_values, mask, rows, None, transpose)

    def selected(input: Tensor, basis: Tensor, latent: Tensor) -> Tensor:
        return torchops.stf_linear_straight_through(input, basis, latent, layer.nnz, None, transpose)

    if torchops.utils.cpu_capability() == "amx":
        targets = TRAINING_TARGETS_WITH_TILES if backward else FORWARD_TARGETS_WITH_TILES
        dtypes = [torch.float32, torch.bfloat16]
    else:
        targets = TRAINING_TARGETS if backward else FORWARD_TARGETS
        dtypes = [torch.float32]
    has_target = layer.is_target and dtype in dtypes and not (warm or straight_through)
    dense = make(linear, (weight,), targets.get(tokens) if has_target else None)
    # Another weight has no gradients to compare: those of the factors are compared by the tests.
    only_output: Callable[..., Contender] = partial(replace, align=first_two if backward else first)
    result = {}
    if straight_through:
        result["torchops"] = make(selected, (basis, code[:, None]))
    elif not backward:
        result["torchops"] = make(packed, (basis, *torchops.stf_pack(values, indices, layer.basis_size)))
        result[FACTORED] = make(stf_linear, (basis, values, indices))
    else:
        result["torchops"] = make(stf_linear, (basis, values, indices))
    result[DENSE] = only_output(dense)
    result[LOW_RANK] = replace(make(eager.low_rank_linear, low_rank), align=None)
    run = partial(eager.dense_code_linear, transpose=transpose)
    by_dense_code = make(run, (basis.detach().clone(), code.detach().clone()))
    # The gradient to a dense code is that to the latent, but for the dimension of blocks.
    result[DENSE_CODE] = replace(by_dense_code, align=with_blocks) if straight_through else only_output(by_dense_code)
    return result


def first(results: Tensors) -> Tensors:
    """The output."""
    return results[:1]


def first_two(results: Tensors) -> Tensors:
    """The output and the gradient to the input."""
    return results[:2]


def with_blocks(results: Tensors) -> Tensors:
    """Everything, with the code's gradient, the last, in the shape of the latent's."""
    return (*results[:-1], results[-1][:, None])


def factors(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random ones, of a weight whose products have the size of their inputs."""
    latent = randn((layer.rows, 1, layer.basis_size), 2, torch.float32, device) / layer.nnz**0.5
    basis = randn((1, layer.basis_size, layer.cols), 3, torch.float32, device) / layer.cols**0.5
    values, indices = torchops.stf_select(latent.to(dtype), layer.nnz)
    return basis.to(dtype), values, indices


def randn(size: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# ---- findings -----------------------------------------------------------------------------------


def findings(report: Report) -> list[Finding]:
    """What "2x" in numbers is in bytes."""
    layers = [*BERT, SQUARE[0], SQUARE[2]]
    lines = []
    for layer in (replace(layer, compression=c) for layer in layers for c in COMPRESSIONS):
        dense = layer.in_features * layer.out_features
        stored = layer.basis_size * layer.cols + layer.rows * layer.nnz
        line = [str(layer), f"{layer.basis_size}", f"{layer.nnz}", f"{dense / stored:.2f}"]
        for dtype in (torch.bfloat16, torch.float32):
            size = dense * dtype.itemsize
            line += [f"{size / layer.packed_bytes(dtype):.2f}", f"{size / layer.indexed_bytes(dtype):.2f}"]
        lines.append(line)
    header = ["layer", "K", "nnz", "values only", "bf16 packed", "bf16 indices", "fp32 packed", "fp32 indices"]
    return [Finding("Bytes of the dense layer / bytes of the factored one", header, lines)]
