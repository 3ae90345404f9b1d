"""Activations and gates of other libraries' layers, known by their values."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchops.nn._activations import Activation, Gate, activation_of, gate_of


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU("tanh"), Activation("gelu_tanh")),
        (nn.functional.silu, Activation("silu")),
        (lambda rows: rows * torch.sigmoid(1.702 * rows), Activation("silu", 1.702)),
        (lambda rows: rows.float().relu() ** 2, Activation("relu2")),
        (nn.ReLU6(), None),
        (nn.LeakyReLU(), None),
        (nn.Tanh(), None),
        (nn.PReLU(), None),
        (lambda rows: rows.gelu(), None),
        (lambda: None, None),
        (lambda rows: "gelu", None),
    ],
)
def test_activations_are_known_by_their_values(function: Any, expected: Activation | None) -> None:
    assert activation_of(function) == expected


def gpt_oss(pairs: Tensor, interleaved: bool) -> Tensor:
    gate, up = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def clipped_outside(pairs: Tensor) -> Tensor:
    gate, up = pairs.chunk(2, -1)
    return nn.functional.silu(gate).clamp(max=7) * up.clamp(-7, 7)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda pairs: gpt_oss(pairs, True), Gate("silu", "interleaved", 1.702, 7.0, 1.0)),
        (lambda pairs: gpt_oss(pairs, False), Gate("silu", "concat", 1.702, 7.0, 1.0)),
        (lambda pairs: nn.functional.silu(pairs.chunk(2, -1)[0]) * pairs.chunk(2, -1)[1], Gate("silu", "concat")),
        (lambda pairs: nn.functional.gelu(pairs[..., ::2]) * pairs[..., 1::2], Gate("gelu", "interleaved")),
        (lambda pairs: pairs.chunk(2, -1)[0].relu() * pairs.chunk(2, -1)[1], Gate("relu", "concat")),
        (lambda pairs: pairs.chunk(2, -1)[1].relu() * pairs.chunk(2, -1)[0], None),
        (clipped_outside, None),
        (lambda pairs: pairs, None),
    ],
)
def test_gates_are_known_by_their_values(function: Any, expected: Gate | None) -> None:
    assert gate_of(function) == expected
