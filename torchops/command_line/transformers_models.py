"""Models of transformers in folders: loaded, fed with texts, saved again."""

import argparse
import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import ignored_padding
from .errors import CommandError, need, user_errors

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
MOST_TOKENS = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What conversions of such models have alike."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a folder that save_pretrained of transformers wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a new folder for the result")
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers or modules around them to leave as they are, by names in the model, with * and ? for anything",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="TXT", help="typical texts, one a line, to which layers are fitted"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts at a time; default: 16")
    parser.add_argument(
        "--max-length",
        type=int,
        default=MOST_TOKENS,
        metavar="N",
        help=f"tokens of a text, those behind are cut off; default: {MOST_TOKENS}",
    )
    parser.add_argument("--device", default="cpu", help="where to compute; default: cpu")


def check(arguments: argparse.Namespace) -> None:
    """What can be said before anything takes long."""
    need("transformers", "transformers")
    for name in ("batch_size", "max_length"):
        if getattr(arguments, name) < 1:
            raise CommandError(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(arguments, name)}")
    if not (arguments.model / "config.json").is_file():
        raise CommandError(f"{arguments.model}: expected a folder of save_pretrained, got none with a config.json")
    if arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        raise CommandError(f"--output: expected a new or empty folder, got {arguments.output}")


def load(arguments: argparse.Namespace) -> Any:
    """The model of the class that saved it, in evaluation mode."""
    import transformers

    # Registers what models with converted layers need to be loaded.
    from ..integrations import transformers_routed_ffn, transformers_stf

    with user_errors(RuntimeError):
        device = torch.device(arguments.device)
        config = transformers.AutoConfig.from_pretrained(arguments.model)
    method = getattr(config, "quantization_config", {}).get("quant_method")
    converted = {transformers_stf.METHOD: "factored", transformers_routed_ffn.METHOD: "routed"}
    if method in converted:
        raise CommandError(f"{arguments.model}: expected dense layers, got a model with {converted[method]} ones")
    name = (config.architectures or ["none"])[0]
    if not hasattr(transformers, name):
        raise CommandError(f"{arguments.model}: its class {name} is none of transformers {transformers.__version__}")
    with user_errors(Exception):  # of many kinds, from files
        model, info = getattr(transformers, name).from_pretrained(
            arguments.model, config=config, dtype="auto", output_loading_info=True
        )
        if info["missing_keys"]:
            raise CommandError(f"{arguments.model}: no weights of {', '.join(sorted(info['missing_keys'])[:3])}")
        return model.to(device).eval()


# ---- calibration --------------------------------------------------------------------------------


def calibration(arguments: argparse.Namespace, model: Any, enough: int) -> Callable[[Any], None] | None:
    """Lets the model read the texts, padding not counted; with a remark where there are fewer than enough tokens."""
    if arguments.calibration is None:
        return None
    from tqdm import tqdm  # transformers has it

    batches = list(tokenized(arguments, model))
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    remark = "" if num_tokens >= enough else f", which are few: {enough} and more are better"
    print(f"Calibration: {num_tokens} tokens{remark}")

    passes = iter([tqdm(batches, "Reading texts", leave=False)])  # the first one, behind which other bars are shown

    def read(model: Any) -> None:
        for batch in next(passes, batches):
            with ignored_padding(batch["attention_mask"] == 0):
                model(**batch)

    return read


def tokenized(arguments: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    """Batches of texts of about one length, so that few tokens are padding."""
    import transformers

    with user_errors():
        texts = [line.strip() for line in arguments.calibration.read_text().splitlines() if line.strip()]
    if not texts:
        raise CommandError(f"--calibration: no text in {arguments.calibration}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    except Exception as error:  # of many kinds, none of which says that there is none
        raise CommandError(f"--calibration: {arguments.model} has no tokenizer that can be loaded: {error}") from error
    # Of some classes there is one without any file, to which all words are unknown.
    files = ("tokenizer.json", "tokenizer_config.json", *tokenizer.vocab_files_names.values())
    if not any((arguments.model / file).is_file() for file in files):
        raise CommandError(f"--calibration: {arguments.model} has no tokenizer: expected one of {', '.join(files)}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(arguments.max_length, getattr(model.config, "max_position_embeddings", None) or arguments.max_length)
    texts.sort(key=len)
    with user_errors():
        for start in range(0, len(texts), arguments.batch_size if tokenizer.pad_token else 1):
            batch = tokenizer(
                texts[start : start + arguments.batch_size],
                padding=tokenizer.pad_token is not None,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            yield inputs_of(model, batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device))


def inputs_of(model: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        inputs |= {"decoder_input_ids": input_ids, "decoder_attention_mask": attention_mask}
    if "use_cache" in accepted:
        inputs["use_cache"] = False  # blocks with one cannot be run by themselves
    return inputs


# ---- files --------------------------------------------------------------------------------------


def save(arguments: argparse.Namespace, model: Any, module: str) -> None:
    """With all that lies beside the weights (tokenizer, processor, licence). module is the one of
    torchops.integrations that from_pretrained needs."""
    with user_errors():
        model.save_pretrained(arguments.output)
        for file in arguments.model.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS) and not (arguments.output / file.name).exists():
                shutil.copy(file, arguments.output)
    before, after = (megabytes(folder) for folder in (arguments.model, arguments.output))
    print(f"Written: {arguments.output}, {after} (before: {before}). To load it:")
    print(f"  import torchops.integrations.{module}")
    print(f'  model = transformers.{type(model).__name__}.from_pretrained("{arguments.output}")')


def megabytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir() if file.name.endswith(WEIGHTS)) / 1e6:.1f} MB"
