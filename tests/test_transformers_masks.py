"""How the mask functions of transformers are read, against the masks that transformers makes of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchops

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers", exc_type=ImportError
)

from transformers import masking_utils as masks  # noqa: E402

from torchops.integrations import _mask_functions  # noqa: E402
from torchops.integrations._attention_interface import span_mask  # noqa: E402
from torchops.integrations._mask_carrier import Visible, number_of, pack, unpack  # noqa: E402
from torchops.integrations._mask_functions import Span, read  # noqa: E402

SHIFT = torch.tensor([0, 3])
PACKED = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2] + [2] * 20] * 2)
POSITIONS = torch.tensor([list(range(5)) + list(range(6)) + list(range(22))] * 2)
LEFT_PADDED = torch.arange(13) >= torch.tensor([[0], [6]])


def between(low: int, high: int) -> Callable:
    """As T5Gemma 2, Gemma 4 and Moonshine write their windows."""

    def inner(b: Any, h: Any, q: Any, k: Any) -> Any:
        distance = q - k
        return ((distance >= 0) & (distance < low)) | ((distance < 0) & (-distance < high))

    return inner


# Functions that are spans, each in several spellings.
SPANS: dict[str, Callable] = {
    "causal": masks.causal_mask_function,
    "causal, from the query": lambda b, h, q, k: q >= k,
    "causal, <": lambda b, h, q, k: k < q + 1,
    "causal, >": lambda b, h, q, k: q + 1 > k,
    "causal, distance": lambda b, h, q, k: q - k >= 0,
    "causal, negative distance": lambda b, h, q, k: k - q <= 0,
    "causal, number first": lambda b, h, q, k: 0 <= q - k,  # noqa: SIM300
    "causal, shifted by rows": lambda b, h, q, k: k - SHIFT[b] <= q - SHIFT[b],
    "causal, in the one head there is": lambda b, h, q, k: (k <= q) & (h < 1),
    "bidirectional": masks.bidirectional_mask_function,
    "everything": lambda b, h, q, k: k + 2 >= 0,
    "everything, >": lambda b, h, q, k: q > -1,
    "two keys of the future": lambda b, h, q, k: k - 2 <= q,
    "one key of the future": lambda b, h, q, k: k <= q + 1,
    "left only": lambda b, h, q, k: q - k <= 3,
    "left only, <": lambda b, h, q, k: q - k < 3,
    "left only, from the key": lambda b, h, q, k: k >= q - 3,
    "left only, negative": lambda b, h, q, k: k - q >= -3,
    "left only, number first": lambda b, h, q, k: 3 >= q - k,  # noqa: SIM300
    "right only": lambda b, h, q, k: k - q <= 3,
    "right only, <": lambda b, h, q, k: k - q < 3,
    "magnitude": lambda b, h, q, k: abs(q - k) <= 2,
    "magnitude, <": lambda b, h, q, k: abs(q - k) < 2,
    "magnitude of the key's": lambda b, h, q, k: abs(k - q) <= 2,
    "magnitude off the middle": lambda b, h, q, k: abs(q - k - 1) <= 2,
    "itself": lambda b, h, q, k: q == k,
    "blocks both ways": lambda b, h, q, k: k // 4 == q // 4,
    "blocks and the one before": lambda b, h, q, k: (q // 4 - k // 4 <= 1) & (k // 4 <= q // 4),
    "blocks of one": lambda b, h, q, k: k // 1 == q // 1,
    "band of blocks": lambda b, h, q, k: abs(q // 3 - k // 3) <= 1,
    "chunks shifted by rows": masks.chunked_causal_mask_function(4, SHIFT),
    "chunks shifted by rows, both ways": masks.chunked_overlay(4, SHIFT),
    "window": masks.sliding_window_causal_mask_function(5),
    "window of one": masks.sliding_window_causal_mask_function(1),
    "long window": masks.sliding_window_causal_mask_function(50),
    "window overlay": masks.sliding_window_overlay(3),
    "window both ways": masks.sliding_window_bidirectional_mask_function(3),
    "window both ways of none": masks.sliding_window_bidirectional_mask_function(0),
    "window in a window": masks.and_masks(masks.sliding_window_overlay(3), masks.sliding_window_overlay(5)),
    "causal and causal": masks.and_masks(masks.causal_mask_function, masks.causal_mask_function),
    "window with two bounds": masks.and_masks(between(5, 3)),
    "window without a future": masks.and_masks(between(5, 0)),
    "causal or window": masks.or_masks(masks.causal_mask_function, masks.sliding_window_overlay(3)),
    "EmbeddingGemma, full": masks.or_masks(masks.causal_mask_function, lambda *args: torch.tensor(True)),
    "EmbeddingGemma, sliding": masks.or_masks(
        masks.sliding_window_causal_mask_function(4), lambda b, h, q, k: abs(q - k) < 4
    ),
    "and nothing more": masks.and_masks(masks.causal_mask_function, lambda *args: torch.tensor(True)),
    "or nothing": masks.or_masks(masks.causal_mask_function, lambda *args: torch.tensor(False)),
}

# Functions that no span describes, or that are not understood.
OTHERS: dict[str, Callable] = {
    "every second": lambda b, h, q, k: (q - k) % 2 == 0,
    "causal and every second": masks.and_masks(masks.causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0),
    "causal or a group": masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(PACKED)),
    "padding": masks.padding_mask_function(PACKED == 1),
    "packed": masks.packed_sequence_mask_function(PACKED),
    "packed, as models do": masks.packed_sequence_compatibility_function(masks.causal_mask_function, POSITIONS, PACKED),
    "remapped": masks.remap_positions_for_packed_sequence(masks.causal_mask_function, POSITIONS),
    "window and chunks": masks.and_masks(masks.sliding_window_overlay(3), masks.chunked_overlay(4, SHIFT)),
    "chunks of two sizes": masks.and_masks(masks.chunked_overlay(3, SHIFT), masks.chunked_overlay(4, SHIFT)),
    "chunks of two starts": masks.and_masks(masks.chunked_overlay(4, SHIFT), masks.chunked_overlay(4, SHIFT + 1)),
    "chunks or causal": masks.or_masks(masks.chunked_overlay(4, SHIFT), masks.causal_mask_function),
    "empty window": masks.sliding_window_causal_mask_function(0),
    "strictly causal": lambda b, h, q, k: k < q,
    "the future only": lambda b, h, q, k: q <= k - 1,
    "not itself": lambda b, h, q, k: q != k,
    "a hole": lambda b, h, q, k: (q - k >= 2) | (k - q >= 2),
    "the key before": lambda b, h, q, k: q == k + 1,
    "behind a start of the row": lambda b, h, q, k: k - SHIFT[b] >= 0,
    "before a start of the row": lambda b, h, q, k: k < SHIFT[b],
    "a row's own window": lambda b, h, q, k: q - k <= SHIFT[b],
    "unequal starts": lambda b, h, q, k: k - SHIFT[b] <= q,
    "first keys": lambda b, h, q, k: k <= 4,
    "late queries": lambda b, h, q, k: q >= 4,
    "attention sinks": lambda b, h, q, k: (q - k <= 3) | (k < 2),
    "blocks off by one": lambda b, h, q, k: (q + 1) // 4 == (k + 1) // 4,
    "blocks of two sizes": lambda b, h, q, k: q // 4 == k // 3,
    "sum": lambda b, h, q, k: q + k <= 9,
    "half the speed": lambda b, h, q, k: 2 * k <= q,
    "rounded": lambda b, h, q, k: torch.div(q, 4, rounding_mode="trunc") == torch.div(k, 4, rounding_mode="trunc"),
    "half a token": lambda b, h, q, k: k > q - 2.5,
    "branches": lambda b, h, q, k: (k <= q) if isinstance(q, Tensor) else (k >= 0),
    "only the first row": lambda b, h, q, k: (b == 0) & (k <= q),
    "truth of a symbol": lambda b, h, q, k: (k >= 0) and (k <= q),
    "no mask": lambda b, h, q, k: True,
    "fails": lambda b, h, q, k: {}["nothing"],
}
# Two prefills, one of them with a cache, and a static cache.
SIZES = [(13, 13, 0, 0), (2, 9, 11, 4), (3, 20, 10, 0)]


def seen(mask: Tensor, queries: int, keys: int) -> Tensor:
    """bool [B, Lq, Lk], what the operator sees when it is given what the mask says."""
    zeros = torch.zeros(2, 1, 20, 1)
    visible = unpack(mask, zeros[:, :, :queries])
    assert isinstance(visible, Visible), visible
    output = torchops.span_attention(
        zeros[:, :, :queries],
        zeros[:, :, :keys],
        torch.eye(keys).expand(2, 1, keys, keys),
        *visible.span,
        key_bias=visible.key_bias,
        query_start=visible.query_start,
        key_start=visible.key_start,
    )
    return output[:, 0] > 0


@pytest.mark.parametrize("function", SPANS)
@pytest.mark.parametrize("padding", [None, LEFT_PADDED], ids=["whole", "padded"])
def test_spans_are_read(function: str, padding: Tensor | None) -> None:
    for queries, keys, q_offset, kv_offset in SIZES:
        arguments: dict[str, Any] = {"q_length": queries, "kv_length": keys, "q_offset": q_offset}
        arguments |= {"kv_offset": kv_offset, "batch_size": 2, "mask_function": SPANS[function]}
        expected = masks.sdpa_mask(**arguments, attention_mask=padding, allow_is_causal_skip=False)
        mask = span_mask(**arguments, attention_mask=padding)
        assert mask.untyped_storage().nbytes() == 2 * 3 * keys * 8, "nothing is made of queries times keys"
        assert torch.equal(seen(mask, queries, keys), expected[:, 0])


@pytest.mark.parametrize("function", OTHERS)
def test_everything_else_is_not(function: str) -> None:
    for queries, keys, q_offset, kv_offset in SIZES:
        mask = span_mask(2, queries, keys, q_offset, kv_offset, OTHERS[function])
        assert "masks but full, sliding and chunked" in unpack(mask, torch.zeros(2, 1, queries, 1))


def test_formulas_are_right_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they have to be while a graph is traced."""
    asked = [read(function, 2, 33) for function in SPANS.values()]
    monkeypatch.setattr(_mask_functions, "agrees", lambda *args: True)
    for before, function in zip(asked, SPANS.values(), strict=True):
        assert before is not None and read(function, 2, 33) == before
    for name, function in OTHERS.items():
        assert name == "branches" or read(function, 2, 33) is None, name


