"""Factors the linear layers of whole models."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .stf import STFLinear, choose_sizes, gram_matrix

__all__ = ["FactorizedLayer", "FactorizationReport", "factorize_"]


@dataclass(frozen=True)
class FactorizedLayer:
    """What became of a linear layer, without its bias: names, bytes and error.

    ``indexed_bytes`` are those of the form that trains, with 8 or 16 bits for the position of a nonzero;
    ``packed_bytes`` those of the form that infers, with a bit for every possible position. ``norm`` is that of the
    dense weight and ``error`` that of its difference to the factored one (Frobenius); ``output_norm`` and
    ``output_error`` are the same of what the layer computed in the calibration, NaN without one.
    """

    name: str
    sparse_side: str
    basis_size: int
    nnz: int
    dense_bytes: int
    indexed_bytes: int
    packed_bytes: int
    dense_numbers: int
    stored_numbers: int
    norm: float
    error: float
    output_norm: float = math.nan
    output_error: float = math.nan


@dataclass(frozen=True)
class FactorizationReport:
    """What :func:`factorize_` did: a row for every layer, and one for all of them. Print it for a table."""

    COLUMNS: ClassVar[Tuple[str, ...]] = (
        "layer",
        "sparse",
        "K",
        "nnz",
        "dense kB",
        "with indices",
        "packed",
        "smaller",
        "values only",
        "error",
        "of outputs",
    )

    layers: Sequence[FactorizedLayer]

    def total(self) -> FactorizedLayer:
        """All layers as if they were one."""
        sums = [
            sum(getattr(layer, name) for layer in self.layers)
            for name in ("dense_bytes", "indexed_bytes", "packed_bytes", "dense_numbers", "stored_numbers")
        ]
        norms = [
            math.hypot(*(getattr(layer, name) for layer in self.layers))
            for name in ("norm", "error", "output_norm", "output_error")
        ]
        return FactorizedLayer(f"{len(self.layers)} layers", "", 0, 0, *sums, *norms)

    def rows(self) -> List[List[str]]:
        """The table's cells, sizes in kilobytes. ``smaller`` is what the packed bytes are to the dense ones, and
        ``values only`` what it would be if positions were free; ``error`` is relative to the norm of the weight,
        ``of outputs`` to that of what the layer computed in the calibration. The last row is the total."""
        return [
            [
                layer.name,
                layer.sparse_side,
                f"{layer.basis_size or ''}",
                f"{layer.nnz or ''}",
                f"{layer.dense_bytes / 1000:,.1f}",
                f"{layer.indexed_bytes / 1000:,.1f}",
                f"{layer.packed_bytes / 1000:,.1f}",
                f"{layer.dense_bytes / layer.packed_bytes:.2f} x",
                f"{layer.dense_numbers / layer.stored_numbers:.2f} x",
                f"{layer.error / layer.norm if layer.norm else 0.0:.3f}",
                "" if math.isnan(layer.output_norm) else f"{layer.output_error / (layer.output_norm or 1.0):.3f}",
            ]
            for layer in (*self.layers, self.total())
        ]

    def __str__(self) -> str:
        rows = [list(self.COLUMNS), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.COLUMNS))]
        lines = []
        for row in rows:
            text = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(text + numbers))
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD)
        for index, column in enumerate(self.COLUMNS):
            table.add_column(column, justify="left" if index < 2 else "right")
        *rows, total = self.rows()
        for row in rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(*total, style="bold")
        return table


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
    was. Subclasses of ``nn.Linear`` stay (what is inside ``nn.MultiheadAttention``, for one). A layer that stands
    in several places stays one layer. Turn the new layers to training or inference with their methods, for
    example ``for layer in model.modules(): if isinstance(layer, STFLinear): layer.straight_through()``.

    Args:
        model: changed in place.
        compression: bytes of each dense weight for one of the packed factored one, masks included.
        skip: names of layers to leave, as ``model.named_modules()`` has them, with * and ? for anything:
            ``["classifier", "*.pooler.*"]``.
        num_iterations: of :func:`torchops.stf_factorize`.
        verbose: show progress and print the report. Both are nicer with rich installed.
        calibration: a function that lets the model it is given compute typical inputs, for example
            ``lambda model: [model(batch) for batch in batches]``, a few thousand tokens or pixels in all. Layers are
            then factored so that the errors of their outputs there are small, not those of their weights
            (:meth:`STFLinear.from_linear`). It is called with the model in evaluation mode and without gradients.

    Returns:
        bytes and error of every layer.

    Raises:
        ValueError: a pattern of skip that no layer has, a layer that cannot be made that small, a weight that
            belongs to another module as well, a layer that the calibration does not come across, or no layer at all.

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 10))
    >>> report = torchops.nn.factorize_(model, compression=2.0, skip=["3"], verbose=False)
    >>> [type(layer).__name__ for layer in model]
    ['STFLinear', 'GELU', 'STFLinear', 'Linear']
    >>> total = report.total()
    >>> total.dense_bytes / total.packed_bytes > 2
    True
    """
    places = _linear_layers(model, skip)
    names: Dict[nn.Linear, str] = {}
    for name, linear in places:
        names.setdefault(linear, name)
    _check(model, names, compression)
    grams = {} if calibration is None else _grams(model, names, calibration)
    factored = {
        linear: STFLinear._from_gram(linear, compression, grams.get(linear), None, num_iterations)
        for linear in _progress(names, verbose)
    }
    report = FactorizationReport(
        [_compare(name, linear, factored[linear], grams.get(linear)) for linear, name in names.items()]
    )
    for name, linear in places:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, factored[linear])
    if verbose:
        _print(report)
    return report


