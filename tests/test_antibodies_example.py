"""The antibodies example, with a tiny BERT of random weights in place of the real one, and made-up sequences."""

import csv
import gzip
import itertools
import random
from pathlib import Path

import pytest
import torch

for package in ("transformers", "rich", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}", exc_type=ImportError)

import transformers  # noqa: E402

from examples.antibodies import data, track  # noqa: E402
from examples.antibodies.model import AMINO_ACIDS, FIRST, MASK, PAD, MaskedLanguageModel, tokenize  # noqa: E402
from examples.common.encoders import linear_weights  # noqa: E402
from examples.common.packages import file_in  # noqa: E402

GENES = ["IGHV3-23*01", "Homsap IGHV4-34*01 F", "IGHV1-2*02,IGHV1-3*01", "IGHV2-5*01"]


@pytest.fixture(name="model")
def _model() -> MaskedLanguageModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=FIRST + len(AMINO_ACIDS),
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=2,
        num_hidden_layers=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = transformers.BertForMaskedLM(config)
    model = MaskedLanguageModel(bert.bert, bert.cls).eval()
    for weight in linear_weights(model).values():
        torch.nn.init.normal_(weight, std=0.3)  # their own start is so small that nearly nothing depends on them
    return model


def sequences(count: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(AMINO_ACIDS, k=generator.randint(20, 40))) for _ in range(count)]


def write_table(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Of genes, clones and bases."""
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["v_call", "clone_id", "sequence_alignment"])
        writer.writerows(rows)
    return path


def bases_of(sequence: str) -> str:
    codon_of = {amino_acid: codon for codon, amino_acid in data.CODE.items()}
    return "".join(codon_of[amino_acid] for amino_acid in sequence)


def test_padding_changes_nothing(model: MaskedLanguageModel) -> None:
    tokens = tokenize(["ACDEFG", "WY"])
    assert tokens.tolist() == [[2, 5, 6, 7, 8, 9, 10, 3], [2, 23, 24, 3, PAD, PAD, PAD, PAD]]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens)[1:, :4], model(tokens[1:, :4]))
        assert model.scores(model(tokens)).shape == (2, 8, 20)


def test_maskings_of_a_sequence_have_nothing_in_common() -> None:
    texts = sequences(70)
    batches = track.batches_of(texts, 3, seed=0)
    assert sorted(torch.cat([batch.sequence for batch in batches[::3]]).tolist()) == list(range(70))
    for first, second, third in zip(*[iter(batches)] * 3, strict=True):
        are_masked = torch.stack([batch.masked.eq(MASK) for batch in (first, second, third)])
        assert are_masked.sum(0).max() == 1
        assert first.tokens[are_masked.any(0)].ge(FIRST).all()
        torch.testing.assert_close(second.masked[~are_masked[1]], first.tokens[~are_masked[1]])
        for row, sequence in enumerate(first.sequence.tolist()):
            num_masked = are_masked[:, row].sum(1)
            torch.testing.assert_close(num_masked, torch.full((3,), 0.15 * len(texts[sequence])).long(), atol=1, rtol=0)
        assert tokenize([texts[first.sequence[0]]])[0].equal(first.tokens[0][first.tokens[0] != PAD])


def test_quality_is_that_of_each_sequence_by_itself(model: MaskedLanguageModel) -> None:
    texts = sequences(40)
    examination = track.Examination(texts, model)
    quality = examination.examine(model)
    assert quality.cosine == pytest.approx(1)
    with torch.inference_mode():
        for batch in examination.batches[:2]:  # two maskings of the same
            scores = model.scores(model(batch.masked))
            batch.loss = torch.nn.functional.cross_entropy(
                scores.transpose(1, 2), (batch.tokens - FIRST).clamp(min=0), reduction="none"
            )
            batch.hit = scores.argmax(2).eq(batch.tokens - FIRST).float()
    for row, sequence in enumerate(examination.batches[0].sequence.tolist()):
        masked = [(batch.masked[row] == MASK, batch) for batch in examination.batches[:2]]
        losses = torch.cat([batch.loss[row][is_masked] for is_masked, batch in masked])
        hits = torch.cat([batch.hit[row][is_masked] for is_masked, batch in masked])
        assert quality.losses[sequence] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert quality.hits[sequence] == pytest.approx(hits.mean().item())
    assert quality.loss == pytest.approx(sum(quality.losses) / 40)


def test_sequences_held_out_are_of_other_families_and_of_clones_of_their_own(tmp_path: Path) -> None:
    rows = [
        (gene, f"{gene} {number // 2}", bases_of(f"{AMINO_ACIDS[place]}{AMINO_ACIDS[number]}W"))
        for place, gene in enumerate(GENES)
        for number in range(20)
    ]
    rows += [("IGHV3-23*01,IGHV4-34*01", f"both {number}", bases_of("YYY")) for number in range(20)]
    loaded = data.load(write_table(tmp_path / "table.tsv.gz", rows), 20, 20)
    assert {sequence[0] for sequence in loaded.typical} == {"A", "D"}
    assert {sequence[0] for sequence in loaded.held_out} == {"C", "E"}
    assert len(set(loaded.typical)) == len(set(loaded.held_out)) == 20
    assert {sequence[1] for sequence in loaded.typical + loaded.held_out} == set(AMINO_ACIDS[::2])


def test_translation() -> None:
    assert data.translate("ATGGCC...TGGA") == "MAW"
    assert bases_of(AMINO_ACIDS) and data.translate(bases_of(AMINO_ACIDS)) == AMINO_ACIDS
    assert [data.translate(bases) for bases in ("ATGTAAGCC", "ATGNCC", "ATGG..GCC")] == [None] * 3
    # Biopython's table 1 counts as many codons of each.
    counts = {amino_acid: list(data.CODE.values()).count(amino_acid) for amino_acid in "LRSMW*"}
    assert counts == {"L": 6, "R": 6, "S": 6, "M": 1, "W": 1, "*": 3}


def test_short_run(model: MaskedLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genes = itertools.cycle(GENES)
    rows = [(next(genes), f"{number}", bases_of(text)) for number, text in enumerate(sequences(80))]
    table = write_table(tmp_path / "table.tsv.gz", rows)
    monkeypatch.setattr(track, "load", lambda: (model, table))
    (weights, quality), image = track.run(short=True, output=tmp_path)
    assert image.stat().st_size > 0 and (tmp_path / "antibodies" / "results.json").exists()
    assert [row[0] for row in weights.rows] == ["32 x 32", "128 x 32", "32 x 128"]
    assert [row[0] for row in quality.rows] == ["dense", *(f"{name} 2x" for name in track.SERIES[1:])]
    cosine_of = {row[0]: float(row[6]) for row in quality.rows}
    assert cosine_of["dense"] == 1
    assert cosine_of["factored by weights 2x"] < cosine_of["factored 2x"] < 1
    assert cosine_of["low rank by weights 2x"] < cosine_of["low rank 2x"] < 1
    for row in quality.rows[1:]:
        assert float(row[1].partition("(")[2].rstrip("x)")) >= 2


def test_files_of_packages_are_checked() -> None:
    with pytest.raises(SystemExit, match="No package 'no_such_package'.\npip install it"):
        file_in("no_such_package", "file", "", "pip install it")
    with pytest.raises(SystemExit, match="not the file that was expected"):
        file_in("torchops", "version.txt", "0" * 64, "pip install it")
    with pytest.raises(SystemExit, match="no such file"):
        file_in("torchops", "none.txt", "0" * 64, "pip install it")
