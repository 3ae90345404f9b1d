"""What conversions of whole models have alike: names of layers, and which linear layers can be converted."""

import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Dict, Generic, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__: List[str] = []  # for factorize_ and route_ffn_

Layer = TypeVar("Layer")

HOOKS_ON_STATE_DICTS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
# Base classes of peft's layers and of the copies it trains beside a module.
PEFT_LAYERS = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# They stay with the layer, in the same dictionaries, so that handles still remove them.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def check_wrappers(model: nn.Module, function: str, converted: str) -> None:
    """Refuses what is made around a model that has its last parameters."""
    for name, module in model.named_modules():
        wrapper = next((base.__name__ for base in type(module).__mro__ if base.__name__ in WRAPPERS), None)
        if wrapper:
            at = f" at {name!r}" if name else ""
            raise ValueError(
                f"{function}: expected a model that is {converted} before it is wrapped, got {wrapper}{at}"
            )


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in transformers, whose weight is [in_features, out_features]."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D


def as_linear(layer: nn.Module) -> nn.Linear:
    """The layer, or a linear layer on the same weight and bias."""
    if isinstance(layer, nn.Linear):
        return layer
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta").train(layer.training)
    linear.weight = nn.Parameter(weight.detach().T, weight.requires_grad)
    linear.bias = bias
    return linear


# ---- names --------------------------------------------------------------------------------------


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is that of the layer or of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


def patterns_for(names: List[str], kept: List[str]) -> List[str]:
    """Few patterns for skip that match these names and no others of those kept so far."""
    patterns: List[str] = []
    for name in names:
        short = ".".join("*" if part.isdigit() else part for part in name.split("."))
        matched = [other for other in kept if matches(other, short)]
        pattern = short if set(matched) <= set(names) else name
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns


@dataclass
class Candidates(Generic[Layer]):
    """The layers to convert with every name of each, those that stay dense with the reason."""

    layers: Dict[Layer, List[str]] = field(default_factory=dict)
    left: List[Tuple[str, str]] = field(default_factory=list)


def check_skip(function: str, kind: str, names: Iterable[str], skip: Sequence[str]) -> None:
    """Every pattern is that of a layer."""
    known = list(names)
    for pattern in skip:
        if not any(matches(name, pattern) for name in known):
            raise ValueError(f"{function}: expected skip to name {kind} of the model, got {pattern!r}")


def refusal(function: str, converted: str, problems: Dict[str, str], kept: List[str]) -> ValueError:
    """Of layers by their names, among all names that skip keeps."""
    return ValueError(
        f"{function}: expected layers that can be {converted}, got some that cannot (to leave them dense, add"
        f" skip={patterns_for(list(problems), kept)}):\n  "
        + "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
    )


def nothing_found(
    function: str, converted: str, kind: str, model: nn.Module, left: List[Tuple[str, str]], are_skipped: bool
) -> ValueError:
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in left)
    return ValueError(
        f"{function}: expected a model with {kind} in it, got {type(model).__name__} with none"
        + (f" that can be {converted}:" + reasons if reasons else " that skip leaves" if are_skipped else "")
    )


def put_(model: nn.Module, name: str, module: nn.Module) -> None:
    """A module in the place of the one of that name, in the order of modules."""
    parent, _, attribute = name.rpartition(".")
    model.get_submodule(parent)._modules[attribute] = module


# ---- parameters and who holds them --------------------------------------------------------------


def key(tensor: Tensor) -> int:
    """The same for parameters that are one tensor or share its memory."""
    if type(tensor) is nn.Parameter and tensor.device.type != "meta" and tensor.numel():
        return tensor.data_ptr()
    return id(tensor)


def owners_of(model: nn.Module) -> Dict[int, Dict[nn.Module, str]]:
    """The modules that hold each parameter, with their names."""
    owners: Dict[int, Dict[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            is_layer = isinstance(module, (nn.Linear, nn.Embedding)) and attribute == "weight"
            owners.setdefault(key(parameter), {})[module] = name if is_layer else f"{name}.{attribute}".lstrip(".")
    return owners


def adapted_by_peft(model: nn.Module) -> Dict[nn.Module, str]:
    """The modules in layers that peft adapts, with the names of these."""
    adapted: Dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        bases = [base for base in type(module).__mro__ if base.__module__.partition(".")[0] == "peft"]
        if any(base.__name__ in PEFT_LAYERS for base in bases):
            for inside in module.modules():
                adapted.setdefault(inside, name)
    return adapted


def held_elsewhere(model: nn.Module, layers: Set[nn.Module]) -> Dict[nn.Module, str]:
    """The layers that stand in plain lists and attributes of modules, and where."""
    held: Dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            for inside in _modules_in(value, depth=3):
                if inside in layers:
                    place = f"{name}.{attribute}".lstrip(".")
                    held.setdefault(inside, f"the plain {type(value).__name__} {place}")
    return held


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for inside in value:
            yield from _modules_in(inside, depth - 1)
    elif depth and isinstance(value, dict):
        for inside in value.values():
            yield from _modules_in(inside, depth - 1)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer and none of a subclass, which may compute something else."""
    return type(module) is nn.Linear or is_conv1d(module)


def reason_to_leave(module: nn.Module, owners: Dict[int, Dict[nn.Module, str]]) -> Optional[str]:
    """Why it stays as it is."""
    if not is_plain_linear(module):
        kind = "a subclass of" if isinstance(module, nn.Linear) else "no"
        return f"{kind} nn.Linear, {type(module).__name__}"
    weight = module.weight
    assert isinstance(weight, Tensor)
    others = [other for owner, other in owners.get(key(weight), {}).items() if owner is not module]
    return f"its weight is that of {', '.join(others)}, too" if others else None


def problem_of(module: nn.Module) -> Optional[str]:
    """Why what takes its place would not be the same layer."""
    if parametrize.is_parametrized(module):
        return "torch.nn.utils.parametrize computes its weight: remove_parametrizations first"
    if not is_plain_linear(module):
        return None  # it stays
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return (
            "a hook computes its weight or bias, as spectral_norm, weight_norm and prune of torch.nn.utils do: remove"
            " that first"
        )
    more = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if more:
        return f"it holds more than weight and bias: {', '.join(sorted(more))}"
    if "forward" in vars(module):
        return "its forward was replaced, as accelerate's hooks do: remove them first, and add them after"
    if any(getattr(module, hooks) for hooks in HOOKS_ON_STATE_DICTS):
        return "it has hooks on its state dict, which would be another"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has hooks"
    if weight.device.type == "meta":
        return "its weight is on the meta device: load the weights first"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, no plain tensor"
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).partition('.')[2]}"
    if weight.dim() != 2:
        return f"its weight has shape {list(weight.shape)}"
    return None
