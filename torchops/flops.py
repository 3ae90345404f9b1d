"""How many floating-point operations the operators take, for ``torch.utils.flop_counter.FlopCounterMode``.

They are counted as torch counts its own: two for each multiplication in a product of matrices, and none for what is
computed number by number. Numbers in tensors are not looked at: an entry of a list or of a router counts whether it
names a key or block or not, and so does a listed key behind its query; the last query stands at the last key, whatever
``query_start`` and ``key_start`` say. A backward of attention computes the scores again, which counts.

``stf_factorize`` and ``stf_project`` have no formula, for their decompositions take as long as the numbers ask for.

>>> from torch.utils.flop_counter import FlopCounterMode
>>> query = torch.randn(1, 2, 100, 16, requires_grad=True)
>>> with FlopCounterMode(display=False) as counter:
...     output = torchops.span_attention(query, query, query, left=9, right=0, is_causal=True)
>>> counter.get_total_flops() == 2 * 2 * (16 + 16) * (100 * 10 - 45)  # 2 heads, 10 keys but for the first queries
True
"""

from functools import cache
from math import prod
from types import SimpleNamespace
from typing import Any, Callable, List, Optional

from torch.utils.flop_counter import register_flop_formula

from ._namespace import operators

__all__: List[str] = []  # registered with torch

Formula = Callable[[Any], int]


def counts(*names: str) -> Callable[[Formula], Formula]:
    """Registers a formula, which takes an operator's arguments by their names."""

    def register(formula: Formula) -> Formula:
        for name in names:
            arguments = getattr(operators, name).default._schema.arguments
            defaults = {argument.name: argument.default_value for argument in arguments}

            def count(*given: Any, out_val: Any, defaults: Any = defaults, **named: Any) -> int:
                return formula(SimpleNamespace(**defaults | dict(zip(defaults, given, strict=False)) | named))

            register_flop_formula(getattr(operators, name), get_raw=True)(count)
        return formula

    return register


def rows(tensor: Any) -> int:
    return prod(tensor.shape[:-1])


# ---- attention ----------------------------------------------------------------------------------


@cache
def visible(
    num_queries: int,
    num_keys: int,
    block_size: int = 1,
    left: int = -1,
    right: int = -1,
    is_causal: bool = False,
    at_most: Optional[int] = None,
) -> int:
    """How many pairs of a query and a key there are, with at most so many keys of a query."""
    pairs = 0
    for position in range(num_keys - num_queries, num_keys):
        block = position // block_size
        first = max((block - left) * block_size, 0) if left >= 0 else 0
        last = min((block + right + 1) * block_size, num_keys) if right >= 0 else num_keys
        keys = max((min(last, position + 1) if is_causal else last) - first, 0)
        pairs += keys if at_most is None else min(keys, at_most)
    return pairs


def pairs_of(call: Any, heads: Any, num_keys: int) -> int:
    """Of queries [B, Hq, Lq, ...] and their keys in a call of any attention."""
    batch, num_heads, num_queries = heads.shape[:3]
    if hasattr(call, "left"):
        pairs = visible(num_queries, num_keys, call.block_size, call.left, call.right, call.is_causal)
    elif hasattr(call, "query_codes"):
        pairs = visible(num_queries, num_keys, is_causal=call.is_causal, at_most=call.k)
    else:
        pairs = num_queries * call.indices.shape[3] * min(call.block_size, num_keys)
    return batch * num_heads * pairs


@counts(
    *("span_attention", "span_attention_lse", "_span_attention_forward"),
    *("topk_attention", "topk_attention_lse", "_topk_attention_forward"),
    *("pq_attention", "pq_attention_lse", "_pq_attention_forward"),
)
def attention(call: Any) -> int:
    dims = call.query.shape[3] + call.value.shape[3]
    return 2 * dims * pairs_of(call, call.query, call.key.shape[2])


@counts("_span_attention_backward", "_topk_attention_backward", "_pq_attention_backward")
def attention_backward(call: Any) -> int:
    to_query, to_key, to_value, to_key_bias, _, *to_pair_bias = call.output_mask
    to_scores = any((to_query, to_key, to_key_bias, *to_pair_bias))
    if not to_scores and not to_value:
        return 0
    pairs = pairs_of(call, call.normalizer, call.key.shape[2])
    dim, value_dim = call.key.shape[3], 0 if call.grad_output is None else call.grad_output.shape[3]
    return 2 * pairs * (dim * (1 + to_query + to_key) + value_dim * (to_scores + to_value))


@counts("topk_scores")
def topk_scores(call: Any) -> int:
    batch, num_heads, num_queries, dim = call.query.shape
    return 2 * dim * batch * num_heads * num_queries * call.indices.shape[3] * call.block_size


@counts("_topk_scores_backward")
def topk_scores_backward(call: Any) -> int:
    dim = (call.key if call.output_mask[0] else call.query).shape[3]
    return 2 * dim * call.grad.numel() * sum(call.output_mask)


@counts("score_topk")
def score_topk(call: Any) -> int:
    batch, num_heads, num_queries, dim = call.query.shape
    return 2 * dim * batch * num_heads * visible(num_queries, call.key.shape[2], is_causal=call.is_causal)


