"""Partial results of attention merged, and what is made of them: first tokens and global tokens beside a window."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import torchops

LENGTH, HEADS, FEATURES = 37, 4, 8

pytestmark = pytest.mark.usefixtures("one_thread")


def qkv(queries: int = LENGTH, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(2, HEADS, queries, FEATURES), (2, kv_heads, LENGTH, FEATURES), (2, kv_heads, LENGTH, FEATURES)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Masked attention and its logsumexp, keep [Lq, Lk] or [B, 1, Lq, Lk]."""
    key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.mT / FEATURES**0.5).masked_fill(~keep, -torch.inf)
    return scaled_dot_product_attention(query, key, value, attn_mask=keep), scores.logsumexp(-1)


def assert_equal_with_gradients(
    inputs: list[Tensor],
    actual: Callable[..., tuple[Tensor, Tensor]],
    expected: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    results = []
    for function in (actual, expected):
        output, logsumexp = function(*inputs)
        loss = output.sin().sum() + logsumexp.cos().sum()
        results.append([output, logsumexp, *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(results[0], results[1])


# ---- what docs/span_attention.md has --------------------------------------------------------------------


def with_first_tokens(query: Tensor, key: Tensor, value: Tensor, window: int, num_first: int) -> tuple[Tensor, Tensor]:
    start = torch.full((query.shape[0],), key.shape[2] - query.shape[2])
    parts = [
        torchops.span_attention_lse(
            query, key[:, :, :num_first], value[:, :, :num_first], is_causal=True, query_start=start
        ),
        torchops.span_attention_lse(
            query,
            key[:, :, num_first:],
            value[:, :, num_first:],
            left=window - 1,
            right=0,
            is_causal=True,
            query_start=start,
            key_start=torch.full_like(start, num_first),
        ),
    ]
    return torchops.merge_attention(*map(list, zip(*parts, strict=True)))


@pytest.mark.parametrize("queries", [LENGTH, 1, 9])
@pytest.mark.parametrize(("window", "num_first"), [(5, 4), (5, 1), (12, 20), (40, 4), (1, 0)])
def test_first_tokens_beside_a_window(window: int, num_first: int, queries: int) -> None:
    """Also where windows reach over the first tokens: these count once."""
    p, t = torch.arange(LENGTH - queries, LENGTH)[:, None], torch.arange(LENGTH)
    keep = (t <= p) & ((p - t < window) | (t < num_first))
    assert_equal_with_gradients(
        qkv(queries),
        lambda *inputs: with_first_tokens(*inputs, window, num_first),
        lambda *inputs: dense(*inputs, keep),
    )


def with_global_tokens(query: Tensor, key: Tensor, value: Tensor, window: int, where: Tensor) -> tuple[Tensor, Tensor]:
    def take(input: Tensor) -> Tensor:
        return input.gather(2, where[:, None, :, None].expand(-1, input.shape[1], -1, input.shape[3]))

    hide = torch.zeros(2, LENGTH).scatter(1, where, -torch.inf)
    parts = [
        torchops.span_attention_lse(query, key, value, left=window, right=window, key_bias=hide),
        torchops.span_attention_lse(query, take(key), take(value)),
    ]
    output, logsumexp = torchops.merge_attention(*map(list, zip(*parts, strict=True)))
    of_global, lse_of_global = torchops.span_attention_lse(take(query), key, value)
    index = where[:, None].expand(-1, query.shape[1], -1)
    output = output.scatter(2, index[..., None].expand_as(of_global), of_global)
    return output, logsumexp.scatter(2, index, lse_of_global)


@pytest.mark.parametrize("window", [0, 3, 50])
@pytest.mark.parametrize("positions", [[[0], [0]], [[0, 5, 6, 36], [1, 2, 3, 20]]], ids=["first", "anywhere"])
def test_global_tokens_beside_a_window(window: int, positions: list[list[int]]) -> None:
    where = torch.tensor(positions)
    is_global = torch.zeros(2, LENGTH, dtype=torch.bool).scatter(1, where, True)
    near = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() <= window
    keep = near | is_global[:, None, None, :] | is_global[:, None, :, None]
    assert_equal_with_gradients(
        qkv(), lambda *inputs: with_global_tokens(*inputs, window, where), lambda *inputs: dense(*inputs, keep)
    )


# ---- merging itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_other_operators(parts: int) -> None:
    """Lists of keys, and all others by a span."""
    inputs = qkv()
    first = 10
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool)

    def merged(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.arange(first).expand(2, 2, LENGTH, -1)
        results = [torchops.topk_attention_lse(query, key, value, indices)]
        for piece in torch.arange(first, LENGTH).chunk(parts):
            results.append(torchops.span_attention_lse(query, key[:, :, piece], value[:, :, piece]))
        return torchops.merge_attention(*map(list, zip(*results, strict=True)))

    assert_equal_with_gradients(inputs, merged, lambda *inputs: dense(*inputs, keep))


def test_gradcheck() -> None:
    outputs = [torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    logsumexps = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.autograd.gradcheck(
        lambda *inputs: torchops.merge_attention(list(inputs[:3]), list(inputs[3:])), (*outputs, *logsumexps)
    )


def test_queries_that_saw_nothing() -> None:
    """In one part or in both: no NaN, and no gradient but zeros."""
    lse = [torch.tensor(rows, requires_grad=True) for rows in ([0.5, -torch.inf, -torch.inf], [-torch.inf] * 3)]
    outputs = [torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True) for _ in range(2)]
    output, logsumexp = torchops.merge_attention(outputs, lse)
    assert torch.equal(output, torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(logsumexp, torch.tensor([0.5, -torch.inf, -torch.inf]))
    gradients = torch.autograd.grad((output * 3).sum() + logsumexp.nan_to_num(neginf=0).sum(), [*outputs, *lse])
    assert gradients[0].tolist() == [[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]] and not gradients[1].any()
    assert gradients[2].tolist() == [1.0, 0.0, 0.0] and gradients[3].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1e30, -1e30, 3e38])
def test_large_scores(size: float) -> None:
    lse = [torch.full((2,), size), torch.full((2,), size)]
    output, logsumexp = torchops.merge_attention([torch.ones(2, 1), torch.zeros(2, 1)], lse)
    assert output.tolist() == [[0.5], [0.5]] and torch.equal(logsumexp, lse[0])


def test_half_precision_is_rounded_once() -> None:
    query, key, value = qkv(dtype=torch.bfloat16)
    results = [
        torchops.span_attention_lse(query, key[:, :, piece], value[:, :, piece])
        for piece in torch.arange(LENGTH).chunk(8)
    ]
    outputs, logsumexps = map(list, zip(*results, strict=True))
    output, logsumexp = torchops.merge_attention(outputs, logsumexps)
    assert output.dtype == torch.bfloat16 and logsumexp.dtype == torch.float32
    exact, _ = torchops.merge_attention([output.double() for output in outputs], [lse.double() for lse in logsumexps])
    assert ((output - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()


def test_script_compile_and_export() -> None:
    class Merge(torch.nn.Module):
        def forward(self, o1: Tensor, o2: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
            return torchops.merge_attention([o1, o2], [l1, l2])[0]

    inputs = (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3), torch.randn(2, 3))
    expected = Merge()(*inputs)
    assert torch.equal(torch.jit.script(Merge())(*inputs), expected)
    torch.testing.assert_close(torch.compile(Merge(), backend="aot_eager", fullgraph=True)(*inputs), expected)
    torch.testing.assert_close(torch.export.export(Merge(), inputs).module()(*inputs), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("outputs", "logsumexps", "got"),
    [
        ([], [], "got 0 and 0"),
        ([torch.ones(2, 3)], [torch.ones(2), torch.ones(2)], "got 1 and 2"),
        ([torch.ones(2, 3)], [torch.ones(3)], r"got \[2, 3\] and \[3\] beside \[2, 3\]"),
        (
            [torch.ones(2, 3), torch.ones(1, 3)],
            [torch.ones(2), torch.ones(1)],
            r"got \[1, 3\] and \[1\] beside \[2, 3\]",
        ),
    ],
)
def test_other_arguments_are_refused(outputs: list[Tensor], logsumexps: list[Tensor], got: str) -> None:
    with pytest.raises(ValueError, match=f"merge_attention: expected outputs .*{got}"):
        torchops.merge_attention(outputs, logsumexps)
