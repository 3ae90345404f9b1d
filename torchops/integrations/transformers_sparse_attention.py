"""SPT's sparse attention in Hugging Face's transformers: each query of a model attends to the keys most similar to it.

Importing this module is what ``from_pretrained`` needs to load a converted model.
"""

from typing import Any, Callable, Iterable, Iterator, List, Optional, Tuple, TypeVar, Union

from torch import Tensor, nn

from ..nn.sparse_attention import PQAttention
from ..nn.sparse_attention_calibration import calibrate_codebooks
from ._attention_files import keep as keep_arguments
from ._attention_files import prepare
from ._attention_interface import (
    PreTrainedModel,
    check_model,
    has_cross_attention,
    refuse,
    register,
    span_mask,
    visible_keys,
)
from ._attention_layers import takes_implementations
from .transformers import span_attention_forward

__all__ = ["apply_sparse_attention", "remove_sparse_attention"]

Model = TypeVar("Model", bound=PreTrainedModel)

IMPLEMENTATION = "sparse_attention"


def apply_sparse_attention(
    model: Model,
    keep: Union[int, float, None] = None,
    calibration: Optional[Callable[[nn.Module], Any]] = None,
    *,
    full_layers: Iterable[int] = (),
    num_codewords: int = 16,
    subspace: int = 8,
    sink_keys: int = 0,
    local_keys: int = 0,
) -> Model:
    """Lets each query of a model attend to the keys most similar to it, found by product quantization (SPT).

    Every attention layer gets a :class:`torchops.nn.PQAttention` named ``pq_attention``, behind its projections and
    rotary positions. Layers that have a window or chunks already, and those of other parts of a model than its text,
    keep what they see, computed by :func:`torchops.span_attention`. While the model trains,
    ``loss + 0.01 * torchops.nn.quantization_loss(model)`` lets the codebooks follow. For peft they are
    ``modules_to_save=["pq_attention"]``.

    A model is saved with its codebooks, and with ``keep`` and the rest in its config. ``from_pretrained`` loads it
    where this module has been imported. That takes the place of a quantization in the config. A model that is quantized
    keeps its own, and comes back without codebooks: ``apply_sparse_attention(model)`` then makes them anew, with the
    arguments in the config.

    Args:
        model: changed in place. ``model.set_attn_implementation("eager")`` is the way back to its own attention for a
            while, and :func:`remove_sparse_attention` for good.
        keep: how many keys each query attends to: a number, or a share of all keys in (0, 1]. With a share ``generate``
            attends to more keys as its cache grows, and to the share of the maximal length in a static one. None for
            what the config says.
        calibration: called with the model; lets it compute typical inputs, once or more often, to which codebooks are
            fitted (:func:`torchops.nn.calibrate_codebooks`). Without one they are random numbers.
        full_layers: attention layers that go on seeing all keys, counted from 0; negative numbers from the end.
        num_codewords, subspace, sink_keys, local_keys: as in :class:`torchops.nn.PQAttention`.

    Returns:
        model.

    Raises:
        TypeError: the model, or a part of it, does not take attention implementations from outside, makes or reads the
            mask of its attention itself, adds position biases, soft-caps scores, or has cross-attention; or no layer of
            it attends to all keys.
        ValueError: keep that neither the call nor the config says, a model that is converted already, a layer that does
            not exist, a number of features that subspace does not divide, and what else PQAttention refuses; in the
            forward pass, attention dropout, masks of three or four dimensions, packed sequences, output_attentions.

    Source: SPT (Gui et al., 2023).

    >>> from transformers import LlamaConfig, LlamaModel
    >>> from torchops.integrations.transformers_sparse_attention import apply_sparse_attention
    >>> size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=10)
    >>> model, tokens = LlamaModel(LlamaConfig(**size)), torch.arange(40)[None] % 10
    >>> model = apply_sparse_attention(model, keep=8, calibration=lambda model: model(tokens))
    >>> model(tokens).last_hidden_state.shape
    torch.Size([1, 40, 32])
    """
    check_model(model, IMPLEMENTATION)
    config: Any = model.config.get_text_config()
    if has_cross_attention(config):
        raise TypeError(f"{IMPLEMENTATION}: expected a model without cross-attention, got {type(model).__name__}")
    arguments: Any = getattr(config, "pq_attention", None)
    if keep is None and arguments is None:
        raise ValueError(f"{IMPLEMENTATION}: expected keep, which the config of the model does not say either")
    if keep is not None:
        arguments = {
            "keep": keep,
            "full_layers": list(full_layers),
            "num_codewords": num_codewords,
            "subspace": subspace,
            "sink_keys": sink_keys,
            "local_keys": local_keys,
        }
    made = made_for(model, config, **arguments)
    attach(made)
    model.set_attn_implementation(IMPLEMENTATION)
    keep_arguments(model, pq_attention=arguments)
    if calibration is not None:
        calibrate_codebooks(model, calibration)
    return model


