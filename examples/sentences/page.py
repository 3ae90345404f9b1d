"""Puts tables and plot of a run into the documentation."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import torchops
from torchops.benchmarks.harness.machine import cpu_name

BEGIN, END = "<!-- figures: python -m examples.sentences --docs -->", "<!-- end of figures -->"


@dataclass
class Table:
    """A title, sentences about it, and cells."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        columns = [" ".join(column.split()) for column in self.columns]
        lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *self.rows]
        cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {self.title}\n\n{self.caption}\n\n{cells}\n"


def write_page(tables: Sequence[Table], image: Path, docs: Path) -> Path:
    """Copies the plot into docs/images, and writes the tables between the two marks of the page."""
    page = docs / "factored_minilm.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"expected {page} to have the marks {BEGIN} and {END}, got a page without them")
    shutil.copyfile(image, docs / "images" / "sentences.png")
    plot = "![Errors of the weights, quality and time over compression](images/sentences.png)\n"
    section = "\n".join([machine(), plot, *(table.markdown() for table in tables)])
    page.write_text(f"{before}{begin}\n\n{section}\n{end}{after}")
    return page


def machine() -> str:
    return (
        f"{cpu_name()}, {torch.get_num_threads()} thread(s), {torchops.utils.config()['CPU level']}; torch"
        f" {torch.__version__}.\n"
    )
