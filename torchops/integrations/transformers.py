"""Span attention in Hugging Face's transformers: the attention of their models, as they have it or mixed.

transformers asks a registered implementation twice. For each kind of attention in a model (full, sliding,
chunked; causal or not) it describes once a pass which keys a query may see, as a function, with the
offsets of the cache and the padding; :func:`span_mask` turns that into a span and positions. Then every
layer calls :func:`span_attention_forward` with what the first one returned. No mask of queries times keys
is ever made. How the function is read is in ``_mask_functions.py``, how the span travels in ``_mask_carrier.py``.
"""

import inspect
from typing import Any, Callable, Dict, Iterable, List, Literal, NoReturn, Optional, Tuple, TypeVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
    from transformers.utils.output_capturing import _active_collector

    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError("the installed transformers is too old")
except ImportError as error:
    raise ImportError(
        "torchops.integrations.transformers needs transformers 5.23 or newer: pip install transformers"
    ) from error

from ..ops.span_attention import span_attention
from ._mask_carrier import Visible, pack, unpack
from ._mask_functions import Span, read
from ._own_masks import makes_its_mask

__all__ = ["apply_span_attention", "register_span_attention"]

Model = TypeVar("Model", bound=PreTrainedModel)

IMPLEMENTATION = "span_attention"


def register_span_attention() -> str:
    """Makes span attention known to transformers, under the name ``"span_attention"``.

    From then on ``attn_implementation="span_attention"`` is understood by ``from_pretrained`` and
    ``from_config``, and ``model.set_attn_implementation("span_attention")`` switches a model. A model then
    computes what it computes with ``"eager"``: causal and bidirectional attention, sliding windows to one or
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
    AttentionInterface.register(IMPLEMENTATION, span_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, span_mask)
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
            leave the layer as it is. :func:`torchops.nn.mixed_span` makes such a list. is_causal may be
            given, and must be what the model does. None for the spans in the config of the model, if it has
            any. False takes them out: all layers as the model has them.

    Returns:
        model.

    Raises:
        TypeError: the model, or a part of it, does not take attention implementations from outside, or makes the mask
            of its attention itself (sparse attention with an indexer, position biases). With spans:
            it has cross-attention, or a layer with a span whose attention does not say which layer it is.
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
    span attention: a saved copy loads with from_pretrained(..., attn_implementation=register_span_attention())
    torch.Size([1, 10, 32])
    """
    check_model(model)
    config: Any = model.config.get_text_config()
    if spans is None:
        spans = getattr(config, "span_attention", None)
    new = checked_spans(model, config, list(spans)) if spans else None
    register_span_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    for part in (model.config, config):
        for key in ("span_attention", "attn_implementation"):
            vars(part).pop(key, None)
    if new is not None:
        config.span_attention = new
        remember(config)
        remember(model.config)
        print(f"span attention: a saved copy loads with {RESTORE}")
    return model


RESTORE = "from_pretrained(..., attn_implementation=register_span_attention())"


def remember(config: Any) -> None:
    """In the file of a config this is what loads it, and it is taken out then."""
    config.attn_implementation = IMPLEMENTATION


def check_model(model: PreTrainedModel) -> None:
    """Every part of it takes attention implementations from outside, and gives them the mask that it is given."""
    for name, part in model.named_modules():
        if makes_its_mask(type(part)):  # type: ignore[arg-type]  # mypy takes no class for hashable
            raise TypeError(
                f"span attention: {type(part).__name__} ({name}) makes the mask of its attention itself, which no span "
                "describes: leave the model its own attention"
            )
        if not isinstance(part, PreTrainedModel):
            continue
        known = part._supports_sdpa or part._supports_flex_attn or part._supports_attention_backend
        if not (known and part._can_set_attn_implementation()):
            where = f" ({name})" if name else ""
            raise TypeError(
                f"span attention: {type(part).__name__}{where} does not take attention implementations from outside"
            )
        if part.config.output_attentions:
            raise ValueError(f"span attention: no {NOT_OFFERED['output_attentions']}")


def checked_spans(
    model: nn.Module, config: Any, spans: List[Optional[Dict[str, Any]]]
) -> List[Optional[Dict[str, Any]]]:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise TypeError("span attention: spans of one's own are for models without cross-attention")
    if len(spans) != config.num_hidden_layers:
        raise ValueError(
            f"span attention: expected spans for {config.num_hidden_layers} layers or None, got {len(spans)}"
        )
    known = {"block_size", "left", "right", "is_causal"}
    layers = {module.layer_idx for module in model.modules() if knows_its_layer(module, config)}
    for layer, span in enumerate(spans):
        if span is None:
            continue
        if not known.issuperset(span):
            raise ValueError(f"span attention: expected spans of {', '.join(sorted(known))}, got {sorted(span)}")
        for key, value in span.items():
            kind = bool if key == "is_causal" else int
            if type(value) is not kind or (kind is int and value < (1 if key == "block_size" else -1)):
                least = "" if kind is bool else f" of at least {1 if key == 'block_size' else -1}"
                raise ValueError(f"span attention: expected {key} of type {kind.__name__}{least}, got {value!r}")
        if layer not in layers:
            raise TypeError(
                f"span attention: no span of one's own for layer {layer} of {type(model).__name__}, whose attention "
                "does not say which layer it is"
            )
    return [None if span is None else dict(span) for span in spans]


