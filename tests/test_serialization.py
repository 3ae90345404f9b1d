"""TorchScript and torch.export: save here, load in a fresh process that knows only torch and torchops."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from contract import Inputs, OpCase, given, outputs_of, require_grad

import torchops

FRESH_PROCESS = """
import sys
from pathlib import Path

import torch
import torchops

for folder in sorted(Path(sys.argv[1]).iterdir()):
    calls = torch.load(folder / "calls.pt")
    scripted = torch.jit.load(folder / "scripted.pt")
    exported = torch.export.load(folder / "exported.pt2").module()
    for inputs, expected, cotangents, gradients in calls:
        for name, program in (("scripted", lambda inputs: scripted(**inputs)), ("exported", exported)):
            leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
            outputs = program(inputs)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            for one, other in zip(outputs, expected, strict=True):
                assert torch.equal(one, other), (folder.name, name)
            if leaves:
                wanted = [out for out in outputs if out.requires_grad]
                for one, other in zip(torch.autograd.grad(wanted, leaves, cotangents), gradients, strict=True):
                    assert torch.equal(one, other), (folder.name, name, "gradient")
    print(folder.name)
"""


class Call(torch.nn.Module):
    """The operator as a module, for torch.export."""

    def __init__(self, case: OpCase) -> None:
        super().__init__()
        self.case = case

    def forward(self, inputs: Inputs) -> Any:
        return self.case.op(**inputs)


def save(case: OpCase, folder: Path, calls: list[Inputs]) -> None:
    folder.mkdir()
    # A function that was scripted and saved forgets its defaults, so every argument is given.
    defaults = {argument.name: argument.default_value for argument in case.overload._schema.arguments}
    calls = [defaults | inputs for inputs in calls]
    torch.jit.script(getattr(torchops, case.name)).save(str(folder / "scripted.pt"))
    # The batch is dynamic; lengths are bound to the integers of the call (r, k, num_groups).
    batch = torch.export.Dim("batch", min=case.least_batch)
    dynamic = {
        name: {0: batch} if isinstance(value, torch.Tensor) and name not in case.unbatched else None
        for name, value in calls[0].items()
    }
    program = torch.export.export(Call(case), (calls[0],), dynamic_shapes={"inputs": dynamic})
    torch.export.save(program, folder / "exported.pt2")

    records = []
    for call in calls:
        leaves = given(call, case.differentiable)
        call = require_grad(call, leaves)
        outputs = outputs_of(case.op(**call))
        wanted = [out for out in outputs if out.requires_grad]
        cotangents = [torch.ones_like(out) for out in wanted]
        gradients = torch.autograd.grad(wanted, [call[name] for name in leaves], cotangents) if leaves else ()
        records.append((call, [out.detach() for out in outputs], cotangents, list(gradients)))
    torch.save(records, folder / "calls.pt")


def twice_the_batch(case: OpCase, inputs: Inputs) -> Inputs:
    batched = {name: v for name, v in inputs.items() if isinstance(v, torch.Tensor) and name not in case.unbatched}
    return inputs | {name: torch.cat([v, v.flip(0)]) for name, v in batched.items()}


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    """All operators saved, then loaded and called by one fresh process."""
    folder = tmp_path_factory.mktemp("saved")
    for case in cases.PUBLIC:
        inputs = case.sized(torch.float32, "cpu", 24)
        save(case, folder / case.name, [inputs, twice_the_batch(case, inputs)])
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.way("TorchScript")
@pytest.mark.way("torch.export")
@cases.PUBLIC_OPS
def test_script_and_export_load_in_a_fresh_process(case: OpCase, fresh_process: subprocess.CompletedProcess) -> None:
    assert case.name in fresh_process.stdout.split(), fresh_process.stderr[-3000:]