def _linear_layers(model: nn.Module, skip: Sequence[str]) -> List[Tuple[str, nn.Linear]]:
    """Every place where a layer to factor stands, and the layer."""
    places = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and name
    ]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name, _ in places):
            raise ValueError(f"factorize_: expected skip to name linear layers of the model, got {pattern!r}")
    left = [(name, linear) for name, linear in places if not any(fnmatchcase(name, pattern) for pattern in skip)]
    if not left:
        raise ValueError(
            f"factorize_: expected a model with layers of class nn.Linear in it, got {type(model).__name__} with none"
            + (" that skip leaves" if places else "")
        )
    return left


def _check(model: nn.Module, names: Dict[nn.Linear, str], compression: float) -> None:
    """Whether all layers can be factored, before the first is."""
    problems = []
    for linear, name in names.items():
        weight = linear.weight
        owners = [
            other
            for other, module in model.named_modules()
            if module is not linear and any(parameter is weight for parameter in module.parameters(recurse=False))
        ]
        if owners:
            problems.append(f"{name}: its weight is that of {', '.join(owners)}, too")
            continue
        try:
            choose_sizes(max(weight.shape), min(weight.shape), weight.element_size(), compression)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(
            "factorize_: expected layers that can be factored, got some that skip should name:\n  "
            + "\n  ".join(problems)
        )


def _grams(
    model: nn.Module, names: Dict[nn.Linear, str], calibration: Callable[[nn.Module], Any]
) -> Dict[nn.Module, Tensor]:
    """X^T X of the inputs that each layer gets."""
    grams: Dict[nn.Module, Tensor] = {}

    def add(linear: nn.Module, inputs: Tuple[Tensor, ...], named: Dict[str, Tensor]) -> None:
        gram = gram_matrix(inputs[0] if inputs else named["input"])
        grams[linear] = grams[linear] + gram if linear in grams else gram

    were_training = [module for module in model.modules() if module.training]
    hooks = [linear.register_forward_pre_hook(add, with_kwargs=True) for linear in names]
    try:
        model.eval()
        with torch.no_grad():
            calibration(model)
    finally:
        for hook in hooks:
            hook.remove()
        for module in were_training:
            module.training = True
    missed = [name for linear, name in names.items() if linear not in grams]
    if missed:
        raise ValueError(
            f"factorize_: expected calibration to run every layer to factor, got none of {', '.join(missed)}: let it"
            " run them, or name them in skip"
        )
    return grams


def _compare(name: str, linear: nn.Linear, factored: STFLinear, gram: Optional[Tensor]) -> FactorizedLayer:
    dense = linear.weight.detach().double()
    difference = factored.dense_weight().double() - dense
    code_size = factored.rows * factored.num_blocks * factored.nnz
    return FactorizedLayer(
        name,
        factored.sparse_side,
        factored.basis_size,
        factored.nnz,
        dense_bytes=linear.weight.nbytes,
        indexed_bytes=factored.num_bytes("factored"),
        packed_bytes=factored.num_bytes("packed"),
        dense_numbers=linear.weight.numel(),
        stored_numbers=factored.basis.numel() + code_size,
        norm=dense.norm().item(),
        error=difference.norm().item(),
        **({} if gram is None else {"output_norm": _norm(dense, gram), "output_error": _norm(difference, gram)}),
    )


def _norm(weight: Tensor, gram: Tensor) -> float:
    """That of X weight^T, with gram = X^T X."""
    return math.sqrt(max((weight @ gram * weight).sum().item(), 0.0))


def _progress(layers: Dict[nn.Linear, str], verbose: bool) -> Iterator[nn.Linear]:
    if not verbose:
        yield from layers
        return
    try:
        from rich.progress import track
    except ModuleNotFoundError:
        for count, linear in enumerate(layers, start=1):
            print(f"Factoring layer {count} of {len(layers)}: {layers[linear]}")
            yield linear
    else:
        yield from track(layers, description="Factoring layers")


def _print(report: FactorizationReport) -> None:
    try:
        import rich
    except ModuleNotFoundError:
        print(report)
    else:
        rich.print(report)
