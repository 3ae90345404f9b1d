"""Builds the factored layers of a state dict."""

from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from .stf import STFLinear
from .stf_sizes import FORMS, ROWS_PER_GROUP, Sizes

__all__ = ["restore_factored_"]


class FactoredLayer(NamedTuple):
    """What it takes to build a factored layer."""

    sizes: Sizes
    form: str
    bias: bool

    @classmethod
    def of(cls, layer: STFLinear) -> "FactoredLayer":
        return cls(layer.sizes(), layer.form(), layer.bias is not None)

    def build(self, replaced: nn.Module) -> STFLinear:
        """With what the layer it replaces has of device, dtype, mode and frozen parameters, and uninitialised."""
        weight = replaced.weight
        assert isinstance(weight, Tensor)
        layer = STFLinear(
            **self.sizes._asdict(), bias=self.bias, device=torch.device("meta"), dtype=weight.dtype
        ).requires_grad_(weight.requires_grad)
        if self.form != layer.form():
            layer._hold(**layer._empty(self.form))
        return layer.to_empty(device=weight.device).train(replaced.training)


def restore_factored_(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True, load: bool = True
) -> nn.Module:
    """Replaces the layers of a model that a state dict holds factored by :class:`STFLinear`, and loads it.

    It loads what :func:`factorize_` made: build the model with dense layers, as before the conversion, and pass the
    state dict of the factored one, in any form of its layers. Sizes follow from the tensors. An error leaves the
    model's layers unchanged.

    Args:
        model: changed in place. On the meta device the tensors of the state dict become its own.
        state_dict: of a model that is the same but for its factored layers.
        strict: of ``load_state_dict``.
        load: False to build the layers only, uninitialised, for something else to fill: accelerate's
            ``load_checkpoint_and_dispatch``, for example.

    Returns:
        model.

    Raises:
        ValueError: the state dict has no factored layers, one where the model has no such layer, or one of an
            older version that does not say enough (straight-through).
        RuntimeError: as of ``load_state_dict``.

    >>> def build():
    ...     return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    >>> model = build()
    >>> report = torchops.nn.factorize_(model, compression=2.0, skip=["2"], verbose=False)
    >>> _ = model[0].pack()
    >>> again = torchops.nn.restore_factored_(build(), model.state_dict())
    >>> input = torch.randn(5, 64)
    >>> torch.equal(again(input), model(input))
    True
    """
    found = {}
    for key in state_dict:
        name, _, tensor = key.rpartition(".")
        if tensor == "basis" and name:
            state = {of: state_dict[f"{name}.{of}"] for of in STATE if f"{name}.{of}" in state_dict}
            forms = [form for form, names in FORMS.items() if names[0] in state]
            if forms:
                found[name] = FactoredLayer(_sizes(name, _layer(model, name), state), forms[0], "bias" in state)
    if not found:
        raise ValueError("restore_factored_: expected a state_dict with factored layers, got one with none")
    replaced = place_(model, found)
    if load:
        try:
            model.load_state_dict(state_dict, strict=strict, assign=any(p.is_meta for p in model.parameters()))
        except BaseException:
            for parent, attribute, module in replaced:
                setattr(parent, attribute, module)
            raise
    return model


STATE = ("basis", "bias", "layout", *sum(FORMS.values(), ()))


def place_(model: nn.Module, layers: Mapping[str, FactoredLayer]) -> List[Tuple[nn.Module, str, nn.Module]]:
    """Builds layers in the places of others: where each stood is returned. One that stands in several places stays
    one."""
    built = {_layer(model, name): layer.build(_layer(model, name)) for name, layer in layers.items()}
    places = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in built:
            parent, _, attribute = name.rpartition(".")
            places.append((model.get_submodule(parent), attribute, module))
    for parent, attribute, module in places:
        setattr(parent, attribute, built[module])
    return places


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise ValueError(f"restore_factored_: expected a model with a linear layer {name}, got none of that name")
    return layer


def _features(layer: nn.Module) -> Tuple[int, int]:
    """in and out, of ``nn.Linear`` or of transformers' Conv1D, whose weight is the other way round."""
    if isinstance(layer, (nn.Linear, STFLinear)):
        return layer.in_features, layer.out_features
    assert isinstance(layer.weight, Tensor)
    return layer.weight.shape[0], layer.weight.shape[1]


def _sizes(name: str, layer: nn.Module, state: Dict[str, Any]) -> Sizes:
    features = _features(layer)
    if "layout" in state:
        sizes = Sizes.of(state["layout"])
    else:
        num_blocks, basis_size, width = state["basis"].shape
        if "latent" in state:
            raise ValueError(
                f"restore_factored_: expected a state_dict that says how many entries of {name}.latent count, got one"
                " of an older version: put an STFLinear of the right nnz there, and call load_state_dict"
            )
        nnz = state["values"].shape[2] if "values" in state else state["packed_values"].shape[2] // ROWS_PER_GROUP
        # Layers as wide as high have been factored on the output's side.
        side = "output" if num_blocks * width == features[0] else "input"
        sizes = Sizes(*features, basis_size, nnz, num_blocks, side)
    if (sizes.in_features, sizes.out_features) != features:
        raise ValueError(
            f"restore_factored_: expected {name} to have in_features={sizes.in_features},"
            f" out_features={sizes.out_features} as in the state_dict, got {features[0]}, {features[1]}"
        )
    return sizes
