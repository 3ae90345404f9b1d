"""Partial results of attention, over parts of the keys, merged to the result over all of them."""

from typing import List, Tuple

import torch
from torch import Tensor

__all__ = ["merge_attention"]


def merge_attention(outputs: List[Tensor], logsumexps: List[Tensor]) -> Tuple[Tensor, Tensor]:
    """Merges what the same queries got from disjoint parts of the keys: windows and the first tokens, shards of a
    sequence, pieces of a cache.

    With o_s and l_s of part s, the whole is ``sum over s of exp(l_s - l) o_s``, where ``l = log(sum of exp(l_s))``.
    Every operator with a logsumexp makes such parts (:func:`torchops.span_attention_lse`,
    :func:`torchops.topk_attention_lse`, :func:`torchops.pq_attention_lse`), and they may be of different ones. A key
    that is in two parts counts twice; a sink belongs to one part only.

    Differentiable in both, and the same bits from run to run: parts are added in the order of the list, in the
    logsumexps' dtype. A query that saw nothing in any part gets zeros and -inf, and gradients of zero.

    Args:
        outputs: a tensor for each part, [..., Dv], any floating dtype.
        logsumexps: as many, [...], -inf where a query saw nothing in that part.

    Returns:
        output [..., Dv] in the dtype of the first output, and logsumexp [...].

    Raises:
        ValueError: no parts, not as many logsumexps as outputs, or other shapes.

    Source: online softmax, as in FlashAttention (Dao et al., 2022).

    >>> query, key, value = torch.randn(3, 1, 2, 6, 8)
    >>> parts = [torchops.span_attention_lse(query, key[:, :, t], value[:, :, t]) for t in (slice(4), slice(4, 6))]
    >>> output, logsumexp = torchops.merge_attention([o for o, l in parts], [l for o, l in parts])
    >>> torch.testing.assert_close(output, torchops.span_attention(query, key, value))
    """
    if len(outputs) == 0 or len(outputs) != len(logsumexps):
        raise ValueError(
            "merge_attention: expected outputs and logsumexps to be lists of one part or more, of the same length, got "
            f"{len(outputs)} and {len(logsumexps)}"
        )
    for part in range(len(outputs)):
        if outputs[part].shape != outputs[0].shape or logsumexps[part].shape != outputs[0].shape[:-1]:
            raise ValueError(
                "merge_attention: expected outputs of one shape, [..., Dv], and logsumexps of shape [...], got "
                f"{list(outputs[part].shape)} and {list(logsumexps[part].shape)} beside {list(outputs[0].shape)}"
            )
    weights, largest, total = merge_weights(logsumexps, [torch.ones_like(logsumexp) for logsumexp in logsumexps])
    merged = weights[0].unsqueeze(-1) * outputs[0]
    for part in range(1, len(outputs)):
        merged = merged + weights[part].unsqueeze(-1) * outputs[part]
    saw_nothing = total == 0
    # log(0) has an infinite gradient, also where it is then replaced.
    logsumexp = (largest + total.masked_fill(saw_nothing, 1.0).log()).masked_fill(saw_nothing, -torch.inf)
    return merged.to(outputs[0].dtype), logsumexp


def merge_weights(largest: List[Tensor], total: List[Tensor]) -> Tuple[List[Tensor], Tensor, Tensor]:
    """The weight of each part's output in the whole, where a part has the softmax's denominator total * exp(largest),
    and the denominator of the whole in that form. All of one shape; a part without keys has -inf and any total."""
    reference = largest[0]
    for other in largest[1:]:
        reference = torch.maximum(reference, other)
    # -inf - -inf would be NaN: the lowest finite number in its place. It cancels, so it needs no gradient.
    reference = reference.detach().nan_to_num(nan=torch.nan, posinf=torch.inf)
    parts = [total[part] * torch.exp(largest[part] - reference) for part in range(len(total))]
    sum = parts[0]
    for part in parts[1:]:
        sum = sum + part
    divisor = sum.masked_fill(sum == 0, 1.0)
    return [part / divisor for part in parts], reference, sum
