"""Factors the linear layers of whole models."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Dict, Iterator, List, Sequence, Tuple

from torch import nn

from .stf import STFLinear, choose_sizes

__all__ = ["FactorizedLayer", "FactorizationReport", "factorize_"]


@dataclass(frozen=True)
class FactorizedLayer:
    """What became of a linear layer, without its bias: names, bytes and error.

    ``indexed_bytes`` are those of the form that trains, with 8 or 16 bits for the position of a nonzero;
    ``packed_bytes`` those of the form that infers, with a bit for every possible position. ``norm`` is that of the
    dense weight and ``error`` that of its difference to the factored one (Frobenius).
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
    )

    layers: Sequence[FactorizedLayer]

    def total(self) -> FactorizedLayer:
        """All layers as if they were one."""
        sums = {
            name: sum(getattr(layer, name) for layer in self.layers)
            for name in ("dense_bytes", "indexed_bytes", "packed_bytes", "dense_numbers", "stored_numbers")
        }
        norm = math.hypot(*(layer.norm for layer in self.layers))
        error = math.hypot(*(layer.error for layer in self.layers))
        return FactorizedLayer(f"{len(self.layers)} layers", "", 0, 0, **sums, norm=norm, error=error)

    def rows(self) -> List[List[str]]:
        """The table's cells, sizes in kilobytes. ``smaller`` is what the packed bytes are to the dense ones, and
        ``values only`` what it would be if positions were free. The last row is the total."""
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

    Returns:
        bytes and error of every layer.

    Raises:
        ValueError: a pattern of skip that no layer has, a layer that cannot be made that small, a weight that
            belongs to another module as well, or no layer at all.

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
    factored = {
        linear: STFLinear.from_linear(linear, compression, num_iterations=num_iterations)
        for linear in _progress(names, verbose)
    }
    report = FactorizationReport([_compare(name, linear, factored[linear]) for linear, name in names.items()])
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


def _compare(name: str, linear: nn.Linear, factored: STFLinear) -> FactorizedLayer:
    dense = linear.weight.detach().double()
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
        error=(factored.dense_weight().double() - dense).norm().item(),
    )


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
