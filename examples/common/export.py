"""Saves a model for use without its source code, and checks that what was saved computes the same."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import torchops

from .report import console

EXAMPLES = Path(__file__).resolve().parent.parent


def save_and_check(model: nn.Module, inputs: Tensor, folder: Path, cpp_build: Path) -> None:
    """Saves the model in both forms, and runs them in a fresh Python process and in a C++ program, which is
    built in the folder ``cpp_build``. Raises if one of them does not compute the same."""
    console.print(f"Saving it as TorchScript and with torch.export, in {folder}.")
    save(model, inputs, folder)
    console.print("Running both in a fresh Python process.")
    check_in_fresh_process(folder)
    console.print("Running the TorchScript model from a C++ program, without Python.")
    check_from_cpp(folder, cpp_build)


def save(model: nn.Module, inputs: Tensor, folder: Path) -> None:
    """Writes the model as TorchScript (scripted.pt) and as an exported program with a dynamic batch
    (exported.pt2), and two batches of inputs with the model's outputs: all inputs, and the first alone."""
    torch.jit.script(model).save(str(folder / "scripted.pt"))
    dynamic_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (inputs,), dynamic_shapes=dynamic_batch)
    torch.export.save(program, folder / "exported.pt2")
    for name, batch in {"all": inputs, "one": inputs[:1]}.items():
        with torch.inference_mode():
            output = model(batch)
        torch.save(batch.clone(), folder / f"input_{name}.pt")
        torch.save(output, folder / f"output_{name}.pt")


def check_in_fresh_process(folder: Path) -> None:
    """Runs both saved forms in a Python process that knows torch and torchops, but not the model."""
    _run([sys.executable, "-m", "examples.common.run_saved", str(folder)], cwd=EXAMPLES.parent)


def check_from_cpp(folder: Path, build: Path) -> None:
    """Runs the scripted model in examples/cpp, which is built in the folder ``build``."""
    program = build_cpp(build)
    if program is None:
        return
    for batch in ("all", "one"):
        files = [folder / "scripted.pt", folder / f"input_{batch}.pt", folder / f"output_{batch}.pt"]
        _run([str(program), *map(str, files)])


@functools.cache  # one program for all tracks
def build_cpp(build: Path) -> Path | None:
    """Builds examples/cpp in the folder ``build``; None if there is nothing to build it with."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path)
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0], path=path)
    if cmake is None or compiler is None:
        missing = "cmake" if cmake is None else "a C++ compiler"
        console.print(f"  skipped: {missing} is not installed, and the C++ program needs to be compiled.")
        return None
    shutil.rmtree(build, ignore_errors=True)  # it may remember another torch
    prefixes = f"{torchops.utils.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    configure = [cmake, "-S", str(EXAMPLES / "cpp"), "-B", str(build)]
    _run([*configure, "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefixes}"], show=False)
    _run([cmake, "--build", str(build)], show=False)
    return build / "run_scripted"


def _run(command: list[str], cwd: Path | None = None, show: bool = True) -> None:
    """Runs a program to its end, and shows its output if asked to or if it fails."""
    finished = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if show or finished.returncode != 0:
        for line in finished.stdout.splitlines():
            console.print(f"  {line}", markup=False, soft_wrap=True)
    if finished.returncode != 0:
        raise RuntimeError(f"exit status {finished.returncode} from: {' '.join(command)}")
