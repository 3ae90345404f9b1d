"""Antibodies of one human, from a package that carries them: variable regions of heavy chains, from before a flu
vaccination and after it (Laserson and others, 2014)."""

import csv
import gzip
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Families of V genes whose sequences are only for testing. Those of one family are alike in most positions.
HELD_OUT = ("IGHV2", "IGHV4", "IGHV6")
GAP = "..."
# The standard genetic code, bases in the order of its tables; * ends a protein.
AMINO_ACIDS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
CODE = dict(zip(map("".join, itertools.product("TCAG", repeat=3)), AMINO_ACIDS, strict=True))


@dataclass
class Sequences:
    """Amino acids to fit layers to, and others to test on, of genes of other families."""

    typical: list[str]
    held_out: list[str]


def load(path: Path, num_typical: int, num_held_out: int) -> Sequences:
    """Reads the table, and draws as many sequences, of different cells' descendants (clones) all of them."""
    sides: dict[bool, list[str]] = {False: [], True: []}
    clones = set()
    for row in rows(path):
        sequence, families = translate(row["sequence_alignment"]), set(re.findall(r"IGHV\d+", row["v_call"]))
        if sequence is None or len(families) != 1 or row["clone_id"] in clones:
            continue
        clones.add(row["clone_id"])
        sides[families.pop() in HELD_OUT].append(sequence)
    generator = random.Random(0)
    return Sequences(generator.sample(sides[False], num_typical), generator.sample(sides[True], num_held_out))


def rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        yield from csv.DictReader(file, delimiter="\t")


def translate(alignment: str) -> str | None:
    """The amino acids of aligned bases, whose gaps are whole codons; None where a base is missing or a protein would
    end."""
    codons = [alignment[start : start + 3] for start in range(0, len(alignment) - 2, 3)]
    amino_acids = [CODE.get(codon, "*") for codon in codons if codon != GAP]
    return None if "*" in amino_acids else "".join(amino_acids)
