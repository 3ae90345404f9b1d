"""Mixtures of experts in Hugging Face's transformers, computed by :func:`torchops.routed_ffn`.

Importing this module makes the implementation known to transformers, under the name ``"torchops"``.
"""

import sys
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, TypeVar

import torch
from torch import Tensor, nn

from ..nn._activations import Activation, Gate, activation_of, gate_of
from ..ops.routed_ffn import routed_ffn
from ._requirements import imports_of

with imports_of(__name__, "transformers", "5.23"):
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.utils import logging

__all__ = ["apply_routed_experts"]

Model = TypeVar("Model", bound=nn.Module)

IMPLEMENTATION = "torchops"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
logger = logging.get_logger(__name__)


def apply_routed_experts(model: Model) -> Model:
    """Computes the experts of a model by :func:`torchops.routed_ffn`.

    For models whose experts go through transformers' interface (``use_experts_implementation``): Mixtral, Qwen's,
    OLMoE, DeepSeek's, GPT-OSS and about fifty others. Results and gradients are those of "eager". The weights stay the
    model's, in their layout. The kind of gate is identified by calling it with numbers. Experts with a gate that the
    operator does not support, or followed by a norm, keep their own computation, with one warning. Llama 4's experts,
    which do not use the interface, are computed by the operator as well: the class of their module is permanently
    changed to a subclass, and a saved copy has to be converted again after it is loaded.

    LoRA adapters of peft on experts (``target_parameters``) stay two thin factors, which are multiplied with tokens;
    the model may be a PeftModel already or become one later. Several active adapters at once are added to the weights,
    as peft does itself.

    Args:
        model: changed in place. ``model.set_experts_implementation("eager")`` is the way back. A saved copy is one as
            before; ``from_pretrained(..., experts_implementation="torchops")`` loads it for this implementation, where
            this module has been imported.

    Returns:
        model.

    Raises:
        TypeError: no experts of the model go through the interface or are Llama 4's, or they are quantized.

    >>> from transformers import MixtralConfig, MixtralModel
    >>> from torchops.integrations.transformers_routed_experts import apply_routed_experts
    >>> size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
    >>> model = MixtralModel(MixtralConfig(**size, num_key_value_heads=2, num_local_experts=4))
    >>> apply_routed_experts(model)(torch.arange(10)[None]).last_hidden_state.shape
    torch.Size([1, 10, 32])
    """
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    experts: List[Any] = [module for module in base.modules() if is_experts(module)]
    moes = llama4_moes(base)
    if not isinstance(base, PreTrainedModel) or not (experts or moes):
        raise TypeError(
            f"{IMPLEMENTATION}: expected a model whose experts go through transformers' interface, got"
            f" {type(base).__name__}"
        )
    for module in (*experts, *moes.values()):
        dtype = module.down_proj.dtype
        if dtype not in DTYPES:
            raise TypeError(
                f"{IMPLEMENTATION}: expected experts in floating point, got {type(module).__name__} in {dtype}"
            )
    for module in experts:
        formula(module)
    if experts:
        base.set_experts_implementation(IMPLEMENTATION)
    for moe, module in moes.items():
        from .transformers_llama4_experts import route_

        route_(moe, module)
    return model


def llama4_moes(model: nn.Module) -> Dict[Any, Any]:
    """With their experts, where Llama 4 has been imported."""
    if "transformers.models.llama4.modeling_llama4" not in sys.modules:
        return {}
    from .transformers_llama4_experts import moes_of

    return moes_of(model)


