"""Factored linear layers in a larger real model: AntiBERTy, at three compressions, not trained afterwards.

python -m examples.antibodies            everything, minutes
python -m examples.antibodies --short    every step, none of them for long
python -m examples.antibodies --docs     everything, and what came out goes to docs/factored_antiberty.md
"""

from ..common.command import DOCS, main
from ..common.page import Page
from . import run

PAGE = Page(
    DOCS / "factored_antiberty.md",
    "python -m examples.antibodies --docs",
    "Cross entropy and cosine over compression",
)

if __name__ == "__main__":
    main(__doc__, run, PAGE)