def test_numbers_are_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that treats symbols and numbers differently, at one border only."""
    _mask_functions._agreed.clear()
    for wrong in (
        lambda b, h, q, k: (k <= q) if not isinstance(q, Tensor) else (k <= q) & (q - k < 900),
        lambda b, h, q, k: (q - k <= 6) if not isinstance(q, Tensor) else (q - k <= 5),
        lambda b, h, q, k: (q // 8 == k // 8) if not isinstance(q, Tensor) else (q // 9 == k // 9),
        lambda b, h, q, k: (k <= q) if not isinstance(q, Tensor) else torch.tensor(True),
        lambda b, h, q, k: (k <= q) if not isinstance(q, Tensor) else 1,
    ):
        assert read(wrong, 2, 1000) is None
        assert read(wrong, 2, 1000) is None


ASKED = []


def window(size: int) -> Callable:
    def inner(b: Any, h: Any, q: Any, k: Any) -> Any:
        ASKED.append(isinstance(q, Tensor))
        return k > q - size

    return inner


def test_numbers_are_asked_once_for_functions_that_are_the_same() -> None:
    _mask_functions._agreed.clear()
    ASKED.clear()
    for length in (600, 700, 1000):
        found = read(masks.and_masks(window(100), masks.causal_mask_function), 2, length)
        assert found is not None and found.span.left == 99
    assert ASKED == [False, True, False, False]
    read(masks.and_masks(window(100), masks.causal_mask_function), 2, 1025)
    read(masks.and_masks(window(99), masks.causal_mask_function), 2, 1025)
    assert ASKED[4:] == [False, True] * 2


def test_the_questions_are_few() -> None:
    for span in (Span(), Span(1, 4095, -1, True), Span(8192, 0, 0, True)):
        _, queries, keys = _mask_functions.questions(span, 64, 1 << 20)
        assert queries.numel() < 20 and keys.numel() < 800


# ---- the tensor that carries a span --------------------------------------------------------------------


def carrier() -> Tensor:
    return span_mask(2, 13, 13, mask_function=masks.chunked_causal_mask_function(4, SHIFT), attention_mask=LEFT_PADDED)


@pytest.mark.parametrize(
    "moved",
    [
        lambda mask: mask.detach(),
        lambda mask: mask.clone(),
        lambda mask: mask.contiguous(),
        lambda mask: mask.to("cpu", torch.float64),
        lambda mask: mask.flip(0).flip(0),
        lambda mask: torch.cat(mask.split(1)),
    ],
)
def test_a_span_survives(moved: Callable[[Tensor], Tensor]) -> None:
    before, after = (unpack(mask, torch.zeros(2, 1, 13, 8)) for mask in (carrier(), moved(carrier())))
    assert isinstance(before, Visible) and isinstance(after, Visible) and before.span == after.span
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one, other)
    assert before.query_start.tolist() == [0, -3] and torch.isinf(before.key_bias).sum() == 6


def test_positions_may_be_large_and_negative() -> None:
    starts = torch.tensor([2**49, -(2**49)])
    mask = pack((*Span(), False), torch.zeros(2, 3, dtype=torch.bool), starts, -starts)
    visible = unpack(mask, torch.zeros(2, 1, 3, 8))
    assert visible.query_start.tolist() == [2**49, -(2**49)] and visible.key_start.tolist() == [-(2**49), 2**49]


def test_others_cannot_use_it_as_a_mask() -> None:
    scores = torch.zeros(2, 3, 13, 13)
    assert carrier().isnan().all()
    with pytest.raises(RuntimeError, match="must match the size"):
        scores + carrier()
    assert (scores + carrier()[:, :1, :1]).softmax(-1).isnan().all()


def test_masks_of_others_are_told_apart() -> None:
    number = number_of((*Span(is_causal=True), False))
    query = torch.zeros(2, 3, number, 8, dtype=torch.float64)
    for mask in (
        torch.zeros(2, 3, number, 13, dtype=torch.float64),
        torch.zeros(2, 1, number, 13, dtype=torch.float64),
        torch.zeros(2, 3, 1, 13, dtype=torch.float64),
        torch.zeros(2, 3, number, 13),
        torch.zeros(2, 3, number, dtype=torch.float64),
        torch.ones(2, 3, number, 13, dtype=torch.bool),
        torch.zeros(2, 3, 10**6, 1, dtype=torch.float64),
    ):
        assert unpack(mask, query) is None
    # and a span from them, where its shape could be that of a mask
    starts = torch.zeros(2, dtype=torch.int64)
    mask = pack((*Span(is_causal=True), False), torch.zeros(2, 13, dtype=torch.bool), starts, starts)
    assert mask.shape == (2, 3, number, 13) and isinstance(unpack(mask, query), Visible)
