"""Models of transformers that choose keys themselves, DSA's and MiniMax's, with attention over their lists.

With "eager" or "sdpa" these models turn their lists into a mask of all queries and keys, and compute full attention
under it. Here the lists go to :func:`torchops.topk_attention`.
"""

from typing import Any, Optional, Tuple, TypeVar

import torch
from torch import Tensor

from ..ops.sparse_attention import topk_attention
from ._attention_interface import (
    PreTrainedModel,
    masking_utils,
    refuse,
    register,
    span_mask,
    visible_keys,
)
from ._attention_layers import passes
from .transformers import span_attention_forward

__all__ = ["apply_topk_attention"]

Model = TypeVar("Model", bound=PreTrainedModel)

IMPLEMENTATION = "topk_attention"


def apply_topk_attention(model: Model) -> Model:
    """Passes the lists of keys or blocks that a model chooses to :func:`torchops.topk_attention`.

    For models with DeepSeek's indexer (DSA: DeepSeek-V3.2, GLM) and with MiniMax M3's. Results are those of "eager",
    gradients, caches and padding included. Their indexers are unchanged, and so is the mask of all queries and keys
    that DSA's reads. Layers without a choice of keys are computed by :func:`torchops.span_attention`.

    Args:
        model: changed in place. ``model.set_attn_implementation("eager")`` is the way back.

    Returns:
        model.

    Raises:
        TypeError: no layer of the model hands lists to its attention implementation.
        ValueError: in the forward pass, attention dropout, output_attentions and what else
            :func:`torchops.integrations.transformers.register_span_attention` lists.

    Source: DSA (DeepSeek-V3.2, 2025).

    >>> from transformers import DeepseekV32Config, DeepseekV32Model
    >>> from torchops.integrations.transformers_topk_attention import apply_topk_attention
    >>> size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    >>> size |= dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    >>> size |= dict(n_routed_experts=2, index_topk=4, index_n_heads=2, index_head_dim=16)
    >>> model = apply_topk_attention(DeepseekV32Model(DeepseekV32Config(**size)))
    >>> model(torch.arange(20)[None]).last_hidden_state.shape
    torch.Size([1, 20, 32])
    """
    kinds: Any = {type(part) for part in model.modules()}
    if not any(passes(kind, ("indices", "block_indices")) for kind in kinds):
        raise TypeError(f"{IMPLEMENTATION}: expected a model that chooses keys itself, got {type(model).__name__}")
    register(IMPLEMENTATION, topk_attention_forward, topk_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def topk_mask(**description: Any) -> Tensor:
    """The mask that DSA's indexer reads, [B, 1, Lq, Lk]; of other models a span."""
    if hasattr(description.get("config"), "index_topk"):
        mask = masking_utils.sdpa_mask(**description | {"allow_is_causal_skip": False})
        assert mask is not None
        return mask
    return span_mask(**description)


def topk_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    s_aux: Optional[Tensor] = None,
    indices: Optional[Tensor] = None,
    block_indices: Optional[Tensor] = None,
    **kwargs: Any,
) -> Tuple[Tensor, None]:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], indices [B, Lq, k] or block_indices
    [B, Hkv, Lq, k] -> [B, Lq, Hq, Dv]."""
    if indices is not None:
        assert attention_mask is not None  # the indexer has read it
        visible_keys(module, query, key, None, dropout, False, kwargs)
        seen = attention_mask[:, 0].expand(-1, query.shape[2], -1)
        seen = seen if seen.dtype == torch.bool else seen == 0
        lists = indices.masked_fill(~seen.gather(-1, indices.long()), -1)
        output = topk_attention(query, key, value, lists[:, None], scale=scaling, sink=s_aux)
    elif block_indices is not None:
        visible = visible_keys(module, query, key, attention_mask, dropout, is_causal, kwargs)
        if not visible.span.is_full:
            refuse(module, f"chosen blocks in a layer that sees {visible.span}")
        # These models count blocks from the first slot of the cache, padding or not.
        query_start = visible.query_start
        if visible.query_start is not None and visible.key_start is not None:
            query_start = visible.query_start - visible.key_start
        output = topk_attention(
            query,
            key,
            value,
            block_indices,
            block_size=module.indexer.block_size,
            is_causal=visible.span.is_causal,
            scale=scaling,
            key_bias=visible.key_bias,
            sink=s_aux,
            query_start=query_start,
        )
    else:
        return span_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, s_aux, **kwargs
        )
    return output.transpose(1, 2).contiguous(), None
