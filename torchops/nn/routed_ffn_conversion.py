"""Routes the feed-forward layers of whole models."""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ._calibration import current_padding, evenly_spaced, first_argument, observed, tokens_of
from ._conversion import Candidates, refusal
from ._report import progress, show
from .routed_ffn import RoutedFFN
from .routed_ffn_calibration import MOST_ROWS, PATTERN_ROWS
from .routed_ffn_candidates import find_feed_forwards
from .routed_ffn_checks import difference, orient
from .routed_ffn_report import RoutedLayer, RoutingReport
from .routed_ffn_structure import FeedForward, place_

__all__ = ["route_ffn_"]


@torch.inference_mode(False)
def route_ffn_(
    model: nn.Module,
    num_blocks: int = 4,
    top_k: int = 2,
    skip: Sequence[str] = (),
    calibration: Optional[Callable[[nn.Module], Any]] = None,
    lora_rank: int = 0,
    verbose: bool = True,
    *,
    gate_at: str = "output",
    lora_scale: float = 1.0,
    recompute: bool = False,
) -> RoutingReport:
    """Replaces the feed-forward layers of a model by :class:`RoutedFFN` layers made of them (SPT).

    A feed-forward layer is two linear layers, to the hidden units and back, with one activation between them: in an
    ``nn.Sequential``, in one module (GPT-2's with ``Conv1D``, timm's), in two consecutive modules (BERT's), or in a
    block with attention (BART's, OPT's, ALBERT's, ``nn.TransformerEncoderLayer``); or three linear layers with a gate
    (Llama's). The activation is identified by its values. Each routed layer, with all of its blocks, is verified to
    give on random tokens what the model gave before.

    An error leaves the model unchanged. The routed layer replaces the first linear layer, and identities replace the
    activation and the second one. The module around them keeps its hooks, dropout and residual connections, and
    dropout of hidden units becomes dropout of outputs. A layer with a gate is replaced as a whole, and its hooks are
    kept. Make optimizers afterwards, and add :func:`balance_loss` to the loss.

    A converted model is loaded into one that was converted with the same num_blocks and lora_rank.

    These stay dense and are listed in the report: layers whose weight another module holds as well, subclasses of
    ``nn.Linear`` and others' linear layers (quantized ones), layers with fewer hidden units than features, modules that
    hold something else where a gated layer or one of two modules (BERT's) would be replaced, and blocks that do not
    compute with tokens alone (LED's encoder, whose attention needs its mask).

    Args:
        model: changed in place.
        num_blocks: G, the number of blocks of each layer's hidden units.
        top_k: how many of them compute a token.
        skip: names of layers or of modules around them to leave, as ``model.named_modules()`` has them, with * and ?
            for anything. A layer with several names is left if one is named.
        calibration: a function that runs the model on typical inputs, for example
            ``lambda model: [model(batch) for batch in batches]``, some thousand tokens in all, to which blocks and
            routers are fitted (:meth:`RoutedFFN.from_mlp`). It is called with the model in evaluation mode and without
            gradients. Padding does not count inside of :func:`ignored_padding`.
        lora_rank: r, to freeze the layers and train LoRA factors beside them; 0 for none.
        verbose: show progress and print the report. Both are nicer with rich installed.
        gate_at, lora_scale, recompute: of :func:`torchops.routed_ffn`.

    Returns:
        sizes of every layer, and the errors of their outputs in the calibration.

    Raises:
        ValueError: a pattern of skip that no layer has, a top_k that cannot be, a layer that the calibration does not
            come across, no layer at all, or layers that cannot be routed, with the skip that leaves them: whose hidden
            units num_blocks does not divide; whose weight is computed (``torch.nn.utils``), NaN, on the meta device,
            quantized or sharded; that peft adapts; that have hooks, or a forward that was replaced; that a plain list
            or attribute of a module holds, too; that compute something else than it seems; or that torch copies wrong,
            an ``nn.TransformerDecoderLayer`` whose activation is a module.

    Source: SPT (Gui et al., 2023).

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 10))
    >>> inputs = torch.randn(1000, 64)
    >>> report = torchops.nn.route_ffn_(model, calibration=lambda model: model(inputs), verbose=False)
    >>> [type(layer).__name__ for layer in model]
    ['RoutedFFN', 'Identity', 'Identity', 'Linear']
    >>> report.total().computed / report.total().weights
    0.5
    """
    if not 1 <= top_k <= num_blocks:
        raise ValueError(f"route_ffn_: expected top_k in 1..num_blocks = {num_blocks}, got {top_k}")
    with observed(model):
        candidates = find_feed_forwards(model, skip, num_blocks)
    inputs: Dict[FeedForward, Tensor] = {}
    if calibration is not None:
        inputs = inputs_of(model, candidates, calibration)
    made: Dict[FeedForward, RoutedFFN] = {}
    rows, problems = [], {}
    with observed(model):
        for layer, names in progress(candidates.layers, "Routing", verbose):
            # Inputs of many layers take much memory: each lets go of its own.
            seen, weight = inputs.pop(layer, None), layer.dense().first.weight
            with torch.autocast(weight.device.type, enabled=False):
                orient(layer)
                try:
                    made[layer] = RoutedFFN.from_mlp(
                        layer.first,
                        layer.second,
                        num_blocks,
                        top_k,
                        layer.gate,
                        layer.activation.name,
                        seen,
                        lora_rank,
                        alpha=layer.activation.alpha,
                        gate_at=gate_at,
                        lora_scale=lora_scale,
                        recompute=recompute,
                    )
                except ValueError as error:
                    problems[names[0]] = str(error)
                    continue
                problem = difference(layer, made[layer])
                if problem:
                    problems[names[0]] = problem
                rows.append(described(names[0], layer, made[layer], seen))
    if problems:
        kept = [name for names in candidates.layers.values() for name in names]
        raise refusal("route_ffn_", "routed", problems, kept)
    for layer, routed in made.items():
        place_(layer, routed)
    report = RoutingReport(rows, candidates.left)
    if verbose:
        show(report)
    return report