def knows_its_layer(module: nn.Module, config: Any) -> bool:
    """Whether own_span finds the spans of config for this module."""
    if not isinstance(getattr(module, "layer_idx", None), int) or getattr(module, "config", None) is not config:
        return False
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(inspect.unwrap(type(module).forward))


# ---- a mask ---------------------------------------------------------------------------------------

NOT_READ = (
    "masks but full, sliding and chunked attention: no packed sequences (position_ids that start anew, which "
    "models compiled without an attention_mask always allow for), no image tokens that see each other"
)


def span_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Optional[Tensor] = None,
    device: Any = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor:
    """What :func:`span_attention_forward` unpacks. A mask that is no span is refused there: models make masks
    that none of their layers uses."""
    hidden = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device)
    start = zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
    if attention_mask is not None and attention_mask.dim() != 2:
        what = f"masks but those of padding, [B, L]; this one has {attention_mask.dim()} dimensions"
        return pack(what, hidden, zeros, zeros)
    found = read(mask_function, batch_size, kv_offset + kv_length)
    if found is None:
        return pack(NOT_READ, hidden, zeros, zeros)
    if getattr(config, "span_attention", None) is not None and not torch.compiler.is_compiling():
        remember(config)
    if attention_mask is not None:
        start = (attention_mask.cumsum(-1) == 0).sum(-1)
        # A static cache is longer than what has been seen.
        unseen = max(kv_offset + kv_length - attention_mask.shape[-1], 0)
        hidden = ~F.pad(attention_mask, (0, unseen))[:, kv_offset : kv_offset + kv_length]
    if found.span.block_size != 1:  # the model says where its blocks start
        start = zeros if found.start is None else found.start
    return pack((*found.span, attention_mask is not None), hidden, q_offset - start, kv_offset - start)


def refuse(what: str) -> NoReturn:
    raise ValueError(
        f'span attention: no {what}; model.set_attn_implementation("eager") goes back to the model\'s own attention'
    )


# ---- a layer --------------------------------------------------------------------------------------

# What layers of some models pass that changes their attention.
NOT_OFFERED = {
    "softcap": "soft-capped scores (attn_logit_softcapping of the config)",
    "position_bias": "position biases",
    "relative_position_bias": "position biases",
    "output_attentions": "output_attentions: probabilities are never stored",
    "cache": "paged caches",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "seq_idx": "packed sequences",
    "indices": "selected keys",
    "block_indices": "selected keys",
    "head_mask": "head masks",
    "sinks": "sinks but those of one logit a head",
}


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
    if dropout:
        refuse(
            f"attention dropout (here {dropout}): make the model with a config whose attention_dropout, attn_pdrop or "
            "attention_probs_dropout_prob is 0"
        )
    for name, what in NOT_OFFERED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            refuse(what)
    if not torch.compiler.is_compiling() and any("attentions" in name for name in _active_collector.get() or ()):
        refuse(NOT_OFFERED["output_attentions"])
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:  # models that hide nothing, vision towers for example
        if is_causal and query.shape[2] != key.shape[2]:
            refuse("causal attention over a cache without a mask that tells the position")
        visible = Visible(Span(is_causal=is_causal))
    else:
        unpacked = unpack(attention_mask, query)
        if unpacked is None:
            refuse(
                f"masks but those of padding, [B, L]; this one of shape {list(attention_mask.shape)} was made elsewhere"
            )
        if isinstance(unpacked, str):
            refuse(unpacked)
        visible = unpacked
        if attention_mask.shape[-1] != key.shape[2]:
            raise ValueError(
                f"span attention: expected as many keys as the mask has, {attention_mask.shape[-1]}, got {key.shape[2]}"
            )
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
        refuse(f"spans of one's own for {type(module).__name__}, which does not know which layer it is")
    own = spans[layer]
    if own is None:
        return span
    if span != Span(is_causal=span.is_causal):
        refuse(f"span of one's own for layer {layer}, which sees {span} already: give None for it")
    if own.get("is_causal", span.is_causal) != span.is_causal:
        refuse(f"is_causal={own['is_causal']} for layer {layer} of a model with is_causal={span.is_causal}")
    return span._replace(**own)
