"""Selection by product quantization: calls that the contract makes, and calls that must fail."""

import math
from collections.abc import Iterator

import torch
from contract import Inputs, Invalid, OpCase, Sample, integers, random
from torch import Tensor

from torchops.reference import sparse_attention as reference

# ---- pq_encode ----------------------------------------------------------------------------------


def codebooks_of(subspaces: int, codewords: int, subspace: int, dtype: torch.dtype, device: str) -> Tensor:
    return random(subspaces, codewords, subspace, dtype=dtype, device=device, seed=1)


def encode_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    # Codewords are compared in groups of 16.
    for rows, (subspaces, codewords, subspace) in [
        ((2, 3, 70), (8, 16, 8)),
        ((3, 5), (1, 1, 1)),
        ((130,), (3, 17, 5)),
        ((2, 9), (2, 256, 33)),
        ((4, 2), (64, 7, 1)),
        ((), (4, 16, 8)),
        ((0, 3), (2, 16, 13)),
        ((2, 0), (2, 16, 13)),
        ((2, 3), (0, 16, 4)),
        ((2, 3), (2, 16, 0)),
    ]:
        inputs = {
            "input": random(*rows, subspaces * subspace, dtype=dtype, device=device),
            "codebooks": codebooks_of(subspaces, codewords, subspace, dtype, device),
        }
        yield Sample(f"{list(rows)}-M{subspaces}-E{codewords}-S{subspace}", inputs)
    heads = random(2, 30, 4, 16, dtype=dtype, device=device).transpose(1, 2)
    yield Sample("other-dtype", {"input": heads, "codebooks": codebooks_of(2, 16, 8, torch.float32, device).double()})
    # Many codewords are as near as the nearest.
    whole = {"input": integers(-2, 3, 40, 6, device=device), "codebooks": integers(-2, 3, 2, 40, 3, device=device)}
    yield Sample("ties", {name: numbers.to(dtype) for name, numbers in whole.items()})
    odd = random(6, 8, dtype=dtype, device=device)
    odd[0] = math.nan
    odd[1, 5] = math.nan
    odd[2, 1] = math.inf
    odd[3, 6] = -math.inf
    codebooks = codebooks_of(2, 20, 4, dtype, device)
    codebooks[0, 0, 0] = math.nan
    codebooks[0, 3] = math.inf
    codebooks[1, 18, 2] = -math.inf
    yield Sample("nan-inf", {"input": odd, "codebooks": codebooks})


def encode_invalid(device: str) -> Iterator[Invalid]:
    good = {
        "input": random(2, 5, 12, dtype=torch.float32, device=device),
        "codebooks": codebooks_of(3, 16, 4, torch.float32, device),
    }
    yield Invalid("scalar", good | {"input": good["input"][0, 0, 0]}, "expected input of shape [..., D], got []")
    yield Invalid(
        "dtype",
        good | {"input": good["input"].int()},
        "expected input of dtype Double, Float, BFloat16 or Half, got Int",
    )
    yield Invalid(
        "codebooks-rank",
        good | {"codebooks": good["codebooks"][0]},
        "expected codebooks of shape [M, E, D / M], got [16, 4]",
    )
    yield Invalid(
        "codebooks-dtype",
        good | {"codebooks": good["codebooks"].long()},
        "expected codebooks of dtype Double, Float, BFloat16 or Half, got Long",
    )
    for count in (0, 257):
        yield Invalid(
            f"E{count}",
            good | {"codebooks": codebooks_of(3, count, 4, torch.float32, device)},
            f"expected codebooks's second dimension in 1..256, got {count}",
        )
    yield Invalid(
        "not-divided",
        good | {"codebooks": codebooks_of(2, 16, 5, torch.float32, device)},
        "expected input's last dimension to be codebooks's M times D / M = 10, got 12",
    )


def encode_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return {
        "input": random(2, length, 24, dtype=dtype, device=device),
        "codebooks": codebooks_of(3, 20, 8, dtype, device),
    }


def encode_large(device: str) -> Inputs:
    rows = torch.empty(2**15 + 1, 2**10, 64, dtype=torch.bfloat16, device=device)
    return {"input": rows.normal_(), "codebooks": codebooks_of(8, 16, 8, torch.float32, device)}


# ---- pq_loss ------------------------------------------------------------------------------------


def loss_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in encode_samples(dtype, device):
        # Kinks and NaN are not for finite differences: gradcheck leaves out tensors of more than 400 numbers.
        if sample.id == "ties":
            whole = {"input": integers(-2, 3, 80, 6, device=device), "codebooks": sample.inputs["codebooks"]}
            yield Sample("ties", {name: numbers.to(dtype) for name, numbers in whole.items()})
        elif sample.id == "nan-inf":
            for row in (None, *range(4)):  # one at a time too, for one is enough to make the loss NaN
                odd = random(60, 8, dtype=dtype, device=device)
                codebooks = codebooks_of(2, 20, 4, dtype, device)
                if row is None:
                    codebooks = sample.inputs["codebooks"]
                else:
                    odd[7] = sample.inputs["input"][row]
                yield Sample(f"nan-inf-{row}", {"input": odd, "codebooks": codebooks})
        else:
            yield sample
    # Codewords that are parts: their distances are smaller than any that counts.
    codebooks = codebooks_of(3, 20, 5, dtype, device)
    rows = codebooks[:, :7].transpose(0, 1).flatten(1).repeat(10, 1)
    rows[::2] += random(35, 15, dtype=dtype, device=device) / 8
    yield Sample("near", {"input": rows, "codebooks": codebooks})


# ---- _pq_loss_backward --------------------------------------------------------------------------


def backward_inputs(inputs: Inputs, output_mask: tuple[bool, bool] = (True, True)) -> Inputs:
    dtype = torch.float64 if inputs["input"].dtype == torch.float64 else torch.float32
    grad = torch.tensor(0.75, dtype=dtype, device=inputs["input"].device)
    return {"grad": grad} | inputs | {"output_mask": output_mask}


def backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sample in loss_samples(dtype, device):
        yield Sample(sample.id, backward_inputs(sample.inputs))
    for mask in ((True, False), (False, True)):
        yield Sample(f"mask-{mask}", backward_inputs(encode_sized(dtype, device, 5), mask))


def backward_invalid(device: str) -> Iterator[Invalid]:
    good = backward_inputs(encode_sized(torch.float32, device, 3))
    yield Invalid("grad-shape", good | {"grad": good["grad"][None]}, "expected grad of shape [], got [1]")
    yield Invalid("grad-dtype", good | {"grad": good["grad"].double()}, "expected grad of dtype Float, got Double")
    yield Invalid("scalar", good | {"input": good["grad"]}, "expected input of shape [..., D], got []")


def backward_sized(dtype: torch.dtype, device: str, length: int) -> Inputs:
    return backward_inputs(encode_sized(dtype, device, length))


CASES = [
    OpCase(
        "pq_encode",
        encode_samples,
        encode_invalid,
        encode_sized,
        reference=reference.pq_encode,
        unbatched=("codebooks",),
        launches=1,
        large=encode_large,
    ),
    OpCase(
        "pq_loss",
        loss_samples,
        encode_invalid,
        encode_sized,
        reference=reference.pq_loss,
        differentiable=("input", "codebooks"),
        backward="_pq_loss_backward",
        unbatched=("codebooks",),
        launches=2,
    ),
    OpCase(
        "_pq_loss_backward",
        backward_samples,
        backward_invalid,
        backward_sized,
        unbatched=("grad", "codebooks"),
        launches=2,
    ),
]