def is_experts(module: Any) -> bool:
    """Whether transformers' decorator has made its class."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj"))


class Formula(NamedTuple):
    """What an expert computes between its two layers, or why the operator does not compute that."""

    gate: Optional[Gate]
    reason: str = ""


def formula(experts: Any) -> Formula:
    """It is found out once for each module."""
    known = vars(experts).get("_torchops_formula")
    if known is None:
        if experts.has_post_expert_norm:
            known = Formula(None, "it has a norm behind its experts")
        else:
            gate = gate_of(experts._apply_gate) if experts.has_gate else no_gate(activation_of(experts.act_fn))
            known = Formula(gate, "" if gate else "it has another gate than the operator")
        experts._torchops_formula = known
    return known


def no_gate(activation: Optional[Activation]) -> Optional[Gate]:
    return None if activation is None else Gate(activation.name, "none", activation.alpha)


def routed_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, d], top_k_index and top_k_weights [T, k] -> [T, d]."""
    gate, reason = formula(experts)
    if gate is None:
        logger.warning_once(f"{IMPLEMENTATION}: {type(experts).__name__} computes by itself: {reason}")
        return own_forward(type(experts))(experts, hidden_states, top_k_index, top_k_weights)
    first, second = "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"
    w1, lora1 = weight_and_factors(experts, first)
    w2, lora2 = weight_and_factors(experts, second)
    output = routed_ffn(
        hidden_states,
        top_k_index,
        top_k_weights,
        w1,
        w2,
        getattr(experts, f"{first}_bias") if experts.has_bias else None,
        getattr(experts, f"{second}_bias") if experts.has_bias else None,
        activation=gate.activation,
        glu=gate.glu,
        alpha=gate.alpha,
        limit=gate.limit,
        up_offset=gate.up_offset,
        **lora_arguments(lora1, lora2),
    )
    return output.to(hidden_states.dtype)


def own_forward(kind: Any) -> Any:
    """What the class computes where no implementation is asked for."""
    return next(
        base.forward.__wrapped__
        for base in kind.__mro__
        if "forward" in vars(base) and hasattr(base.forward, "__wrapped__")
    )


# ---- peft's LoRA --------------------------------------------------------------------------------


class Factors(NamedTuple):
    """scaling b a is added to a weight [E, N, K]: a [E, r, K], b [E, N, r]."""

    a: Tensor
    b: Tensor
    scaling: float


def weight_and_factors(experts: Any, name: str) -> Tuple[Tensor, Optional[Factors]]:
    """A weight as [E, N, K], a view, and the factors of an adapter on it."""
    weight, factors = getattr(experts, name), vars(experts).get(f"_torchops_{name}")
    return (weight.mT if experts.is_transposed else weight), factors


def lora_arguments(first: Optional[Factors], second: Optional[Factors]) -> Dict[str, Any]:
    """Of the operator, which has one scale for both layers."""
    there = [factors for factors in (first, second) if factors is not None]
    scales = {factors.scaling for factors in there}
    arguments: Dict[str, Any] = {}
    for number, factors in enumerate((first, second), start=1):
        if factors is not None:
            arguments[f"lora_a{number}"] = factors.a
            arguments[f"lora_b{number}"] = factors.b if len(scales) == 1 else factors.scaling * factors.b
    return arguments | ({"lora_scale": scales.pop()} if len(scales) == 1 else {})


def pass_factors_on() -> None:
    """Lets peft hand factors to experts that multiply them with tokens.

    While a model computes, peft puts a parametrization in the place of an adapted parameter, which adds the product of
    the factors to all experts' weights: once when it is put there, and again when the weight is read.
    """
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        return
    if not hasattr(ParamWrapper, "get_delta_factors"):  # an older peft, which has their product only
        return
    parametrize = ParamWrapper._activate_lora

    @contextmanager
    def activate(self: Any, active_adapters: List[str]) -> Iterator[None]:
        experts, name = self.get_base_layer(), f"_torchops_{self.parameter_name}"
        adapters = [adapter for adapter in active_adapters or () if adapter in self.lora_A]
        if len(adapters) != 1 or not takes_factors(experts, self.parameter_name):
            with parametrize(self, active_adapters):
                yield
            return
        # peft knows how its factors lie; of a transposed weight they are the other way round.
        left, right, scaling = self.get_delta_factors(adapters[0])
        vars(experts)[name] = (
            Factors(left.mT, right.mT, scaling) if experts.is_transposed else Factors(right, left, scaling)
        )
        try:
            yield
        finally:
            del vars(experts)[name]

    ParamWrapper._activate_lora = activate  # type: ignore[method-assign]


def takes_factors(experts: Any, name: str) -> bool:
    """Whether these are weights of experts that the operator computes."""
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation != IMPLEMENTATION or not is_experts(experts) or formula(experts).gate is None:
        return False
    return name in ("up_proj", "gate_up_proj", "down_proj") and getattr(experts, name).dtype in DTYPES


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts_forward)
pass_factors_on()
