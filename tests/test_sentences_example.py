"""The sentences example, with a tiny BERT of random weights in place of the real one."""

import copy
from pathlib import Path

import pytest
import torch

import torchops

for package in ("transformers", "rich", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}", exc_type=ImportError)

import transformers  # noqa: E402

from examples.common.low_rank import LowRank  # noqa: E402
from examples.common.page import Page, Table  # noqa: E402
from examples.common.weights import Spectra, errors_by_bytes, errors_by_numbers  # noqa: E402
from examples.sentences import data, track  # noqa: E402
from examples.sentences.encoder import SentenceEncoder  # noqa: E402
from torchops.nn.stf_calibration import Fit  # noqa: E402

TOKENS = torch.tensor([[5, 9, 3, 7, 2], [8, 4, 6, 0, 0]])  # 0 is padding


@pytest.fixture(name="model")
def _model() -> SentenceEncoder:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=2,
        num_hidden_layers=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False)
    for weight in track.linear_weights(encoder := SentenceEncoder(bert).eval()).values():
        torch.nn.init.normal_(weight, std=0.3)  # their own start is so small that nearly nothing depends on them
    return encoder


@torch.inference_mode()
def test_padding_changes_nothing(model: SentenceEncoder) -> None:
    torch.testing.assert_close(model.embed(TOKENS)[1:], model.embed(TOKENS[1:, :3]))
    states = model(TOKENS)
    assert states.shape == (2, 2, 5, 32)
    assert states[1, :, 3:].eq(0).all()
    torch.testing.assert_close(states[1:, :, :3], model(TOKENS[1:, :3]))


def test_factored_and_low_rank_layers_take_no_more_than_was_asked_for(model: SentenceEncoder) -> None:
    weights = track.linear_weights(model)
    assert len(weights) == 12
    factored, report = track.factored(model, 2.0)
    errors = errors_by_bytes(report, weights, Spectra(weights))
    assert [error.layer for error in errors] == list(weights)
    for error, weight in zip(errors, weights.values(), strict=True):
        assert error.dense_bytes == 2 * weight.numel()
        assert error.packed_bytes <= error.dense_bytes / 2
        assert 2 * error.rank * sum(weight.shape) <= error.packed_bytes
    of_model = [module for module in factored.modules() if isinstance(module, torchops.nn.STFLinear)]
    assert sum(module.num_bytes("packed") for module in of_model) == 2 * report.total().packed_bytes - sum(
        module.mask.nbytes for module in track.in_form(factored, "pack").modules() if hasattr(module, "mask")
    )  # numbers are float32 again, masks are what they were
    truncated = track.truncated(model, errors, [TOKENS])
    for error in errors:
        assert len(truncated.layers().get_submodule(error.layer).first) == error.rank


@torch.inference_mode()
def test_layers_fitted_to_texts_compute_these_better(model: SentenceEncoder) -> None:
    targets = model(TOKENS)
    by_weights, report = track.factored(model, 2.0)
    fitted, _ = track.factored(model, 2.0, [TOKENS])
    assert track.missed(fitted(TOKENS), targets) < 0.7 * track.missed(by_weights(TOKENS), targets)
    weights = track.linear_weights(model)
    errors = errors_by_bytes(report, weights, Spectra(weights))
    low_rank, by_weights = track.truncated(model, errors, [TOKENS]), copy.deepcopy(model)
    for error in errors:
        parent, _, attribute = error.layer.rpartition(".")
        linear = model.layers().get_submodule(error.layer)
        setattr(by_weights.layers().get_submodule(parent), attribute, LowRank(linear, error.rank))
    assert track.missed(low_rank(TOKENS), targets) < 0.7 * track.missed(by_weights(TOKENS), targets)


def test_error_of_the_svd_is_that_of_the_low_rank_layer() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40)
    product = LowRank(linear, 5)
    approximation = product.second @ product.first
    error = (linear.weight - approximation).norm() / linear.weight.norm()
    assert Spectra({"layer": linear.weight.detach()}).error("layer", 5) == pytest.approx(error.item(), rel=1e-4)
    inputs = torch.randn(3, 24)
    torch.testing.assert_close(product(inputs), inputs @ approximation.T + linear.bias)
    fitted = LowRank(linear, 5, Fit(1e4 * torch.eye(24)))
    torch.testing.assert_close(fitted.second @ fitted.first, approximation, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fitted.first.norm(dim=1), fitted.second.norm(dim=0))


def test_sizes_by_numbers() -> None:
    torch.manual_seed(0)
    weights = {"wide": torch.randn(32, 96), "tall": torch.randn(96, 32)}
    for error in errors_by_numbers(weights, Spectra(weights), 2.0):
        assert error.basis_size == 2 * error.nnz
        assert error.basis_size * 32 + error.nnz * 96 <= 32 * 96 / 2
        assert 0 < error.factored < error.svd


def test_training_moves_a_factored_model_towards_the_dense_one(model: SentenceEncoder) -> None:
    factored = track.in_form(track.factored(model, 2.0)[0], "straight_through")
    with torch.no_grad():
        targets = model(TOKENS)
        before = track.missed(factored(TOKENS), targets)
    optimizer = torch.optim.AdamW(factored.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        track.missed(factored(TOKENS), targets).backward()
        optimizer.step()
    assert track.missed(factored(TOKENS), targets) < 0.7 * before
    assert track.missed(targets, targets) == pytest.approx(0.0, abs=1e-6)


def test_nothing_of_a_tested_docstring_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    docstrings = [
        f"Say number {n} in plain words.\n\nThe number {n} is said so that all can hear it. It has no other effect."
        for n in range(20)
    ]
    monkeypatch.setattr(data, "docstrings", lambda: iter(docstrings))
    texts = data.load(5)
    assert len(texts.summaries) == len(set(texts.summaries)) == len(texts.descriptions) == 5
    tested = {sentence for text in (*texts.summaries, *texts.descriptions) for sentence in data.split_sentences(text)}
    assert len(tested) == 11  # all share the last one
    assert tested.isdisjoint(texts.sentences)
    assert sum("number" in sentence and "words" in sentence for sentence in texts.sentences) >= 15


def test_tables_go_between_the_marks_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    image = tmp_path / "image.png"
    image.write_bytes(b"an image")
    written = Page(tmp_path / "page.md", "python -m an.example --docs", "What is seen.")
    written.path.write_text(f"before\n{written.begin}\nold\n{written.end}\nafter\n")
    table = Table("Weights", "A caption.", ["kind", "error\nbefore"], [["a", "0.5"]])
    for _ in range(2):
        written.write([table], image)
    text = written.path.read_text()
    assert text.startswith("before\n<!-- figures: python -m an.example --docs -->\n") and text.endswith("after\n")
    assert "old" not in text and text.count("![What is seen.](images/image.png)") == 1
    assert text.count("| kind | error before |\n| --- | ---: |\n| a | 0.5 |") == 1
    assert (tmp_path / "images" / "image.png").read_bytes() == b"an image"
    written.path.write_text("no marks")
    with pytest.raises(ValueError, match="marks"):
        written.write([table], image)
