"""Copies of kernels with mistakes built in, one of which is made where SIMT_MISTAKE names it (engine/mistakes.h).

build_in_mistakes.py <table> <csrc> <folder> writes the files that the table changes below the folder and prints the
names of the original ones, for CMake. A mistake that cannot be built in is left out: tests/test_mutations.py fails."""

import json
import sys
from collections import defaultdict
from pathlib import Path

Mutation = dict[str, str]


def place(kernel: str, mutation: Mutation) -> int | None:
    """Where the text begins, which must be there exactly once."""
    text, within = mutation["text"], mutation.get("within", mutation["text"])
    if kernel.count(within) != 1 or within.count(text) != 1:
        return None
    return kernel.index(within) + within.index(text)


def choice(mutation: Mutation) -> str:
    """Between statements, or else between expressions."""
    made, text, replacement = f"torchops::simt::mistakes::{mutation['name']}", mutation["text"], mutation["replacement"]
    if text.endswith(";"):
        return f"if ({made}) {{ {replacement} }} else {{ {text} }}"
    return f"({made} ? ({replacement}) : ({text}))"


def with_mistakes(kernel: str, mutations: list[Mutation]) -> tuple[str, list[str]]:
    """The changed text, and the names of the mistakes in it."""
    changed, done, names = '#include "mistakes.h"\n', 0, []
    places = [(place(kernel, mutation), mutation) for mutation in mutations]
    for begin, mutation in sorted(places, key=lambda item: item[0] or 0):
        if begin is None or begin < done:
            problem = "not exactly once in" if begin is None else "part of another's in"
            print(f"Mistake {mutation['name']} is left out: its text is {problem} {mutation['file']}.", file=sys.stderr)
            continue
        changed += kernel[done:begin] + choice(mutation)
        done = begin + len(mutation["text"])
        names.append(mutation["name"])
    return changed + kernel[done:], names


def main(table: Path, sources: Path, folder: Path) -> None:
    mutations_of = defaultdict(list)
    for mutation in json.loads(table.read_text()):
        mutations_of[mutation["file"]].append(mutation)
    # All copies include it: a kernel's first copy is a file that no program depends on yet, and this one changes too.
    header = '#pragma once\n\n#include "engine/mistakes.h"\n\nnamespace torchops::simt::mistakes {\n'
    files = {}
    for file, mutations in mutations_of.items():
        print(sources / file, end=";")
        files[file], names = with_mistakes((sources / file).read_text(), mutations)
        header += "".join(f'inline const bool {name} = is_to_be_made("{name}");\n' for name in names)
    files["mistakes.h"] = header + "}\n"
    for file, text in files.items():
        copy = folder / file
        if not copy.exists() or copy.read_text() != text:  # what did not change is not compiled again
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
    for copy in folder.rglob("*"):
        if copy.is_file() and str(copy.relative_to(folder)) not in files:
            copy.unlink()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
