"""Calls of many operators as one exported program: what takes long in compiling a program is then done once."""

from collections.abc import Iterable
from typing import Any

import torch
from contract import Inputs, OpCase, outputs_of
from test_serialization import twice_the_batch
from torch import Tensor


class Calls(torch.nn.Module):
    """From the arguments of each operator, by its name, to its outputs."""

    def __init__(self, operators: Iterable[OpCase]) -> None:
        super().__init__()
        self.cases = {case.name: case for case in operators}
        self.inputs = {name: case.sized(torch.float32, "cpu", 24) for name, case in self.cases.items()}

    def forward(self, inputs: dict[str, Inputs]) -> dict[str, list[Tensor]]:
        return {name: outputs_of(case.op(**inputs[name])) for name, case in self.cases.items()}

    def exported(self) -> torch.export.ExportedProgram:
        """Each operator has a dynamic batch of its own."""
        dynamic: dict[str, Any] = {}
        for name, case in self.cases.items():
            batch = torch.export.Dim(f"batch_of_{name}", min=case.least_batch)
            dynamic[name] = {
                argument: {0: batch} if isinstance(value, Tensor) and argument not in case.unbatched else None
                for argument, value in self.inputs[name].items()
            }
        return torch.export.export(self, (self.inputs,), dynamic_shapes={"inputs": dynamic})

    def twice_the_batch(self) -> dict[str, Inputs]:
        return {name: twice_the_batch(case, self.inputs[name]) for name, case in self.cases.items()}
