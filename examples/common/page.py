"""Tables and plot of a run, and the page of the documentation that they go to."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import torchops
from torchops.benchmarks.harness.machine import cpu_name

from .report import print_table


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

    def show(self) -> None:
        print_table(self.title, self.caption, self.columns, self.rows)


@dataclass
class Page:
    """Where the figures of a run go: between two marks, of which the first names the command that writes them.

    Args:
        path: a page of the documentation, beside whose folder of images the plot goes.
        command: what writes it.
        plot_shows: what stands in place of the plot where it cannot be seen.
    """

    path: Path
    command: str
    plot_shows: str
    end = "<!-- end of figures -->"

    @property
    def begin(self) -> str:
        return f"<!-- figures: {self.command} -->"

    def write(self, tables: Sequence[Table], plot: Path) -> None:
        before, begin, rest = self.path.read_text().partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not end:
            raise ValueError(
                f"expected {self.path} to have the marks {self.begin} and {self.end}, got a page without them"
            )
        shutil.copyfile(plot, self.path.parent / "images" / plot.name)
        image = f"![{self.plot_shows}](images/{plot.name})\n"
        section = "\n".join([machine(), image, *(table.markdown() for table in tables)])
        self.path.write_text(f"{before}{begin}\n\n{section}\n{end}{after}")


def machine() -> str:
    return (
        f"{cpu_name()}, {torch.get_num_threads()} thread(s), {torchops.utils.config()['CPU level']}; torch"
        f" {torch.__version__}.\n"
    )
