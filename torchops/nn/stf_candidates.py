"""Which linear layers of a model can be factored, and why others cannot."""

import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .stf import choose_sizes

__all__: List[str] = []  # for factorize_ alone

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


@dataclass
class Candidates:
    """The layers to factor with every name of each, those that stay dense with the reason."""

    layers: Dict[nn.Module, List[str]] = field(default_factory=dict)
    left: List[Tuple[str, str]] = field(default_factory=list)


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


def find_candidates(model: nn.Module, skip: Sequence[str], compression: float) -> Candidates:
    """Looks at every layer before the first is factored.

    Raises:
        ValueError: a pattern of skip that no layer has, layers that cannot be factored, or none that can.
    """
    for name, module in model.named_modules():
        wrapper = next((base.__name__ for base in type(module).__mro__ if base.__name__ in WRAPPERS), None)
        if wrapper:
            at = f" at {name!r}" if name else ""
            raise ValueError(f"factorize_: expected a model that is factored before it is wrapped, got {wrapper}{at}")
    names: Dict[nn.Module, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and (isinstance(module, nn.Linear) or is_conv1d(module)):
            names.setdefault(module, []).append(name)
    for pattern in skip:
        if not any(_matches(name, pattern) for all_names in names.values() for name in all_names):
            raise ValueError(f"factorize_: expected skip to name linear layers of the model, got {pattern!r}")

    found, problems = Candidates(), {}
    owners, held, adapted = _owners(model), _held(model, set(names)), _adapted(model)
    skipped: Set[str] = set()
    for module, all_names in names.items():
        name = all_names[0]
        if any(_matches(one, pattern) for one in all_names for pattern in skip):
            # Under one name is under all: half of a shared layer would be another model.
            skipped.update(all_names)
            continue
        problem = adapted.get(module) or _problem(module, compression)
        reason = None if problem else _reason_to_leave(module, name, owners)
        if reason:
            found.left.append((name, reason))
        elif problem or module in held:
            problems[name] = problem or f"{held[module]} holds it, too, where a module cannot be replaced"
        else:
            found.layers[module] = all_names
    if problems:
        kept = [one for all_names in names.values() for one in all_names if one not in skipped]
        raise ValueError(
            "factorize_: expected layers that can be factored, got some that cannot (to leave them dense, add"
            f" skip={_patterns(list(problems), kept)}):\n  "
            + "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
        )
    if not found.layers:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in found.left)
        raise ValueError(
            f"factorize_: expected a model with layers of class nn.Linear in it, got {type(model).__name__} with none"
            + (" that can be factored:" + reasons if reasons else " that skip leaves" if names else "")
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is that of the layer or of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


def _patterns(names: List[str], kept: List[str]) -> List[str]:
    """Few patterns for skip that match these names and no others of those kept so far."""
    patterns: List[str] = []
    for name in names:
        short = ".".join("*" if part.isdigit() else part for part in name.split("."))
        matched = [other for other in kept if _matches(other, short)]
        pattern = short if set(matched) <= set(names) else name
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns


# ---- layers that stay as they are ---------------------------------------------------------------


def _key(tensor: Tensor) -> int:
    """The same for parameters that are one tensor or share its memory."""
    if type(tensor) is nn.Parameter and tensor.device.type != "meta" and tensor.numel():
        return tensor.data_ptr()
    return id(tensor)


def _owners(model: nn.Module) -> Dict[int, Dict[nn.Module, str]]:
    """The modules that hold each parameter, with their names."""
    owners: Dict[int, Dict[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            is_layer = isinstance(module, (nn.Linear, nn.Embedding)) and attribute == "weight"
            owners.setdefault(_key(parameter), {})[module] = name if is_layer else f"{name}.{attribute}".lstrip(".")
    return owners


def _reason_to_leave(module: nn.Module, name: str, owners: Dict[int, Dict[nn.Module, str]]) -> Optional[str]:
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"a subclass of nn.Linear, {type(module).__name__}"
    weight = module.weight
    assert isinstance(weight, Tensor)
    others = [other for owner, other in owners.get(_key(weight), {}).items() if owner is not module]
    return f"its weight is that of {', '.join(others)}, too" if others else None


# ---- layers that cannot be factored -------------------------------------------------------------


def _adapted(model: nn.Module) -> Dict[nn.Module, str]:
    """The modules in layers that peft adapts."""
    problems: Dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        bases = [base for base in type(module).__mro__ if base.__module__.partition(".")[0] == "peft"]
        if any(base.__name__ in PEFT_LAYERS for base in bases):
            for inside in module.modules():
                problems.setdefault(
                    inside,
                    f"peft adapts {name}: factor the model first, then adapt it"
                    " (torchops.integrations.peft.register_stf_linear)",
                )
    return problems


def _held(model: nn.Module, layers: Set[nn.Module]) -> Dict[nn.Module, str]:
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


def _problem(module: nn.Module, compression: float) -> Optional[str]:
    if parametrize.is_parametrized(module):
        return "torch.nn.utils.parametrize computes its weight: remove_parametrizations first"
    if type(module) is not nn.Linear and not is_conv1d(module):
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
    try:
        choose_sizes(max(weight.shape), min(weight.shape), weight.element_size(), compression)
    except ValueError as error:
        return str(error)
    return None
