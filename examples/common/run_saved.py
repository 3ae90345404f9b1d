"""Loads what :func:`examples.common.export.save` wrote, with nothing but torch and torchops, and
compares outputs: ``python -m examples.common.run_saved FOLDER``. Exits with 1 when they differ by more
than rounding."""

import sys
from pathlib import Path

import torch

import torchops  # noqa: F401  (registers the operators that the saved models call)


def main(folder: Path) -> bool:
    models = {
        "TorchScript": torch.jit.load(folder / "scripted.pt"),
        "torch.export": torch.export.load(folder / "exported.pt2").module(),
    }
    all_close = True
    for name, model in models.items():
        for batch in ("all", "one"):
            expected = torch.load(folder / f"output_{batch}.pt")
            with torch.inference_mode():
                output = model(torch.load(folder / f"input_{batch}.pt"))
            difference = (output - expected).abs().max().item()
            verdict = "equal bit for bit" if output.equal(expected) else f"largest difference {difference:.1e}"
            print(f"{name}, output of shape {list(output.shape)}: {verdict}")
            all_close &= output.allclose(expected, rtol=1e-4, atol=1e-4)
    return all_close


if __name__ == "__main__":
    sys.exit(0 if main(Path(sys.argv[1])) else 1)
