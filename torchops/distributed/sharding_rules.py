"""Along which dimensions the processes of a DTensor's mesh can divide each operator: the table of rules.

A rule names the dimensions of an operator's tensors, by the names that these have in its schema: a letter for one that
can be divided, a dot for one that cannot, and ``*`` for any number of leading ones. A gradient has the dimensions of
what it is a gradient to. :mod:`torchops.distributed.sharding` makes placements of the table.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Tuple, Union

__all__: List[str] = []

Arguments = Mapping[str, Any]


def always(arguments: Arguments) -> bool:
    return True


@dataclass(frozen=True)
class Dimension:
    """One that processes can divide among them: tensors that have it are sharded, others are whole on every process.

    An output without it is a sum over it, of which each process has its part.
    """

    name: str
    letters: str
    # Inputs that a sum over this dimension does not run over: each process takes its part of them.
    outside: Tuple[str, ...] = ()
    # Outputs without it that are no sum over it.
    whole: Tuple[str, ...] = ()
    # How the parts of an output come together.
    reduction: str = "sum"
    # Whether processes must have equally many.
    even: bool = False
    # Whether a tensor that has one where others have many is used by all processes: key heads.
    broadcasts: bool = False
    when: Callable[[Arguments], bool] = always


@dataclass(frozen=True)
class Rule:
    tensors: Mapping[str, str]
    dimensions: Tuple[Dimension, ...]
    # What goes from a forward to its backward and means something only to the process that computed it: it must be
    # divided by the backward as it was by the forward. Of leading dimensions the first can be.
    kept: Mapping[str, str] = field(default_factory=dict)


# ---- attention --------------------------------------------------------------------------------

# H are heads of queries, K those of keys, which groups of H share, X and P those of lists and of their biases.
ATTENTION = {
    "query": "BH..",
    "key": "BK..",
    "value": "BK..",
    "query_codes": "BH..",
    "key_codes": "BK..",
    "indices": "BX..",
    "pair_bias": "BP..",
    "key_bias": "B.",
    "sink": "H",
    "query_start": "B",
    "key_start": "B",
    "output": "BH..",
    "logsumexp": "BH.",
    "normalizer": "BH..",
}
BATCH = Dimension("batch", "B")
HEADS = Dimension("heads", "HKXP", even=True, broadcasts=True)


def no_indexer(arguments: Arguments) -> bool:
    """An indexer adds up the scores of all heads."""
    return arguments["weights"] is None


def groups_stay_whole(arguments: Arguments) -> bool:
    """The backward takes the heads of a group as a number: one group of all heads would have fewer on each process."""
    if "grad" in arguments:
        return arguments["group_size"] < arguments["grad"].shape[1]
    return arguments["key"].shape[1] > 1


ATTENDS = Rule(ATTENTION, (BATCH, HEADS))
SCORES = Rule(
    {**ATTENTION, "grad": "BH..", "output": "BH.."}, (BATCH, dataclasses.replace(HEADS, when=groups_stay_whole))
)
CHOOSES = Rule(
    {**ATTENTION, "weights": "B.."}, (BATCH, Dimension("heads", "HK", even=True, broadcasts=True, when=no_indexer))
)


# ---- product quantization ---------------------------------------------------------------------

QUANTIZED = {"input": "*.", "codebooks": "...", "output": "*."}


def grad_is_whole(arguments: Arguments) -> bool:
    return all(placement.is_replicate() for placement in arguments["grad"].placements)


ENCODES = Rule(QUANTIZED, (Dimension("rows", "*"),))
# A mean over all rows is the mean of those of equally many, each of which takes its share of the gradient.
LOSS = Rule({**QUANTIZED, "output": ""}, (Dimension("rows", "*", reduction="avg", even=True),))
LOSS_BACKWARD = Rule(
    {**QUANTIZED, "grad": ""}, (Dimension("rows", "*", outside=("grad",), even=True, when=grad_is_whole),)
)


# ---- factored linear layers -------------------------------------------------------------------

# R are rows of the sparse factor, which are the features of the input (I) or of the output (O); S blocks of columns.
FACTORED = {
    "input": "*I",
    "basis": "...",
    "values": "R..",
    "indices": "R..",
    "bias": "O",
    "output": "*O",
}
TOKENS = Dimension("tokens", "*T")


def sparse_on_input(arguments: Arguments) -> bool:
    return arguments["transpose"]


def sparse_on_output(arguments: Arguments) -> bool:
    return not arguments["transpose"]


FACTORED_LINEAR = Rule(
    FACTORED,
    (
        TOKENS,
        Dimension("output features (sparse factor on the output)", "OR", whole=("atoms",), when=sparse_on_output),
        Dimension("input features (sparse factor on the input)", "IR", outside=("bias",), when=sparse_on_input),
    ),
    kept={"atoms": ".T."},
)
STRAIGHT_THROUGH = Rule({**FACTORED, "latent": "R.."}, FACTORED_LINEAR.dimensions)
# Rows lie in groups of 16, and their number is an argument.
PACKED = Rule({**FACTORED, "packed_values": "...", "mask": "..."}, (TOKENS,))
ROWS, BLOCKS = Dimension("rows", "R"), Dimension("blocks", "S")
SELECTS = Rule({"latent": "RS.", "values": "RS.", "indices": "RS.", "output": "RS."}, (ROWS, BLOCKS))
PACKS = Rule({"values": ".S.", "indices": ".S.", "packed_values": ".S.", "mask": ".S."}, (BLOCKS,))
# C are the columns of all blocks.
PROJECTS = Rule(
    {
        "weight": ".C",
        "basis": "S..",
        "projected": ".C",
        "refined_basis": "S..",
        "values": ".S.",
        "indices": ".S.",
    },
    (Dimension("blocks", "CS"),),
)


# ---- routed feed-forward layers ---------------------------------------------------------------

# N are hidden units, M rows of the first layer: as many, or two for each unit.
ROUTED = {
    "input": "*.",
    "index": "*.",
    "gate": "*.",
    "w1": ".M.",
    "w2": "..N",
    "b1": ".M",
    "w_gate": ".N.",
    "lora_a1": "...",
    "lora_b1": ".M.",
    "lora_a2": "..N",
    "lora_b2": "...",
    "output": "*.",
}


def units_are_neighbours(arguments: Arguments) -> bool:
    """Whether the rows of a unit stand together: not where those of all gates come first."""
    if arguments["glu"] == "split":
        return arguments["b1"] is None and arguments["lora_b1"] is None
    return arguments["glu"] != "concat"


ROUTED_FFN = Rule(
    ROUTED,
    (TOKENS, Dimension("hidden units", "MN", outside=("b2",), when=units_are_neighbours)),
    kept={"preactivation": "TM"},
)
GROUPED_LINEAR = Rule(
    {"input": ".K", "weight": ".NK", "order": ".", "offsets": ".", "bias": ".N", "output": ".N"},
    (Dimension("output features", "N"), Dimension("input features", "K", outside=("bias",))),
)


# ---- tokens -----------------------------------------------------------------------------------

TOKEN_ROWS = Rule(
    {
        "input": "B..",
        "metric": "B..",
        "scores": "B.",
        "assign": "B.",
        "padding_mask": "B.",
        "weight": "B.",
        "residual": "B..",
        "merged": "B..",
        "total": "B.",
        "sources": "B.",
        "destinations": "B.",
    },
    (BATCH,),
)
ASSIGNS = Rule({**TOKEN_ROWS.tensors, "output": "B."}, (BATCH,))
UNMERGES = Rule({**TOKEN_ROWS.tensors, "grad": "B..", "output": "B.."}, (BATCH,))


# Every operator, or why it cannot be divided: it takes tensors that every process has as a whole.
RULES: Dict[str, Union[Rule, str]] = {
    "span_attention": ATTENDS,
    "span_attention_lse": ATTENDS,
    "_span_attention_forward": ATTENDS,
    "_span_attention_backward": ATTENDS,
    "topk_attention": ATTENDS,
    "topk_attention_lse": ATTENDS,
    "_topk_attention_forward": ATTENDS,
    "_topk_attention_backward": ATTENDS,
    "pq_attention": ATTENDS,
    "pq_attention_lse": ATTENDS,
    "_pq_attention_forward": ATTENDS,
    "_pq_attention_backward": ATTENDS,
    "topk_scores": SCORES,
    "_topk_scores_backward": SCORES,
    "score_topk": CHOOSES,
    "pq_topk": ATTENDS,
    "pq_encode": ENCODES,
    "pq_loss": LOSS,
    "_pq_loss_backward": LOSS_BACKWARD,
    "stf_linear": FACTORED_LINEAR,
    "_stf_linear_with_atoms": FACTORED_LINEAR,
    "_stf_linear_backward": FACTORED_LINEAR,
    "stf_linear_straight_through": STRAIGHT_THROUGH,
    "stf_linear_packed": PACKED,
    "stf_select": SELECTS,
    "_stf_select_backward": SELECTS,
    "stf_pack": PACKS,
    "stf_project": PROJECTS,
    "_stf_project_to_factors": PROJECTS,
    "stf_factorize": "the basis is made of all rows",
    "routed_ffn": ROUTED_FFN,
    "_routed_ffn_forward": ROUTED_FFN,
    "_routed_ffn_backward": ROUTED_FFN,
    "route": "the choices of all tokens are sorted together",
    "grouped_linear": GROUPED_LINEAR,
    "_grouped_linear_backward": GROUPED_LINEAR,
    "bipartite_assignment": ASSIGNS,
    "bipartite_pairs": ASSIGNS,
    "topk_assignment": ASSIGNS,
    "merge_tokens": TOKEN_ROWS,
    "_merge_tokens_backward": TOKEN_ROWS,
    "unmerge_tokens": UNMERGES,
    "_unmerge_tokens_backward": UNMERGES,
}
