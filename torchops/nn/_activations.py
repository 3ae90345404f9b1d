"""Which activation of :func:`torchops.routed_ffn` a function or a gate is, found by what it computes."""

from typing import Any, Callable, List, NamedTuple, Optional

import torch
from torch import Tensor

from ..reference.routed_ffn import activate, hidden

__all__: List[str] = []  # for what converts other libraries' layers

NAMES = ("relu", "relu2", "gelu", "gelu_tanh", "silu")
FAR = 1e4  # beyond every limit
# Close to zero they differ from each other, far from it from those that are clipped.
POINTS = torch.cat([torch.linspace(-6, 6, 97), torch.tensor([-50.0, -20.0, -9.0, 9.0, 20.0, 50.0])]).double()


class Activation(NamedTuple):
    name: str
    alpha: float = 1.0


class Gate(NamedTuple):
    """Options of :func:`torchops.routed_ffn`."""

    activation: str
    glu: str
    alpha: float = 1.0
    limit: Optional[float] = None
    up_offset: float = 0.0


def close(one: Any, other: Tensor) -> bool:
    # Some compute in float32, and nan is close to nothing.
    same = isinstance(one, Tensor) and one.shape == other.shape
    return same and torch.allclose(one.double(), other, rtol=1e-5, atol=1e-5)


def alpha_of(value: float) -> float:
    """That of silu, from its value at 1."""
    return round(torch.logit(torch.tensor(value, dtype=torch.float64)).item(), 4) if 0 < value < 1 else 1.0


@torch.no_grad()
def activation_of(function: Callable[[Tensor], Any]) -> Optional[Activation]:
    """None for one that is not known, or that is no function of numbers."""
    try:
        with torch.device("cpu"):  # whatever the default is, the meta device among others
            values = function(POINTS.clone())
            alpha = alpha_of(float(function(torch.ones(1, dtype=torch.float64))))
    except Exception:  # whatever a stranger raises
        return None
    for name in NAMES:
        found = Activation(name, alpha if name == "silu" else 1.0)
        if close(values, activate(POINTS, *found)):
            return found
    return None


@torch.no_grad()
def gate_of(function: Callable[[Tensor], Any]) -> Optional[Gate]:
    """That of a function [..., 2 N] -> [..., N], in which halves or neighbours belong together; None if unknown.

    Offset, limit and alpha are read off a few values, and the formula that they give is compared at many.
    """
    for glu in ("concat", "interleaved"):

        def at(gate: float, up: float, glu: str = glu) -> float:
            pair = [gate, gate, up, up] if glu == "concat" else [gate, up, gate, up]
            return float(function(torch.tensor([pair], dtype=torch.float64))[0, 0])

        try:
            slope = at(1.0, 1.0) - at(1.0, 0.0)
            up_offset = round(at(1.0, 0.0) / slope, 4)
            limit: Optional[float] = round(at(1.0, FAR) / slope - up_offset, 4)
            pairs = torch.cartesian_prod(POINTS, POINTS)
            if glu == "concat":
                values = function(torch.cat([pairs[:, 0], pairs[:, 1]])[None])[0]
            else:
                values = function(pairs.reshape(1, -1))[0]
        except Exception:  # whatever a stranger raises, or a slope of 0
            continue
        if limit is not None and limit > FAR / 2:
            limit = None
        for name in NAMES:
            found = Gate(name, glu, alpha_of(slope) if name == "silu" else 1.0, limit, up_offset)
            both = torch.cat([pairs[:, 0], pairs[:, 1]])
            if close(values, hidden(both, name, "concat", found.alpha, limit, up_offset)):
                return found
    return None
