"""BERT models, and copies of them whose linear layers are in factors: dense-sparse ones, or those of low rank."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

import torchops

from .low_rank import lower_rank_
from .report import console
from .weights import WeightError


class Encoder(nn.Module):
    """A model around a BERT model. It takes tokens int64 [B, L], of which 0 is padding.

    Args:
        bert: transformers'.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def layers(self) -> nn.ModuleList:
        return self.bert.encoder.layer


AnyEncoder = TypeVar("AnyEncoder", bound=Encoder)


def linear_weights(model: Encoder) -> dict[str, Tensor]:
    layers = model.layers().named_modules()
    return {name: module.weight.detach() for name, module in layers if type(module) is nn.Linear}


def reading(model: Encoder, batches: Sequence[Tensor]) -> None:
    """Lets the model read, padding not counted."""
    for tokens in batches:
        with torchops.nn.ignored_padding(tokens.eq(0)):
            model(tokens)


def factored(
    dense: AnyEncoder, compression: float, batches: Sequence[Tensor] = ()
) -> tuple[AnyEncoder, torchops.nn.FactorizationReport]:
    """A copy whose linear layers are factored: to be close to the weights, or to what is computed of batches of tokens.
    Bytes are those of bfloat16."""
    model = copy.deepcopy(dense)
    fitted = " to what they compute" if batches else ""
    console.print(f"Factoring the layers to 1/{compression:g} of their bytes{fitted}.")
    report = torchops.nn.factorize_(
        model.layers(),
        compression,
        verbose=False,
        calibration=(lambda _: reading(model, batches)) if batches else None,
        stored_dtype=torch.bfloat16,
    )
    return model, report


def truncated(dense: AnyEncoder, errors: Sequence[WeightError], batches: Sequence[Tensor] = ()) -> AnyEncoder:
    """A copy whose linear layers are products of two dense ones, of the ranks that take as many bytes: close to the
    weights, or to what is computed of batches of tokens."""
    model = copy.deepcopy(dense)
    ranks = {error.layer: error.rank for error in errors}
    lower_rank_(model.layers(), lambda name, _: ranks[name], (lambda: reading(model, batches)) if batches else None)
    return model


def in_form(model: AnyEncoder, form: str) -> AnyEncoder:
    """Turns the layers that are factored: "factored", "straight_through" or "pack"."""
    for module in model.modules():
        if isinstance(module, torchops.nn.STFLinear):
            getattr(module, form)()
    return model
