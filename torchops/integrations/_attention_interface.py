"""What attention in transformers' models has alike, whichever operator of torchops computes it: which models take it,
what a mask says, what layers may ask for.

transformers asks a registered implementation twice. For each kind of attention in a model (full, sliding, chunked;
causal or not) it describes once a pass which keys a query may see, as a function, with the offsets of the cache and
the padding; :func:`span_mask` turns that into a span and positions, as a tensor. Then every layer calls the
implementation, which reads the tensor by :func:`visible_keys`. No mask of queries times keys is ever made. How the
function is read is in ``_mask_functions.py``, how the span travels in ``_mask_carrier.py``.
"""

from typing import Any, Callable, Dict, NoReturn, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.utils.output_capturing import _active_collector

from ._attention_files import remember
from ._attention_layers import own_mask, takes_implementations
from ._mask_carrier import Visible, pack, unpack
from ._mask_functions import Span, read

MOST_FEATURES = 256

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


def register(implementation: str, attention: Callable[..., Any], mask: Callable[..., Tensor]) -> None:
    """Makes it known to transformers by this name."""
    AttentionInterface.register(implementation, attention)
    AttentionMaskInterface.register(implementation, mask)


def check_model(model: PreTrainedModel, implementation: str) -> None:
    """Every part of it takes attention implementations from outside, and asks them for what they offer."""
    for name, part in model.named_modules():
        kind: Any = type(part)  # to mypy a class is not hashable
        reason = own_mask(kind) or not_offered(part)
        if reason:
            raise TypeError(
                f"{implementation}: {type(part).__name__} ({name}) {reason}, which is not offered: leave the model its "
                "own attention"
            )
        if not isinstance(part, PreTrainedModel):
            continue
        known = part._supports_sdpa or part._supports_flex_attn or part._supports_attention_backend
        if not (known and part._can_set_attn_implementation()):
            where = f" ({name})" if name else ""
            raise TypeError(
                f"{implementation}: {type(part).__name__}{where} does not take attention implementations from outside"
            )
        if part.config.output_attentions:
            raise ValueError(f"{implementation}: no {NOT_OFFERED['output_attentions']}")


def has_cross_attention(config: Any) -> bool:
    return bool(config.is_encoder_decoder or getattr(config, "add_cross_attention", False))


def not_offered(part: nn.Module) -> Optional[str]:
    """What the sizes and options of an attention layer ask for that the operator refuses."""
    if not takes_implementations(type(part)):
        return None
    if getattr(part, "attn_logit_softcapping", None) is not None:
        return f"has {NOT_OFFERED['softcap']}"
    for size in ("head_dim", "attention_head_size", "qk_head_dim", "v_head_dim"):
        features = getattr(part, size, None)
        if isinstance(features, int) and features > MOST_FEATURES:
            return f"has heads of {features} features, more than {MOST_FEATURES}"
    return None


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
    if config is not None and not torch.compiler.is_compiling():
        remember(config)
    if attention_mask is not None:
        start = (attention_mask.cumsum(-1) == 0).sum(-1)
        # A static cache is longer than what has been seen.
        unseen = max(kv_offset + kv_length - attention_mask.shape[-1], 0)
        hidden = ~F.pad(attention_mask, (0, unseen))[:, kv_offset : kv_offset + kv_length]
    if found.span.block_size != 1:  # the model says where its blocks start
        start = zeros if found.start is None else found.start
    return pack((*found.span, attention_mask is not None), hidden, q_offset - start, kv_offset - start)


# ---- a layer --------------------------------------------------------------------------------------


def refuse(module: nn.Module, what: str) -> NoReturn:
    raise ValueError(
        f"{implementation_of(module)}: no {what}; "
        'model.set_attn_implementation("eager") goes back to the model\'s own attention'
    )


def implementation_of(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "span_attention"


def records_attentions() -> bool:
    """Whether the model was asked for them, by its config perhaps, and collects what its layers return."""
    return not torch.compiler.is_compiling() and any("attentions" in name for name in _active_collector.get() or ())


def visible_keys(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Optional[Tensor],
    dropout: float,
    is_causal: Optional[bool],
    options: Dict[str, Any],
) -> Visible:
    """What the queries of a layer see, if nothing else is asked for that an implementation is called with."""
    if dropout:
        refuse(
            module,
            f"attention dropout (here {dropout}): make the model with a config whose attention_dropout, attn_pdrop or "
            "attention_probs_dropout_prob is 0",
        )
    for name, what in NOT_OFFERED.items():
        if options.get(name) is not None and options[name] is not False:
            refuse(module, what)
    if records_attentions():
        refuse(module, NOT_OFFERED["output_attentions"])
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:  # models that hide nothing, vision towers for example
        if is_causal and query.shape[2] != key.shape[2]:
            refuse(module, "causal attention over a cache without a mask that tells the position")
        return Visible(Span(is_causal=is_causal))
    unpacked = unpack(attention_mask, query)
    if unpacked is None:
        shape = list(attention_mask.shape)
        refuse(module, f"masks but those of padding, [B, L]; this one of shape {shape} was made elsewhere")
    if isinstance(unpacked, str):
        refuse(module, unpacked)
    if attention_mask.shape[-1] != key.shape[2]:
        raise ValueError(
            f"{implementation_of(module)}: expected as many keys as the mask has, {attention_mask.shape[-1]}, got "
            f"{key.shape[2]}"
        )
    return unpacked
