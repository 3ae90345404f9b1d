"""python -m torchops factorize, route and merge: what they write comes back as the model that was converted."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_command_line import fails, fits
from torch import Tensor

from torchops.command_line import main
from torchops.nn import RoutedFFN, STFLinear, factorize_

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers", exc_type=ImportError
)
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install tokenizers")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "one", "dog", "ran", "to", "big", "red", "house"]
VOCABULARY = {word: index for index, word in enumerate(["[PAD]", "[EOS]", *WORDS])}
SIZE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
}
TOKENS = torch.arange(2, 14).view(2, 6)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    draw = random.Random(0)
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(40)))
    return path


def saved(model: Any, folder: Path, pad_token: str | None = "[PAD]") -> Path:
    """A model with a tokenizer."""
    model.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad_token, eos_token="[EOS]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # its own start is so small that nearly nothing depends on anything
    return saved(model, tmp_path / "bert")


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return transformers.BertForMaskedLM.from_pretrained(folder)(input_ids=TOKENS).logits


def run(*argv: Any) -> int:
    return main([str(argument) for argument in argv])


# ---- factorize ------------------------------------------------------------------------------------


def test_factorize(bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (bert / "LICENSE").write_text("free")
    command = ["factorize", bert, "-o", out, "--compression", 1.5, "--skip", "cls", "*.attention"]
    assert run(*command, "--calibration", texts) == 0
    shown = capsys.readouterr().out
    assert fits(shown.partition("Written")[0]) and "bert.encoder.layer.0.output.dense" in shown
    assert "2 layers" in shown and "import torchops.integrations.transformers_stf" in shown
    assert "tokens, which are few: 256 and more" not in shown
    model = transformers.BertForMaskedLM.from_pretrained(out)
    layers = [layer for layer in model.modules() if isinstance(layer, STFLinear)]
    assert [layer.form() for layer in layers] == ["packed"] * 2
    for layer in layers:
        assert layer.num_bytes() < layer.in_features * layer.out_features * 4 / 1.5
    assert transformers.AutoTokenizer.from_pretrained(out).vocab == VOCABULARY and (out / "LICENSE").exists()


def test_factorize_to_train_in_another_dtype(bert: Path, tmp_path: Path) -> None:
    skip = ["cls", "*.attention", "*.intermediate"]
    options = ["--compression", 1.5, "--skip", *skip, "--form", "straight-through", "--dtype", "bfloat16"]
    assert run("factorize", bert, "-o", tmp_path / "out", *options) == 0
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    dense = transformers.BertForMaskedLM.from_pretrained(bert)
    factorize_(dense, 1.5, skip, stored_dtype=torch.bfloat16, verbose=False)
    layer, expected = (of.bert.encoder.layer[0].output.dense for of in (model, dense))
    assert layer.form() == "straight-through" and layer.basis.dtype == torch.bfloat16
    assert torch.equal(layer.basis, expected.basis.bfloat16())


def test_a_decoder_without_padding(texts: Path, tmp_path: Path) -> None:
    """Its tokenizer pads with the end of a text, and its blocks have no cache to run by themselves."""
    size = {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": len(VOCABULARY), "n_positions": 12}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=1, eos_token_id=1))
    folder = saved(model, tmp_path / "gpt2", pad_token=None)
    assert run("factorize", folder, "-o", tmp_path / "out", "--skip", "*.attn", "--calibration", texts) == 0
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert isinstance(again.transformer.h[0].mlp.c_fc, STFLinear)


def test_an_encoder_and_a_decoder(texts: Path, tmp_path: Path) -> None:
    size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": len(VOCABULARY)}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**size))
    folder = saved(model, tmp_path / "t5")
    assert run("route", folder, "-o", tmp_path / "out", "--calibration", texts, "--blocks", 2, "--top-k", 1) == 0
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, RoutedFFN) for module in again.modules()) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--compression", "0"], "--compression: expected a number above 0, got 0"),
        (["--batch-size", "0"], "--batch-size: expected 1 or more, got 0"),
        (["--skip", "pooler"], "factorize_: expected skip to name linear layers of the model, got 'pooler'"),
        (["--calibration", "no.txt"], "No such file"),
        (["--calibration", "empty.txt"], "--calibration: no text in empty.txt"),
        (["--device", "quantum"], "quantum"),
        (["-o", "."], "--output: expected a new or empty folder, got ."),
    ],
)
def test_factorize_refuses(
    options: list[str],
    message: str,
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert message in fails(capsys, "factorize", str(bert), "-o", "out", *options)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_factored(bert: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "out")
    assert "expected a folder of save_pretrained" in fails(capsys, "factorize", str(tmp_path), "-o", out)
    (bert / "tokenizer.json").unlink()
    (bert / "tokenizer_config.json").unlink()
    message = fails(capsys, "factorize", str(bert), "-o", out, "--calibration", str(texts))
    assert "has no tokenizer: expected one of tokenizer.json, " in message
    assert run("route", bert, "-o", out) == 0
    message = fails(capsys, "factorize", out, "-o", str(tmp_path / "both"))
    assert "expected dense layers, got a model with routed ones" in message
    (bert / "model.safetensors").write_bytes(b"nothing")
    fails(capsys, "factorize", str(bert), "-o", str(tmp_path / "broken"))


def test_layers_to_skip_are_named_as_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.BertConfig(**{**SIZE, "intermediate_size": 36})
    folder = saved(transformers.BertForMaskedLM(config), tmp_path / "bert")
    assert run("route", folder, "-o", tmp_path / "out", "--blocks", 8) == 2
    assert "add --skip '" in capsys.readouterr().err


# ---- route ----------------------------------------------------------------------------------------


def test_route(bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["route", bert, "--blocks", 8, "--top-k", 3, "--lora-rank", 2, "--calibration", texts]
    assert run(*command, "-o", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "3 of 8" in shown and "which are few: 2000 and more are better" in shown
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    routed = model.bert.encoder.layer[0].intermediate.dense
    assert isinstance(routed, RoutedFFN) and (routed.router.num_blocks, routed.router.top_k) == (8, 3)
    assert routed.lora_a1.shape[1] == 2
    # Padding is none of the inputs: a text by itself has none.
    assert run(*command, "-o", tmp_path / "alone", "--batch-size", 1) == 0
    torch.testing.assert_close(logits(tmp_path / "alone"), logits(tmp_path / "out"))
