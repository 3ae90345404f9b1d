"""Span attention in Hugging Face's transformers: a model's own attention, or a mixture of full and local layers.

``apply_routed_experts`` is here, too; other integrations have modules of their own.
"""

from typing import Any, Dict, Iterable, List, Literal, Optional, Tuple, TypeVar, Union

from torch import Tensor, nn

from ..ops.span_attention import span_attention
from ._requirements import imports_of

with imports_of(__name__, "transformers", "5.23"):
    from ._attention_files import keep, prepare
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
    from ._mask_functions import Span
    from .transformers_routed_experts import apply_routed_experts

__all__ = ["apply_routed_experts", "apply_span_attention", "register_span_attention"]

Model = TypeVar("Model", bound=PreTrainedModel)

IMPLEMENTATION = "span_attention"


def register_span_attention() -> str:
    """Makes span attention known to transformers, under the name ``"span_attention"``.

    From then on ``attn_implementation="span_attention"`` is understood by ``from_pretrained`` and
    ``from_config``, and ``model.set_attn_implementation("span_attention")`` switches a model. A model then
    gives the results of ``"eager"``: causal and bidirectional attention, sliding windows to one or
    both sides, attention chunks, grouped heads, attention sinks, padding on either side, dynamic, sliding and
    static caches, ``generate``.

    What the operator does not offer raises, in the forward pass: attention dropout (in training mode), masks of
    three or four dimensions, mask functions that are not understood as a span, packed sequences, soft-capped
    scores, position biases, ``output_attentions``, paged caches. :func:`apply_span_attention` also refuses
    models that compute attention, or parts of it such as the mask, by themselves; switched by name such a model
    fails or gives NaN where it uses a mask.

    Returns:
        The name.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> from torchops.integrations.transformers import register_span_attention
    >>> size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=10)
    >>> model = LlamaModel._from_config(LlamaConfig(**size), attn_implementation=register_span_attention())
    >>> model(torch.arange(10)[None]).last_hidden_state.shape
    torch.Size([1, 10, 32])
    """
    register(IMPLEMENTATION, span_attention_forward, span_mask)
    return IMPLEMENTATION


def apply_span_attention(
    model: Model, spans: Union[Iterable[Optional[Dict[str, Any]]], Literal[False], None] = None
) -> Model:
    """Switches a model to span attention, and if asked layers with full attention to spans of their own:
    MASFormer's mixture of full and local layers, on a model that was trained without it.

    Blocks are counted from the first token that is not padding. Caches stay as they are: a layer with a
    local span keeps the keys it does not see any more.

    The spans are saved with the model, in its config, together with the name of the implementation. Where that
    is not registered, transformers refuses to load the model. This loads it::

        AutoModelForCausalLM.from_pretrained(directory, attn_implementation=register_span_attention())

    Args:
        model: changed in place. ``model.set_attn_implementation("eager")`` is the way back to its own attention.
        spans: for each layer block_size, left and right as in :func:`torchops.span_attention`, or None to
            leave the layer as it is. :func:`torchops.nn.mixed_span` makes such a list. Positions are those of the
            sequence, of which an image encoder's class token is the first. is_causal may be
            given, and must be what the model does. None for the spans in the config of the model, if it has
            any. False takes them out: all layers as the model has them.

    Returns:
        model.

    Raises:
        TypeError: the model, or a part of it, does not take attention implementations from outside, makes or reads the
            mask of its attention itself (sparse attention with an indexer), adds position biases, soft-caps scores,
            or has heads of more than 256 features. With spans:
            it has cross-attention, or a layer with a span whose attention does not say which layer it is and that
            runs several times (ALBERT).
        ValueError: a list of another length than the model has layers, an unknown key, or something else than
            integers; in the forward pass, a span for a layer that has a window or chunks already or differs in
            causality, and everything that :func:`register_span_attention` lists.

    Source: Zhang et al., MASFormer: Robust Hybrid Attention for Long Sequences, 2023.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> from torchops.integrations.transformers import apply_span_attention
    >>> size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=4, vocab_size=10)
    >>> model = LlamaModel(LlamaConfig(**size))
    >>> spans = torchops.nn.mixed_span(4, full_layers=[0, 3], block_size=4, is_causal=True)
    >>> apply_span_attention(model, spans)(torch.arange(10)[None]).last_hidden_state.shape
    span_attention: a saved copy loads with from_pretrained(..., attn_implementation=register_span_attention())
    torch.Size([1, 10, 32])
    """
    check_model(model, IMPLEMENTATION)
    config: Any = model.config.get_text_config()
    if spans is None:
        spans = getattr(config, "span_attention", None)
    new = checked_spans(model, config, list(spans)) if spans else None
    register_span_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    keep(model, **({} if new is None else {"span_attention": new}))
    if new is not None:
        print(f"span_attention: a saved copy loads with {RESTORE}")
    return model


