"""python -m torchops merge: programs that merge tokens."""

from pathlib import Path

import pytest
import torch
from test_command_line import fails
from torch import nn

from torchops.command_line import main

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm", exc_type=ImportError)

from torchops.integrations.timm import apply_token_merging  # noqa: E402

NAME = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 5}


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model(NAME, **ARGUMENTS).eval()


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_merge(suffix: str, model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm.models.save_for_hf(model, tmp_path / "vit", model_args=ARGUMENTS, safe_serialization=False)
    out = tmp_path / f"merged{suffix}"
    assert main(["merge", str(tmp_path / "vit"), "-o", str(out), "--r", "4", "2"]) == 0
    shown = capsys.readouterr().out
    assert "tokens behind the blocks: 13, 11\n" in shown and "differ from the model's by at most" in shown
    program = torch.jit.load(out) if suffix == ".pt" else torch.export.load(out).module()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program(images), apply_token_merging(model, [4, 2])(images))


def test_merge_with_a_checkpoint(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = str(tmp_path / "own.pth"), str(tmp_path / "merged.pt")
    torch.save(model.state_dict(), weights)
    arguments = [f"{name}={value}" for name, value in ARGUMENTS.items()]
    command = ["merge", NAME, "-o", out, "--checkpoint", weights, "--r", "3"]
    message = fails(capsys, *command)
    assert "has no weights of vit_tiny_patch16_224 as it is made here" in message and "--model-kwargs" in message
    assert main([*command, "--model-kwargs", *arguments]) == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(out)(images), apply_token_merging(model, 3)(images))


def test_merge_refuses(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "merged.pt"), "--r", "4"]
    assert "expected a new file *.pt2 or *.pt" in fails(capsys, "merge", NAME, "-o", "model.onnx", "--r", "4")
    assert "there is no file no.pth" in fails(capsys, "merge", NAME, *out, "--checkpoint", "no.pth")
    assert "expected a folder of timm.models.save_for_hf" in fails(capsys, "merge", str(tmp_path), *out)
    assert "Unknown model" in fails(capsys, "merge", "no_such_vit", *out)
    timm.models.save_for_hf(model, tmp_path / "vit", model_args=ARGUMENTS, safe_serialization=False)
    assert "0 or more in every block" in fails(capsys, "merge", str(tmp_path / "vit"), *out[:-1], "-4")
    resnet = timm.create_model("test_resnet")
    timm.models.save_for_hf(resnet, tmp_path / "resnet", safe_serialization=False)
    assert "model is a timm.models.resnet.ResNet" in fails(capsys, "merge", str(tmp_path / "resnet"), *out)
