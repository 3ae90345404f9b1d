"""The command line of an example whose figures stand in the documentation."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torchops

from .page import Page, Table
from .report import console

EXAMPLES = Path(__file__).resolve().parent.parent
DOCS = EXAMPLES.parent / "docs"


def main(text: str, run: Callable[[bool, Path], tuple[Sequence[Table], Path]], page: Page) -> None:
    """Runs an example as the arguments of the command ask for.

    Args:
        text: for --help.
        run: of whether it is to be short, and the folder to write to; returns tables, and the plot's file.
        page: where these go with --docs.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run every step for a short time only")
    parser.add_argument("--docs", action="store_true", help="put tables and plot into the documentation")
    parser.add_argument("--output", type=Path, default=EXAMPLES / "output", help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.short and arguments.docs:
        parser.error("what goes into the documentation comes from a whole run, not from a short one")
    torchops.show_config()
    tables, plot = run(arguments.short, arguments.output)
    if arguments.docs:
        page.write(tables, plot)
        console.print(f"Wrote {page.path}.")
