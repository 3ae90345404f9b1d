"""Which linear layers of a model can be factored, and why others cannot."""

from typing import Dict, List, Optional, Sequence, Set

import torch
from torch import Tensor, nn

from ._conversion import (
    Candidates,
    adapted_by_peft,
    check_skip,
    check_wrappers,
    held_elsewhere,
    is_conv1d,
    is_plain_linear,
    matches,
    nothing_found,
    owners_of,
    problem_of,
    reason_to_leave,
    refusal,
)
from .stf import choose_sizes

__all__: List[str] = []  # for factorize_ alone


def find_candidates(
    model: nn.Module, skip: Sequence[str], compression: float, stored_dtype: Optional[torch.dtype] = None
) -> Candidates[nn.Module]:
    """Looks at every layer before the first is factored.

    Raises:
        ValueError: a pattern of skip that no layer has, layers that cannot be factored, or none that can.
    """
    check_wrappers(model, "factorize_", "factored")
    names: Dict[nn.Module, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and (isinstance(module, nn.Linear) or is_conv1d(module)):
            names.setdefault(module, []).append(name)
    check_skip("factorize_", "linear layers", (name for all_names in names.values() for name in all_names), skip)

    found: Candidates[nn.Module] = Candidates()
    problems: Dict[str, str] = {}
    owners, held, adapted = owners_of(model), held_elsewhere(model, set(names)), adapted_by_peft(model)
    skipped: Set[str] = set()
    for module, all_names in names.items():
        name = all_names[0]
        if any(matches(one, pattern) for one in all_names for pattern in skip):
            # Under one name is under all: half of a shared layer would be another model.
            skipped.update(all_names)
            continue
        problem = _problem(module, compression, stored_dtype)
        if module in adapted:
            problem = (
                f"peft adapts {adapted[module]}: factor the model first, then adapt it"
                " (torchops.integrations.peft.register_stf_linear)"
            )
        reason = None if problem else reason_to_leave(module, owners)
        if reason:
            found.left.append((name, reason))
        elif problem or module in held:
            problems[name] = problem or f"{held[module]} holds it, too, where a module cannot be replaced"
        else:
            found.layers[module] = all_names
    if problems:
        kept = [one for all_names in names.values() for one in all_names if one not in skipped]
        raise refusal("factorize_", "factored", problems, kept)
    if not found.layers:
        raise nothing_found("factorize_", "factored", "layers of class nn.Linear", model, found.left, bool(names))
    return found


def _problem(module: nn.Module, compression: float, stored_dtype: Optional[torch.dtype]) -> Optional[str]:
    problem = problem_of(module)
    if problem or not is_plain_linear(module):
        return problem
    weight = module.weight
    assert isinstance(weight, Tensor)
    try:
        choose_sizes(max(weight.shape), min(weight.shape), (stored_dtype or weight.dtype).itemsize, compression)
    except ValueError as error:
        return str(error)
    return None
