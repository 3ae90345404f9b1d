"""Factored linear layers in a real model: all-MiniLM-L6-v2, at three compressions, before and after training.

python -m examples.sentences            everything, minutes
python -m examples.sentences --short    every step, none of them for long
python -m examples.sentences --docs     everything, and what came out goes to docs/factored_minilm.md
"""

from ..common.command import DOCS, main
from ..common.page import Page
from . import run

PAGE = Page(
    DOCS / "factored_minilm.md",
    "python -m examples.sentences --docs",
    "Errors of the weights, quality and time over compression",
)

if __name__ == "__main__":
    main(__doc__, run, PAGE)
