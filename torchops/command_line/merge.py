"""``python -m torchops merge``."""

import argparse
import ast
import copy
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .errors import CommandError, need, user_errors

HELP = "export a timm Vision Transformer that merges its tokens (ToMe)"
DESCRIPTION = """\
Lets each block of a timm Vision Transformer merge its most similar tokens
(torchops.integrations.timm.apply_token_merging), and saves the model as a
program. Merging has no weights, so that no checkpoint can carry it: OUT.pt2 is
a program of torch.export, OUT.pt one of TorchScript, both for any batch size.
Who loads one imports torchops first, or loads torchops.utils.library_path."""
EXAMPLES = """\
examples:
  python -m torchops merge vit_base_patch16_224 -o merged.pt2 --r 16
  python -m torchops merge vit_tiny_patch16_224 -o merged.pt --r 8 \\
      --checkpoint own.pth --model-kwargs num_classes=10"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder that timm.models.save_for_hf wrote, or a name that timm knows: with its pretrained weights, or "
        "those of --checkpoint",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a new file *.pt2 or *.pt")
    parser.add_argument(
        "--r", type=int, nargs="+", required=True, metavar="R", help="tokens that each block merges, or one for all"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for a model given by name")
    parser.add_argument(
        "--model-kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="more arguments of timm.create_model"
    )


def run(arguments: argparse.Namespace) -> int:
    need("timm", "timm")
    if arguments.output.suffix not in (".pt2", ".pt") or arguments.output.exists():
        raise CommandError(f"--output: expected a new file *.pt2 or *.pt, got {arguments.output}")
    model = load(arguments)
    with user_errors():
        from ..integrations.timm import apply_token_merging, remove_token_merging

        apply_token_merging(model, arguments.r[0] if len(arguments.r) == 1 else arguments.r)
    images = torch.randn(2, model.pretrained_cfg["input_size"][0], *model.patch_embed.img_size)
    before = operations(remove_token_merging(copy.deepcopy(model)), images[:1])
    tokens = ", ".join(map(str, tokens_behind_blocks(model, images[:1])))
    print(textwrap.fill(f"tokens behind the blocks: {tokens}", 80, subsequent_indent="  "))
    print(f"operations of an image: {operations(model, images[:1]) / 1e9:.3g} GFLOP (before: {before / 1e9:.3g})")
    with user_errors():
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        saved = save(model, images, arguments.output)
    with torch.no_grad():
        difference = (saved(images) - model(images)).abs().max().item()
    print(f"Written: {arguments.output}, whose outputs differ from the model's by at most {difference:.1e}")
    return 0


def load(arguments: argparse.Namespace) -> Any:
    """In evaluation mode."""
    with user_errors():
        import timm
    folder = Path(arguments.model)
    if folder.is_dir():
        if arguments.checkpoint:
            raise CommandError(f"--checkpoint: expected MODEL to be a name then, got the folder {folder}")
        config = folder / "config.json"
        if not config.is_file() or "architecture" not in json.loads(config.read_text()):
            raise CommandError(
                f"{folder}: expected a folder of timm.models.save_for_hf, got one without its config.json"
            )
    elif arguments.checkpoint and not arguments.checkpoint.is_file():
        raise CommandError(f"--checkpoint: there is no file {arguments.checkpoint}")
    name = f"local-dir:{folder}" if folder.is_dir() else arguments.model
    with user_errors(Exception):  # of many kinds, from hubs and files
        model = timm.create_model(
            name, pretrained=not arguments.checkpoint, **dict(map(keyword, arguments.model_kwargs))
        )
    if arguments.checkpoint:
        try:
            timm.models.load_checkpoint(model, str(arguments.checkpoint))
        except Exception as error:  # one of torch lists all weights
            raise CommandError(
                f"--checkpoint: {arguments.checkpoint} has no weights of {name} as it is made here (num_classes,"
                f" img_size and the like go into --model-kwargs): {str(error).splitlines()[0]}"
            ) from error
    return model.eval()


def keyword(word: str) -> tuple[str, Any]:
    name, _, value = word.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def operations(model: Any, images: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def tokens_behind_blocks(model: Any, images: Tensor) -> list[int]:
    found: list[int] = []
    hooks = [
        block.register_forward_hook(lambda block, arguments, output: found.append(output.shape[1]))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def save(model: Any, images: Tensor, path: Path) -> Any:
    """Returns what is loaded again."""
    if path.suffix == ".pt":
        torch.jit.script(model).save(str(path))
        return torch.jit.load(str(path))
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), path)
    return torch.export.load(path).module()
