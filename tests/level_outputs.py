"""What the kernels of the CPU level in use make of the case tables' inputs, with a NaN in one of them by turns.

Run as a program, writes it to a file, for tests/test_levels.py to compare levels with each other.
"""

import sys
from collections.abc import Iterator

import torch
from cases import PUBLIC
from contract import FLOATS, Inputs, OpCase, outputs_of
from torch import Tensor


def with_a_nan(case: OpCase, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The inputs as they are, then with a NaN in the middle of each that is made of numbers."""
    yield "", inputs
    # From a key or value that some queries see it may reach those that share a tile with them, which levels cut
    # differently (docs/span_attention.md).
    near = ("key", "value") if case.name.startswith("span_attention") else ()
    for name, value in inputs.items():
        if name in near:
            continue
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0:
            changed = value.clone(memory_format=torch.contiguous_format)
            changed.view(-1)[changed.numel() // 2] = torch.nan
            yield f", a NaN in {name}", inputs | {name: changed}


def outputs_of_level() -> dict[str, list[Tensor]]:
    """By operator, dtype and call; nothing where the call is refused."""
    outputs = {}
    for case in PUBLIC:
        for dtype in FLOATS:
            for sample in case.samples(dtype, "cpu"):
                for what, inputs in with_a_nan(case, sample.inputs):
                    call = f"{case}, {dtype}, {sample.id}{what}"
                    try:
                        outputs[call] = [result.detach() for result in case.compared(outputs_of(case.op(**inputs)))]
                    except ValueError:
                        outputs[call] = []
    return outputs


if __name__ == "__main__":
    torch.save(outputs_of_level(), sys.argv[1])