RESTORE = "from_pretrained(..., attn_implementation=register_span_attention())"


def checked_spans(
    model: nn.Module, config: Any, spans: List[Optional[Dict[str, Any]]]
) -> List[Optional[Dict[str, Any]]]:
    if has_cross_attention(config):
        raise TypeError("span_attention: spans of one's own are for models without cross-attention")
    if len(spans) != config.num_hidden_layers:
        raise ValueError(
            f"span_attention: expected spans for {config.num_hidden_layers} layers or None, got {len(spans)}"
        )
    known = {"block_size", "left", "right", "is_causal"}
    number_layers(model)
    layers = {module.layer_idx for module in model.modules() if knows_its_layer(module, config)}
    for layer, span in enumerate(spans):
        if span is None:
            continue
        if not known.issuperset(span):
            raise ValueError(f"span_attention: expected spans of {', '.join(sorted(known))}, got {sorted(span)}")
        for key, value in span.items():
            kind = bool if key == "is_causal" else int
            if type(value) is not kind or (kind is int and value < (1 if key == "block_size" else -1)):
                least = "" if kind is bool else f" of at least {1 if key == 'block_size' else -1}"
                raise ValueError(f"span_attention: expected {key} of type {kind.__name__}{least}, got {value!r}")
        if layer not in layers:
            raise TypeError(
                f"span_attention: no span of one's own for layer {layer} of {type(model).__name__}, whose attention "
                "does not say which layer it is"
            )
    return [None if span is None else dict(span) for span in spans]


def number_layers(model: Any) -> None:
    """Tells attention layers which layer they are that have not been told: those of encoders, which have no cache."""
    config = model.config.get_text_config()
    for stack in model.modules():
        # Where layers are shared, as in ALBERT, there are fewer of them.
        if not isinstance(stack, nn.ModuleList) or len(stack) != config.num_hidden_layers:
            continue
        for index, layer in enumerate(stack):
            found: List[Any] = [module for module in layer.modules() if takes_implementations(type(module))]
            if len(found) == 1 and getattr(found[0], "config", None) is config and not hasattr(found[0], "layer_idx"):
                found[0].layer_idx = index


# Spans have no tensors, but a layer has to find its own.
prepare["span_attention"] = number_layers


def knows_its_layer(module: nn.Module, config: Any) -> bool:
    """Whether own_span finds the spans of config for this module."""
    if not isinstance(getattr(module, "layer_idx", None), int) or getattr(module, "config", None) is not config:
        return False
    return takes_implementations(type(module))


def span_attention_forward(
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
    visible = visible_keys(module, query, key, attention_mask, dropout, is_causal, kwargs)
    span = own_span(module, visible.span)
    output = span_attention(
        query,
        key,
        value,
        block_size=span.block_size,
        left=span.left,
        right=span.right,
        is_causal=span.is_causal,
        scale=scaling,
        key_bias=visible.key_bias,
        sink=s_aux,
        query_start=visible.query_start,
        key_start=visible.key_start,
    )
    return output.transpose(1, 2).contiguous(), None


def own_span(module: nn.Module, span: Span) -> Span:
    """The span that apply_span_attention gave to this layer, or else the model's."""
    spans = getattr(getattr(module, "config", None), "span_attention", None)
    if spans is None:
        return span
    layer: Any = getattr(module, "layer_idx", None)
    if layer is None:
        refuse(module, f"spans of one's own for {type(module).__name__}, which does not know which layer it is")
    own = spans[layer]
    if own is None:
        return span
    if not span.is_full:
        refuse(module, f"span of one's own for layer {layer}, which sees {span} already: give None for it")
    if own.get("is_causal", span.is_causal) != span.is_causal:
        refuse(module, f"is_causal={own['is_causal']} for layer {layer} of a model with is_causal={span.is_causal}")
    return span._replace(**own)
