"""Converts a tiny random model of every architecture that the installed transformers has, and lets it compute.

    python tools/try_models.py            # all of them, in subprocesses that may crash; an hour
    python tools/try_models.py bert t5    # these, in this process

Each configuration is its class's default with widths divided and two layers, so that sizes still go together. A
model counts only if it computes before the conversion, from one of a few kinds of input. Then one copy of it

- is factored, and must compute finite numbers of the same shapes, train, and survive copying, freezing and a state
  dict; or the conversion is refused, and must succeed with the skip that the error names;
- is switched to span attention, and must compute what its own attention does; or is refused by name;
- is switched to sparse attention that keeps all keys, likewise;
- has its feed-forward layers routed to all of their blocks, and its experts computed by routed_ffn, likewise.
"""

import argparse
import contextlib
import copy
import inspect
import json
import logging
import re
import signal
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # built for another torch
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from torchops.integrations.transformers import apply_routed_experts, apply_span_attention
from torchops.integrations.transformers_sparse_attention import apply_sparse_attention
from torchops.nn import STFLinear, factorize_, route_ffn_

MOST_PARAMETERS = 20_000_000
BATCH = 60  # architectures in a process, most of whose time is the import
SECONDS = 300  # for a model
HEADS = ("FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_CAUSAL_LM", "FOR_MASKED_LM", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_PRETRAINING")

LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|depth|layers|.*(encoder|decoder)_layers)$")
WIDTHS = re.compile(r"(hidden_size|hidden_dim|_dim|^dim|d_model|d_ff|d_kv|n_embd|n_inner|width|_rank|channels|mlp_dim)")
WIDTHS_TOO = re.compile(
    r"^(embedding_size|intermediate_size|.*_intermediate_size|head_dim|encoder_ffn_dim|embed_dims?)$"
)
FIXED = re.compile(r"^(num_channels|.*vocab.*|.*cardinality.*|input_channels|in_channels|rotary_dim|.*pct|mask_.*)$")
EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$")
VOCABULARY = re.compile(r"^(vocab_size|.*_vocab_size)$")


def smaller(config: Any, divisor: int) -> dict[str, Any]:
    """Arguments of a configuration like that one, with narrower and fewer layers."""
    arguments: dict[str, Any] = {}
    depths = set()
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            arguments[name] = {**value.to_dict(), **smaller(value, divisor)}
            continue
        if isinstance(value, bool) or name.startswith("_"):
            continue
        if isinstance(value, int) and LAYERS.match(name) and value > 2:
            depths.add(value)
            arguments[name] = 2
        elif isinstance(value, int) and EXPERTS.match(name) and value > 16:
            arguments[name] = 16
        elif isinstance(value, int) and VOCABULARY.match(name) and value > 512:
            arguments[name] = 512
        elif (WIDTHS.search(name) or WIDTHS_TOO.match(name)) and not FIXED.match(name):
            if isinstance(value, int) and value >= 2 * divisor and value % divisor == 0:
                arguments[name] = value // divisor
            elif (
                isinstance(value, (list, tuple))
                and value
                and all(type(one) is int and one % divisor == 0 for one in value)
            ):
                arguments[name] = [one // divisor for one in value]
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) in depths and name not in arguments:
            arguments[name] = list(value)[:2]
        if name.endswith("_token_id") and isinstance(value, int) and value >= 512:
            arguments[name] = 3 + len(arguments) % 50
    return arguments


