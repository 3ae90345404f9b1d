"""Factors the linear layers of whole models."""

from itertools import repeat
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

import torch
from torch import nn

from ._conversion import HOOKS, as_linear, key, owners_of, put_
from ._replay import Replay
from ._report import progress, show
from .stf import STFLinear
from .stf_calibration import Fit
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
    sequential: bool = True,
    stored_dtype: Optional[torch.dtype] = None,
) -> FactorizationReport:
    """Replaces every ``nn.Linear`` inside a model by an :class:`STFLinear` made of its weight.

    Layers are replaced when all of them have been factored, and an error leaves the model unchanged. transformers'
    ``Conv1D`` (GPT-2's linear layer) is factored, too. A layer that is used in several places remains one layer. A new
    layer has the old one's device, dtype, mode and hooks, and is frozen if the old weight was. Its bias is the same
    parameter; with a calibration it is a new one that takes the mean error, unless other modules share it. Make
    optimizers afterwards, since the parameters are new.

    These stay dense and are listed in the report: layers whose weight another module shares (a language model's head
    and its embedding), and subclasses of ``nn.Linear`` (the one in ``nn.MultiheadAttention``, for example).

    Prepare the new layers for training or inference with their methods, for example ``for layer in model.modules(): if
    isinstance(layer, STFLinear): layer.straight_through()``.

    Args:
        model: changed in place.
        compression: bytes of each dense weight for one of the packed factored one, masks included.
        skip: names of layers or of modules around them to leave, as ``model.named_modules()`` has them, with * and ?
            for anything: ``["classifier", "*.pooler"]``. A layer with several names is left if one is named.
        num_iterations: of :func:`torchops.stf_factorize`.
        verbose: show progress and print the report. Both are nicer with rich installed.
        calibration: a function that runs the model on typical inputs, for example
            ``lambda model: [model(batch) for batch in batches]``: several tokens for each feature of the widest
            layer, or more. Layers are then factored so that the errors of their outputs there are small, not those of
            their weights. It is called with the model in evaluation mode and without gradients, and more than once
            where blocks cannot be run by themselves, those with a cache of keys among them: it must compute the same
            each time. Padding does not count inside of :func:`ignored_padding`.
        sequential: with a calibration, layers are factored in the order of the forward, and each is fitted to the
            outputs of the dense model for the inputs that it gets from the layers factored before it, so it corrects
            part of their errors. False fits each to its inputs in the dense model.
        stored_dtype: for which bytes are counted, None for that of the weights: bfloat16 for a model that is trained
            in float32 and saved in bfloat16, for example.

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
    candidates = find_candidates(model, skip, compression, stored_dtype)
    replay = None
    if calibration is not None:
        run = calibration
        replay = Replay(model, candidates.layers, lambda: run(model), sequential)
        missed = [names[0] for layer, names in candidates.layers.items() if layer not in replay.plan.calls]
        if missed:
            raise ValueError(
                f"factorize_: expected calibration to run every layer to factor, got none of {', '.join(missed)}: let"
                f" it run them, or add skip={missed}"
            )
    in_order = candidates.layers
    fits: Iterator[Optional[Fit]] = repeat(None)
    if replay is not None:
        in_order = {layer: candidates.layers[layer] for stage in replay.plan.stages for layer in stage.layers}
        fits = _fits(replay, owners_of(model))
    factored: Dict[nn.Module, STFLinear] = {}
    rows: Dict[nn.Module, FactorizedLayer] = {}
    for (layer, names), fit in zip(progress(in_order, "Factoring", verbose), fits, strict=False):
        try:
            factored[layer] = _factor(layer, compression, fit, num_iterations, stored_dtype)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise ValueError(
                f"factorize_: {names[0]} cannot be factored (to leave it dense, add skip={names[:1]}): {error}"
            ) from error
        rows[layer] = _compare(names[0], layer, factored[layer], fit, stored_dtype)
        if replay is not None:
            replay.use(layer, factored[layer])
    report = FactorizationReport([rows[layer] for layer in candidates.layers], candidates.left)
    for layer, names in candidates.layers.items():
        for name in names:
            put_(model, name, factored[layer])
    if verbose:
        show(report)
    return report


def _fits(replay: Replay, owners: Dict[int, Dict[nn.Module, str]]) -> Iterator[Optional[Fit]]:
    """What each layer is fitted to, in the order of the forward, behind the layers that replay uses by then."""
    for stage in replay.plan.stages:
        moments = replay.moments(stage)
        for layer in stage.layers:
            bias = layer._parameters["bias"]
            yield moments.fit(layer, bias is not None and len(owners[key(bias)]) == 1)


@torch.inference_mode(False)
def _factor(
    layer: nn.Module,
    compression: float,
    fit: Optional[Fit],
    num_iterations: int,
    stored_dtype: Optional[torch.dtype],
) -> STFLinear:
    """A factored layer in the place of that one."""
    linear = as_linear(layer)
    device = linear.weight.device
    # A fresh layer draws its parameters, which is no business of the random generators of whoever converts a model.
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        factored = STFLinear._fitted(linear, compression, fit, None, num_iterations, stored_dtype)
    if fit is None or fit.input_mean is None:
        factored.bias = linear.bias
    factored.train(layer.training)
    for name in HOOKS:
        setattr(factored, name, getattr(layer, name))
    for name, value in vars(layer).items():
        if not hasattr(factored, name):
            setattr(factored, name, value)
    return factored


def _compare(
    name: str, layer: nn.Module, factored: STFLinear, fit: Optional[Fit], stored_dtype: Optional[torch.dtype]
) -> FactorizedLayer:
    weight = as_linear(layer).weight.detach()
    dense = weight.double()
    found = factored.dense_weight().double()
    code_size = factored.rows * factored.num_blocks * factored.nnz
    norms = {}
    if fit is not None:
        norms = {"output_norm": fit.norm(dense), "output_error": fit.error(dense, found)}
    return FactorizedLayer(
        name,
        factored.sparse_side,
        factored.basis_size,
        factored.nnz,
        dense_bytes=weight.numel() * (stored_dtype or weight.dtype).itemsize,
        indexed_bytes=factored.num_bytes("factored", stored_dtype),
        packed_bytes=factored.num_bytes("packed", stored_dtype),
        dense_numbers=weight.numel(),
        stored_numbers=factored.basis.numel() + code_size,
        norm=dense.norm().item(),
        error=(found - dense).norm().item(),
        **norms,
    )
