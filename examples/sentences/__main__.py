"""Factored linear layers in a real model: all-MiniLM-L6-v2, at three compressions, before and after training.

python -m examples.sentences            everything, minutes
python -m examples.sentences --short    every step, none of them for long
python -m examples.sentences --docs     everything, and what came out goes to docs/factored_minilm.md
"""

import argparse
from pathlib import Path

import torchops

from ..common.report import console
from . import run
from .page import write_page


def main() -> None:
    examples = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run every step for a short time only")
    parser.add_argument("--docs", action="store_true", help="put tables and plot into the documentation")
    parser.add_argument("--output", type=Path, default=examples / "output", help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.short and arguments.docs:
        parser.error("what goes into the documentation comes from a whole run, not from a short one")
    torchops.show_config()
    tables, image = run(arguments.short, arguments.output)
    if arguments.docs:
        console.print(f"Wrote {write_page(tables, image, examples.parent / 'docs')}.")


if __name__ == "__main__":
    main()