@lru_cache(1)
def build(name: str, class_name: str) -> Any:
    """A model of narrow layers that computes, and inputs for it."""
    model_class, problems = getattr(transformers, class_name), []
    for divisor in (16, 8, 4, 2, 1):
        try:
            config = CONFIG_MAPPING[name]
            config = config(**smaller(config(), divisor))
            if divisor > 1 and isinstance(getattr(config, "hidden_size", None), int) and config.hidden_size < 32:
                continue
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
            if size > MOST_PARAMETERS:
                problems.append(f"{size} parameters")
                break
            torch.manual_seed(0)
            model = model_class(config).eval()
            for parameter in model.parameters():  # some start at zero, some are left as the memory was
                if not parameter.isfinite().all():
                    torch.nn.init.normal_(parameter, std=0.02)
            inputs = computes(model)
            if inputs is not None:
                return model, inputs
            problems.append("none of the inputs tried fits")
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    raise ValueError(problems[0] if problems else "too narrow")


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    accepted = inspect.signature(model.forward).parameters

    def setting(name: str, otherwise: Any) -> Any:
        for config in (model.config, *(value for value in vars(model.config).values() if hasattr(value, "model_type"))):
            if isinstance(getattr(config, name, None), (int, list, tuple)):
                value = getattr(config, name)
                return value[0] if isinstance(value, (list, tuple)) else value
        return otherwise

    vocabulary = min(setting("vocab_size", 500), 500)
    tokens = torch.randint(min(60, vocabulary // 2), vocabulary, (2, 16))
    image, channels = setting("image_size", 224), setting("num_channels", 3)
    mels = setting("num_mel_bins", 80)
    frames = 2 * setting("max_source_positions", 100)
    kinds: dict[str, list[Any]] = {
        "input_ids": [tokens],
        "pixel_values": [
            torch.randn(2, channels, image, image),
            torch.randn(2, channels, 64, 64),
            torch.randn(2, setting("num_frames", 8), channels, image, image),
        ],
        "input_features": [torch.randn(2, mels, frames), torch.randn(2, 100, mels)],
        "input_values": [torch.randn(2, 4000), torch.randn(2, 1, 4000), torch.randn(2, 1024, mels)],
    }
    with_decoder = {"decoder_input_ids": tokens} if "decoder_input_ids" in accepted else {}
    given = [
        {kind: value, **with_decoder}
        for kind, values in kinds.items()
        if kind in accepted or kind == model.main_input_name
        for value in values
    ]
    for arguments in given:
        yield arguments
    for arguments in given:  # two kinds at once, as CLIP wants
        if "pixel_values" in arguments or "input_features" in arguments:
            yield {**arguments, "input_ids": tokens}
    if hasattr(model, "dummy_inputs"):
        yield dict(model.dummy_inputs)


def output_tensors(output: Any) -> list[torch.Tensor]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output if isinstance(output, tuple) else (output,)
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def compute(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return output_tensors(model(**inputs))


def computes(model: Any) -> dict[str, Any] | None:
    for inputs in candidates(model):
        with contextlib.suppress(Exception), torch.no_grad():
            outputs = compute(model, inputs)
            if outputs and all(output.isfinite().all() for output in outputs):
                return inputs
    return None


class ConversionError(Exception):
    pass


def factor(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    expected = compute(model, inputs)
    result: dict[str, Any] = {"outcome": "converted"}
    try:
        report = factorize_(model, 1.5, num_iterations=1, verbose=False)
    except ValueError as error:
        skip = re.search(r"skip=(\[.*\])", str(error))
        result["refused"] = str(error)[:400]
        if any(isinstance(module, STFLinear) for module in model.modules()):
            raise ConversionError("refused and changed") from error
        if not skip:
            return {**result, "outcome": "refused"}
        report = factorize_(model, 1.5, skip=json.loads(skip[1].replace("'", '"')), num_iterations=1, verbose=False)
    result |= {"factored": len(report.layers), "left": [entry[:2] for entry in report.left][:5]}
    outputs = compute(model, inputs)
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        raise ConversionError("other shapes")
    if not all(output.isfinite().all() for output in outputs):
        raise ConversionError("not finite")
    if not all(map(torch.equal, compute(copy.deepcopy(model), inputs), outputs)):
        raise ConversionError("the copy differs")
    model.load_state_dict(model.state_dict())
    model.train()
    with torch.enable_grad():
        sum(output.square().sum() for output in compute(model, inputs)).backward()
    model.requires_grad_(False)
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ConversionError("not frozen")
    return result


def replace(name: str, apply: Callable[[Any], Any], model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(Exception):  # where it has no other attention than its own
        model.set_attn_implementation("eager")
    with contextlib.suppress(Exception):
        model.set_experts_implementation("eager")
    expected = compute(model, inputs)
    refusal = "refused"
    try:
        apply(model)
        refusal = "refused in the forward"
        outputs = compute(model, inputs)
    except (TypeError, ValueError) as error:
        if not str(error).startswith((f"{name}: ", "PQAttention: ")):
            raise
        return {"outcome": refusal, "refused": str(error)}
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        raise ConversionError("other shapes")
    for output, one in zip(outputs, expected, strict=True):
        error = (output - one).norm() / one.norm().clamp(min=1e-30)
        if not error < 1e-3:
            raise ConversionError(f"other numbers: {error:.1e}")
    return {"outcome": "converted"}


CONVERSIONS = {
    "factorize_": factor,
    "span_attention": partial(replace, "span_attention", apply_span_attention),
    "sparse_attention": partial(replace, "sparse_attention", partial(apply_sparse_attention, keep=1.0, subspace=2)),
    "route_ffn_": partial(replace, "route_ffn_", partial(route_ffn_, num_blocks=2, top_k=2, verbose=False)),
    "routed_experts": partial(replace, "torchops", apply_routed_experts),
}


def attempt(name: str, class_name: str, conversion: str = "factorize_") -> dict[str, Any]:
    result: dict[str, Any] = {"name": name, "class_name": class_name, "conversion": conversion}
    try:
        model, inputs = build(name, class_name)
    except Exception as error:
        return {**result, "outcome": "not built", "why": str(error)[:200]}
    try:
        with torch.no_grad():
            return {**result, **CONVERSIONS[conversion](copy.deepcopy(model), inputs)}
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return {**result, "outcome": "failed", "why": f"{type(error).__name__}: {error}"[:600], "where": where}


def class_of(name: str) -> str | None:
    """The model with its first head, or without one if it has none."""
    for mapping in (*(f"MODEL_{head}" for head in HEADS), "MODEL"):
        value = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(name)
        if value:
            return value[0] if isinstance(value, (list, tuple)) else value
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures, as transformers names them (model_type)")
    parser.add_argument("--only", choices=CONVERSIONS, nargs="+", default=list(CONVERSIONS), help="conversions to try")
    parser.add_argument("--json", action="store_true", help="one JSON object a line and nothing else")
    parser.add_argument("--output", type=Path, help="also write the lines to this file")
    options = parser.parse_args()
    if options.names:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        for name in options.names:
            for conversion in options.only:
                about = {"name": name, "class_name": class_of(name), "conversion": conversion}
                if options.json:
                    print(json.dumps({**about, "outcome": "begun"}), flush=True)
                signal.alarm(SECONDS)  # ends the process
                result = attempt(**about)
                print(json.dumps(result), flush=True)
                if result["outcome"] == "not built":
                    break
        return

    results: dict[tuple[str, str], dict[str, Any]] = {}  # by architecture and conversion
    left = [name for name in CONFIG_MAPPING_NAMES if class_of(name)]
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        command = [sys.executable, __file__, "--json", *batch, "--only", *options.only]
        run = subprocess.run(command, capture_output=True, text=True)
        begun = ""
        for line in run.stdout.splitlines():
            if line.startswith('{"name"'):
                result = json.loads(line)
                begun = result["name"]
                results[begun, result["conversion"]] = result
        for result in results.values():
            if result["outcome"] == "begun":
                result |= {"outcome": "failed", "why": f"the process ended: {run.returncode}"}
        if begun != batch[-1]:
            left = batch[batch.index(begun) + 1 if begun in batch else 1 :] + left
        if options.output:
            options.output.write_text("".join(json.dumps(result) + "\n" for result in results.values()))
        counts = Counter(f"{result['conversion']} {result['outcome']}" for result in results.values())
        print(f"{len(left)} to go: {dict(counts)}", flush=True)
    for result in results.values():
        if result["outcome"] not in ("converted", "not built"):
            print(json.dumps(result))


if __name__ == "__main__":
    main()