@counts("pq_loss")
def pq_loss(call: Any) -> int:
    return 2 * call.input.numel() * call.codebooks.shape[1]


@counts("_pq_loss_backward")
def pq_loss_backward(call: Any) -> int:
    """The mean of codewords once more, the gradient to its weights, and that to codebooks."""
    return (2 + call.output_mask[1]) * pq_loss(call)


# ---- routed layers ------------------------------------------------------------------------------


@counts("grouped_linear")
def grouped_linear(call: Any) -> int:
    return 2 * call.order.numel() * prod(call.weight.shape[1:])


@counts("_grouped_linear_backward")
def grouped_linear_backward(call: Any) -> int:
    return sum(call.output_mask[:2]) * grouped_linear(call)


def of_entries(call: Any, *weights: Any) -> int:
    """Each entry of a router's index times weights [G, N, K], some of which may be None."""
    return sum(2 * call.index.numel() * prod(weight.shape[1:]) for weight in weights if weight is not None)


@counts("routed_ffn", "_routed_ffn_forward")
def routed_ffn(call: Any) -> int:
    return of_entries(call, call.w1, call.w_gate, call.w2, call.lora_a1, call.lora_b1, call.lora_a2, call.lora_b2)


@counts("_routed_ffn_backward")
def routed_ffn_backward(call: Any) -> int:
    to_input, to_gate, to_w1, to_w2, to_b1, _, to_w_gate, *to_factors = call.output_mask
    asked = zip(
        (call.w1, call.w2, call.w_gate, call.lora_a1, call.lora_b1, call.lora_a2, call.lora_b2),
        (to_w1, to_w2, to_w_gate, *to_factors),
        strict=True,
    )
    total = of_entries(call, *(weight for weight, is_asked in asked if is_asked))
    to_first = any((to_input, to_w1, to_b1, to_w_gate, *to_factors[:2]))
    if to_first or to_gate:  # the gradient to hidden units
        total += of_entries(call, call.w2, call.lora_a2, call.lora_b2)
    elif to_factors[2]:
        total += of_entries(call, call.lora_b2)
    if to_input or (to_gate and call.gate_at == "input"):
        total += of_entries(call, call.w1, call.w_gate, call.lora_a1, call.lora_b1)
    elif to_factors[0]:
        total += of_entries(call, call.lora_b1)
    # What was not kept: preactivations, and what goes into the outer factors.
    if call.preactivation is None:
        total += of_entries(call, call.w1, call.w_gate, call.lora_a1, call.lora_b1)
    elif to_factors[1]:
        total += of_entries(call, call.lora_a1)
    return total + (of_entries(call, call.lora_a2) if to_factors[3] else 0)


# ---- factored layers ----------------------------------------------------------------------------


def of_basis(call: Any) -> int:
    """Tokens times all basis vectors."""
    return 2 * rows(call.input) * prod(call.basis.shape)


def of_code(call: Any, num_rows: int, nnz: int) -> int:
    """Tokens times a sparse factor."""
    return 2 * rows(call.input) * num_rows * call.basis.shape[0] * nnz


@counts("stf_linear", "_stf_linear_with_atoms")
def stf_linear(call: Any) -> int:
    return of_basis(call) + of_code(call, call.values.shape[0], call.values.shape[2])


@counts("stf_linear_straight_through")
def stf_linear_straight_through(call: Any) -> int:
    return of_basis(call) + of_code(call, call.latent.shape[0], call.nnz)


@counts("stf_linear_packed")
def stf_linear_packed(call: Any) -> int:
    groups, _, numbers = call.packed_values.shape
    return of_basis(call) + of_code(call, call.rows, numbers // 16)


@counts("_stf_linear_backward")
def stf_linear_backward(call: Any) -> int:
    to_input, to_basis, to_values, _ = call.output_mask
    num_blocks, basis_size, width = call.basis_sizes
    tokens = rows(call.grad_output)
    side, nnz = call.input if call.transpose else call.grad_output, 0
    num_rows = 0 if side is None else side.shape[-1]
    if call.indices is not None:
        num_rows, _, nnz = call.indices.shape
    of_all = 2 * tokens * num_blocks * basis_size * width
    of_some = 2 * tokens * num_rows * num_blocks * nnz
    # The gradient to products with basis vectors comes first: on the output's side by the code, else by the basis.
    if call.transpose:
        total = of_all * (to_input or to_values) + of_some * to_input
    else:
        total = of_some * (to_input or to_basis) + of_all * to_input
    of_values = 2 * tokens * num_rows * num_blocks * basis_size if call.to_latent else of_some
    return total + of_all * to_basis + of_values * to_values


# ---- tokens -------------------------------------------------------------------------------------


@counts("bipartite_assignment", "bipartite_pairs")
def bipartite_matching(call: Any) -> int:
    """Tokens at even positions times those at odd ones, but for protected ones."""
    batch, num_tokens, features = call.metric.shape
    odd = num_tokens // 2 - call.num_protected // 2
    return 2 * batch * (num_tokens - call.num_protected - odd) * odd * features
