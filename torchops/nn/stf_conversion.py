"""Factors the linear layers of whole models."""

from typing import Any, Callable, Dict, Optional, Sequence

import torch
from torch import nn

from ._conversion import HOOKS, as_linear, progress, show
from .stf import STFLinear
from .stf_calibration import InputStatistics, input_statistics
from .stf_candidates import find_candidates
from .stf_report import FactorizationReport, FactorizedLayer

__all__ = ["factorize_"]


def factorize_(
    model: nn.Module,
    compression: float = 2.0,
    skip: Sequence[str] = (),
    num_iterations: int = 20,
    verbose: bool = True,
    calibration: Optional[Callable[[nn.Module], Any]] = None,
) -> FactorizationReport:
    """Replaces every ``nn.Linear`` inside a model by an :class:`STFLinear` made of its weight.

    All or nothing: layers are replaced when all of them have been factored, and an error leaves the model as it
    was. transformers' ``Conv1D`` (GPT-2's linear layer) is factored, too. A layer that stands in several places
    stays one layer. A new layer has the old one's device, dtype, mode, hooks and bias, which is the same parameter,
    and is frozen where the old weight was. Make optimizers afterwards: weights are other parameters now.

    Stay dense, and stand in the report as such: layers whose weight another module holds as well (a language model's
    head on its embedding), and subclasses of ``nn.Linear`` (what is inside ``nn.MultiheadAttention``, for one).

    Turn the new layers to training or inference with their methods, for example ``for layer in model.modules(): if
    isinstance(layer, STFLinear): layer.straight_through()``.

    Args:
        model: changed in place.
        compression: bytes of each dense weight for one of the packed factored one, masks included.
        skip: names of layers or of modules around them to leave, as ``model.named_modules()`` has them, with * and ?
            for anything: ``["classifier", "*.pooler"]``. A layer with several names is left if one is named.
        num_iterations: of :func:`torchops.stf_factorize`.
        verbose: show progress and print the report. Both are nicer with rich installed.
        calibration: a function that lets the model it is given compute typical inputs, for example
            ``lambda model: [model(batch) for batch in batches]``, a few thousand tokens or pixels in all. Layers are
            then factored so that the errors of their outputs there are small, not those of their weights
            (:meth:`STFLinear.from_linear`). It is called with the model in evaluation mode and without gradients.

    Returns:
        bytes and error of every layer.

    Raises:
        ValueError: a pattern of skip that no layer has, a layer that the calibration does not come across, no layer at
            all, or layers that cannot be factored, with the skip that leaves them: that cannot be made that small;
            whose weight is computed (spectral_norm, weight_norm, prune, parametrize of ``torch.nn.utils``), NaN, on
            the meta device, quantized or sharded; that peft adapts; whose forward was replaced; or that a plain list
            or attribute of a module holds, too, so that the dense layer would go on there. What stands outside
            of the model cannot be seen.

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 10))
    >>> report = torchops.nn.factorize_(model, compression=2.0, skip=["3"], verbose=False)
    >>> [type(layer).__name__ for layer in model]
    ['STFLinear', 'GELU', 'STFLinear', 'Linear']
    >>> total = report.total()
    >>> total.dense_bytes / total.packed_bytes > 2
    True
    """
    candidates = find_candidates(model, skip, compression)
    statistics: Dict[nn.Module, InputStatistics] = {}
    if calibration is not None:
        diagonal = {layer: _sparse_side(layer) == "input" for layer in candidates.layers}
        statistics = input_statistics(model, diagonal, calibration)
        missed = [names[0] for layer, names in candidates.layers.items() if statistics[layer].moments is None]
        if missed:
            raise ValueError(
                f"factorize_: expected calibration to run every layer to factor, got none of {', '.join(missed)}: let"
                f" it run them, or add skip={missed}"
            )
    factored: Dict[nn.Module, STFLinear] = {}
    rows = []
    for layer, names in progress(candidates.layers, "Factoring", verbose):
        # Statistics of large layers take much memory: each lets go of its own.
        moments = statistics.pop(layer, None)
        try:
            factored[layer] = _factor(layer, compression, moments, num_iterations)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise ValueError(
                f"factorize_: {names[0]} cannot be factored (to leave it dense, add skip={names[:1]}): {error}"
            ) from error
        rows.append(_compare(names[0], layer, factored[layer], moments))
    report = FactorizationReport(rows, candidates.left)
    for layer, names in candidates.layers.items():
        for name in names:
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent)._modules[attribute] = factored[layer]
    if verbose:
        show(report)
    return report


def _sparse_side(layer: nn.Module) -> str:
    linear = as_linear(layer)
    return "output" if linear.out_features >= linear.in_features else "input"


@torch.inference_mode(False)
def _factor(
    layer: nn.Module, compression: float, statistics: Optional[InputStatistics], num_iterations: int
) -> STFLinear:
    """A factored layer in the place of that one."""
    linear = as_linear(layer)
    device = linear.weight.device
    # A fresh layer draws its parameters, which is no business of the random generators of whoever converts a model.
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        moments = None if statistics is None else statistics.moments
        factored = STFLinear._from_gram(linear, compression, moments, _sparse_side(layer), num_iterations)
    for parameter in factored.parameters():
        parameter.requires_grad_(linear.weight.requires_grad)
    factored.bias = linear.bias
    factored.train(layer.training)
    for name in HOOKS:
        setattr(factored, name, getattr(layer, name))
    for name, value in vars(layer).items():
        if not hasattr(factored, name):
            setattr(factored, name, value)
    return factored


def _compare(name: str, layer: nn.Module, factored: STFLinear, inputs: Optional[InputStatistics]) -> FactorizedLayer:
    weight = as_linear(layer).weight.detach()
    dense = weight.double()
    difference = factored.dense_weight().double() - dense
    code_size = factored.rows * factored.num_blocks * factored.nnz
    norms = {}
    if inputs is not None:
        norms = {"output_norm": inputs.output_norm(dense), "output_error": inputs.output_norm(difference)}
    return FactorizedLayer(
        name,
        factored.sparse_side,
        factored.basis_size,
        factored.nnz,
        dense_bytes=weight.nbytes,
        indexed_bytes=factored.num_bytes("factored"),
        packed_bytes=factored.num_bytes("packed"),
        dense_numbers=weight.numel(),
        stored_numbers=factored.basis.numel() + code_size,
        norm=dense.norm().item(),
        error=difference.norm().item(),
        **norms,
    )