def remove_sparse_attention(model: Model) -> Model:
    """Takes the codebooks out of a model, and lets it attend to all keys again.

    Args:
        model: one that :func:`apply_sparse_attention` has converted; changed in place.

    Returns:
        model, with torch's own attention ("sdpa") where it supports that, else "eager".

    Raises:
        ValueError: it has no sparse attention.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> from torchops.integrations.transformers_sparse_attention import *
    >>> size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=10)
    >>> model = apply_sparse_attention(LlamaModel(LlamaConfig(**size)), keep=8)
    >>> remove_sparse_attention(model).config._attn_implementation
    'sdpa'
    """
    layers = [layer for layer in model.modules() if hasattr(layer, "pq_attention")]
    if not layers:
        raise ValueError(f"{IMPLEMENTATION}: expected a model with it, {type(model).__name__} has none to remove")
    for layer in layers:
        del layer.pq_attention
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    keep_arguments(model)
    return model


def made_for(
    model: nn.Module, config: Any, keep: Union[int, float], full_layers: List[int], subspace: int, **options: int
) -> List[Tuple[nn.Module, Optional[PQAttention]]]:
    """What each layer that sees all keys is to attend with; None where that stays so."""
    layers = list(full_attention_layers(model, config))
    if not layers:
        raise TypeError(f"{IMPLEMENTATION}: expected layers that attend to all keys, {type(model).__name__} has none")
    if any(hasattr(layer, "pq_attention") for layer in layers):
        raise ValueError(
            f"{IMPLEMENTATION}: expected a model without it, {type(model).__name__} has it already; "
            "remove_sparse_attention(model) takes it out"
        )
    for number in full_layers:
        if not -len(layers) <= number < len(layers):
            raise ValueError(
                f"{IMPLEMENTATION}: expected full_layers in {-len(layers)}..{len(layers) - 1}, got {number}"
            )
    full = {number % len(layers) for number in full_layers}
    made: List[Tuple[nn.Module, Optional[PQAttention]]] = []
    for number, layer in enumerate(layers):
        attend = None
        if number not in full:
            attend = PQAttention(features(layer), keep=keep, subspace=subspace, **options)
            attend.to(next(layer.parameters())).train(layer.training)
        made.append((layer, attend))
    return made


def attach(made: List[Tuple[nn.Module, Optional[PQAttention]]]) -> None:
    for layer, attend in made:
        setattr(layer, "pq_attention", attend)  # noqa: B010


def make_room(model: PreTrainedModel) -> None:
    """For codebooks that are about to be loaded."""
    config: Any = model.config.get_text_config()
    attach(made_for(model, config, **config.pq_attention))


def full_attention_layers(model: nn.Module, config: Any) -> Iterator[nn.Module]:
    return (layer for layer in model.modules() if attends_to_all(layer, config))


def attends_to_all(layer: nn.Module, config: Any) -> bool:
    """Whether it is a layer of this part of the model, and the model lets it see all keys."""
    if not takes_implementations(type(layer)) or getattr(layer, "config", None) is not config:
        return False
    kinds, number = getattr(config, "layer_types", None), getattr(layer, "layer_idx", None)
    if kinds is not None and number is not None:
        return kinds[number] == "full_attention"
    return not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def features(layer: nn.Module) -> int:
    """Of a query and a key."""
    for name in ("qk_head_dim", "head_dim", "attention_head_size"):
        size = getattr(layer, name, None)
        if isinstance(size, int):
            return size
    raise TypeError(f"{IMPLEMENTATION}: expected a layer that says how large its heads are, got {type(layer).__name__}")


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    s_aux: Optional[Tensor] = None,
    **kwargs: Any,
) -> Tuple[Tensor, None]:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> [B, Lq, Hq, Dv]."""
    attend = getattr(module, "pq_attention", None)
    if attend is None:
        config = getattr(module, "config", None)
        converted = getattr(config, "pq_attention", None) is not None and attends_to_all(module, config)
        if converted and not hasattr(module, "pq_attention"):
            refuse(module, "codebooks: apply_sparse_attention(model) makes them, as the model's config says")
        return span_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, s_aux, **kwargs
        )
    visible = visible_keys(module, query, key, attention_mask, dropout, is_causal, kwargs)
    if not visible.span.is_full:
        refuse(module, f"chosen keys in a layer that sees {visible.span}")
    output = attend(
        query,
        key,
        value,
        is_causal=visible.span.is_causal,
        scale=scaling,
        key_bias=visible.key_bias,
        sink=s_aux,
        query_start=visible.query_start,
        key_start=visible.key_start,
    )
    return output.transpose(1, 2).contiguous(), None


register(IMPLEMENTATION, sparse_attention_forward, span_mask)
prepare["pq_attention"] = make_room
