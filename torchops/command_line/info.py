"""What this copy of torchops is and what it finds."""

import argparse
import importlib.metadata
import pkgutil
import platform
import textwrap
from importlib import import_module

import torch

import torchops
from torchops import ops

HELP = "what this copy is, what it runs on, and its operators"
DESCRIPTION = "Prints what this copy of torchops is and runs on, and its operators by family."
EXAMPLES = "example:\n  python -m torchops info"

INTEGRATIONS = ("timm", "transformers", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    torchops.show_config()
    show("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    show("devices", ", ".join(devices()))
    show("integrations", ", ".join(f"{name} {version(name)}" for name in INTEGRATIONS))
    for family, names in operators().items():
        show(family, ", ".join(names))
    return 0


def show(name: str, value: str) -> None:
    """As show_config does, in lines of 80 columns."""
    print(textwrap.fill(value, 80, initial_indent=f"{name + ':':21}", subsequent_indent=" " * 21))


def devices() -> list[str]:
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"CPU, {torch.get_num_threads()} threads", *(cuda or ["no CUDA device"])]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def operators() -> dict[str, list[str]]:
    """Those of each family."""
    families = {
        module.name: [
            name for name in import_module(f"torchops.ops.{module.name}").__all__ if hasattr(torch.ops.torchops, name)
        ]
        for module in pkgutil.iter_modules(ops.__path__)
    }
    # A family may have its functions in several modules: one has them all.
    return {
        name: names
        for name, names in families.items()
        if not any(set(names) < set(others) for others in families.values())
    }
