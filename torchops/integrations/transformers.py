"""Span attention in Hugging Face's transformers: the attention of their models, as they have it or mixed.

transformers asks a registered implementation twice. For each kind of attention in a model (full, sliding,
chunked; causal or not) it describes once a pass which keys a query may see, as a function, with the
offsets of the cache and the padding; :func:`span_mask` turns that into a span and positions. Then every
layer calls :func:`span_attention_forward` with what the first one returned. No mask of queries times keys
is ever made.
"""

import inspect
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, NoReturn, Optional, Tuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils

    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError("the installed transformers is too old")
except ImportError as error:
    raise ImportError(
        "torchops.integrations.transformers needs transformers 5.23 or newer: pip install transformers"
    ) from error

from ..ops.span_attention import span_attention

__all__ = ["apply_span_attention", "register_span_attention"]

Model = TypeVar("Model", bound=PreTrainedModel)

IMPLEMENTATION = "span_attention"


def register_span_attention() -> str:
    """Makes span attention known to transformers, under the name ``"span_attention"``.

    From then on ``attn_implementation="span_attention"`` is understood by ``from_pretrained`` and
    ``from_config``, and ``model.set_attn_implementation("span_attention")`` switches a model. A model then
    computes what it computes with ``"sdpa"``: causal and bidirectional attention, sliding windows,
    attention chunks, grouped heads, attention sinks, padding on either side, dynamic, sliding and static
    caches, ``generate``.

    What the operator does not offer raises, in the forward pass: attention dropout (in training mode),
    masks of four dimensions and mask functions of a user's or model's own, packed sequences, soft-capped
    scores, position biases, ``output_attentions``, paged caches.

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


def apply_span_attention(model: Model, spans: Optional[Iterable[Optional[Dict[str, Any]]]] = None) -> Model:
    """Switches a model to span attention, and if asked layers with full attention to spans of their own:
    MASFormer's mixture of full and local layers, on a model that was trained without it.

    Blocks are counted from the first token that is not padding. Caches stay as they are: a layer with a
    local span keeps the keys it does not see any more.

    Args:
        model: changed in place; its ``config`` remembers the spans, so they are saved with it.
            ``model.set_attn_implementation("sdpa")`` is the way back.
        spans: for each layer block_size, left and right as in :func:`torchops.span_attention`, or None to
            leave the layer as it is. :func:`torchops.nn.mixed_span` makes such a list. is_causal may be
            given, and must be what the model does. None for the model's own attention in all layers.

    Returns:
        model.

    Raises:
        TypeError: the model does not take attention implementations from outside, or with spans: it has
            cross-attention.
        ValueError: a list of another length than the model has layers, or an unknown key; in the forward
            pass, a span for a layer that has a window or chunks already or differs in causality, and
            everything that :func:`register_span_attention` lists.

    Source: Zhang et al., MASFormer: Robust Hybrid Attention for Long Sequences, 2023.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> from torchops.integrations.transformers import apply_span_attention
    >>> size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=4, vocab_size=10)
    >>> model = LlamaModel(LlamaConfig(**size))
    >>> spans = torchops.nn.mixed_span(4, full_layers=[0, 3], block_size=4, is_causal=True)
    >>> apply_span_attention(model, spans)(torch.arange(10)[None]).last_hidden_state.shape
    torch.Size([1, 10, 32])
    """
    config: Any = model.config.get_text_config()
    if spans is not None:
        spans = checked_spans(config, list(spans))
    register_span_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    if config._attn_implementation != IMPLEMENTATION:
        raise TypeError(f"span attention: {type(model).__name__} does not take attention implementations from outside")
    vars(config).pop("span_attention", None)
    if spans is not None:
        config.span_attention = spans
    return model


def checked_spans(config: Any, spans: List[Optional[Dict[str, Any]]]) -> List[Optional[Dict[str, Any]]]:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise TypeError("span attention: spans of one's own are for models without cross-attention")
    if len(spans) != config.num_hidden_layers:
        raise ValueError(
            f"span attention: expected spans for {config.num_hidden_layers} layers or None, got {len(spans)}"
        )
    known = {"block_size", "left", "right", "is_causal"}
    for span in spans:
        if span is not None and not known.issuperset(span):
            raise ValueError(f"span attention: expected spans of {', '.join(sorted(known))}, got {sorted(span)}")
    return [None if span is None else dict(span) for span in spans]


# ---- what a layer sees ----------------------------------------------------------------------------


class Span(NamedTuple):
    block_size: int = 1
    left: int = -1
    right: int = -1
    is_causal: bool = False


class Visible(NamedTuple):
    """What a mask of transformers says."""

    span: Span
    key_bias: Optional[Tensor] = None  # [B, Lk]
    query_start: Optional[Tensor] = None  # [B]
    key_start: Optional[Tensor] = None  # [B]


VISIBLE = "_torchops_visible"


def span_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Optional[Tensor] = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor:
    """bool [B, 1, 1, Lk], True for keys that are no padding, with a Visible in an attribute: models and
    ``generate`` pass a tensor of four dimensions on as it is."""
    span = span_of(mask_function)
    keep = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    key_bias = None
    left_padding = torch.zeros(batch_size, dtype=torch.int64, device=device)
    if attention_mask is not None:
        left_padding = left_padding + (attention_mask.cumsum(-1) == 0).sum(-1)
        # A static cache is longer than what has been seen.
        unseen = max(kv_offset + kv_length - attention_mask.shape[-1], 0)
        keep = keep & F.pad(attention_mask, (0, unseen))[:, kv_offset : kv_offset + kv_length]
        key_bias = torch.zeros_like(keep, dtype=torch.float32).masked_fill(~keep, -torch.inf)
    mask = keep[:, None, None]
    setattr(mask, VISIBLE, Visible(span, key_bias, q_offset - left_padding, kv_offset - left_padding))
    return mask


def span_of(mask_function: Callable) -> Span:
    """The span that a mask function describes, read by calling it with symbols: functions of
    transformers.masking_utils compare positions, and everything else in them fails here."""
    try:
        return mask_function(Row(), 0, Position("query"), Position("key")).span
    except (AttributeError, IndexError, TypeError, NotImplementedError):
        refuse(
            "masks but full, sliding and chunked attention: no packed sequences (position_ids that start anew, which "
            "models compiled without an attention_mask always allow for), no image tokens that see each other"
        )


class Row:
    """A row of the batch. The one thing that a mask function looks up for it is the padding on its left."""

    @classmethod
    def __torch_function__(cls, *args: Any) -> "LeftPadding":
        return LeftPadding()


class LeftPadding:
    """Of a row."""


class Position:
    """The position of a query or a key; after_padding if it is counted from the first token."""

    def __init__(self, of: str, shift: int = 0, after_padding: bool = False) -> None:
        self.of = of
        self.shift = shift
        self.after_padding = after_padding

    def new_ones(self, *args: Any, **kwargs: Any) -> "Rule":
        return Rule(Span())

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Position):
            expect(self.of != other.of and self.shift == other.shift == 0)
            return Distance()
        if isinstance(other, LeftPadding):
            return Position(self.of, self.shift, True)
        return Position(self.of, self.shift - other, self.after_padding)

    def __floordiv__(self, size: int) -> "Block":
        expect(self.after_padding and self.shift == 0)
        return Block(self.of, size)

    def __ge__(self, least: int) -> "Rule":
        expect(least == 0)
        return Rule(Span())

    def __le__(self, query: "Position") -> "Rule":
        expect((self.of, query.of, query.shift) == ("key", "query", 0))
        return Rule(Span(is_causal=True))

    def __gt__(self, query: "Position") -> "Rule":
        expect((self.of, query.of) == ("key", "query") and query.shift < 0)
        return Rule(Span(left=-query.shift - 1))


class Distance:
    """Between a query and a key."""

    def __abs__(self) -> "Distance":
        return self

    def __le__(self, reach: int) -> "Rule":
        return Rule(Span(left=reach, right=reach))


class Block:
    """The block that a query or a key lies in."""

    def __init__(self, of: str, size: int) -> None:
        self.of = of
        self.size = size

    def __eq__(self, other: Any) -> Any:
        expect(self.of != other.of and self.size == other.size)
        return Rule(Span(block_size=self.size, left=0, right=0))


class Rule:
    """Which keys a query sees. Both sides of ``&`` have to hold."""

    device = None

    def __init__(self, span: Span) -> None:
        self.span = span

    def to(self, device: None) -> "Rule":
        return self

    def __and__(self, other: "Rule") -> "Rule":
        one, two = self.span, other.span
        everywhere = (-1, -1)
        expect(everywhere in (one[1:3], two[1:3]))
        local = two if one[1:3] == everywhere else one
        return Rule(local._replace(is_causal=one.is_causal or two.is_causal))


def expect(known: bool) -> None:
    if not known:
        raise NotImplementedError


def refuse(what: str) -> NoReturn:
    raise ValueError(
        f'span attention: no {what}; model.set_attn_implementation("sdpa") goes back to torch\'s attention'
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
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    visible: Optional[Visible]
    if attention_mask is None:  # models that hide nothing, vision towers for example
        if is_causal and query.shape[2] != key.shape[2]:
            refuse("causal attention over a cache without a mask that tells the position")
        visible = Visible(Span(is_causal=is_causal))
    else:
        visible = getattr(attention_mask, VISIBLE, None)
        if visible is None:
            refuse(
                f"masks but those of padding, [B, L]; this one of shape {list(attention_mask.shape)} was made elsewhere"
            )
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