def inputs_of(
    model: nn.Module, candidates: Candidates[FeedForward], calibration: Callable[[nn.Module], Any]
) -> Dict[FeedForward, Tensor]:
    """[rows, d] of every layer, while the calibration lets the model compute."""
    firsts = {layer.first: layer for layer in candidates.layers}
    seen: Dict[FeedForward, List[Tensor]] = {layer: [] for layer in candidates.layers}

    def look(module: nn.Module, arguments: Tuple[Tensor, ...], named: Dict[str, Tensor]) -> None:
        tokens = tokens_of(first_argument(arguments, named).detach(), current_padding())
        seen[firsts[module]].append(evenly_spaced(tokens, MOST_ROWS))

    with observed(model, firsts, look):
        calibration(model)
    missed = [names[0] for layer, names in candidates.layers.items() if not seen[layer]]
    if missed:
        raise ValueError(
            f"route_ffn_: expected calibration to run every layer to route, got none of {', '.join(missed)}: let"
            f" it run them, or add skip={missed}"
        )
    return {layer: torch.cat(rows) for layer, rows in seen.items()}


def described(name: str, layer: FeedForward, routed: RoutedFFN, seen: Optional[Tensor]) -> RoutedLayer:
    router: Any = routed.router
    activation = layer.activation.name + (" gated" if layer.gate is not None else "")
    weights = sum(part.get_parameter("weight").numel() for part in layer.parts().values())
    trained = sum(parameter.numel() for parameter in routed.parameters() if parameter.requires_grad)
    computed = weights * router.top_k // router.num_blocks
    sizes = (*layer.sizes(), router.num_blocks, router.top_k, weights, computed, trained)
    if seen is None:
        return RoutedLayer(name, activation, *sizes)
    rows = evenly_spaced(seen, PATTERN_ROWS)
    dense = layer.dense().output(rows.to(torch.promote_types(rows.dtype, torch.float32)))
    error = routed(rows.to(routed.w1.dtype)).to(dense) - dense
    busiest = router(rows)[0].flatten().bincount().max().item() / len(rows)
    return RoutedLayer(name, activation, *sizes, dense.norm().item(), error.norm().item(), busiest)
