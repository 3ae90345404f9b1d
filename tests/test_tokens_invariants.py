"""What holds for the tokens family on any input, on inputs that hypothesis makes up."""

import pytest
import torch
from torch import Tensor

import torchops

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@st.composite
def assignments(draw: st.DrawFn) -> tuple[Tensor, int]:
    groups = draw(st.integers(0, 6))
    tokens = draw(st.integers(0, 12))
    batch = draw(st.integers(1, 3))
    values = draw(st.lists(st.integers(-1, groups - 1), min_size=batch * tokens, max_size=batch * tokens))
    return torch.tensor(values, dtype=torch.int64).reshape(batch, tokens), groups


@settings(deadline=None, max_examples=100)
@given(assignments(), st.booleans(), st.integers(0, 2**31))
def test_merging_conserves_weight_and_weighted_sum(assignment: tuple[Tensor, int], weighted: bool, seed: int) -> None:
    assign, groups = assignment
    torch.manual_seed(seed)
    input = torch.randn(*assign.shape, 5, dtype=torch.float64)
    weight = torch.rand(assign.shape, dtype=torch.float64) if weighted else None
    kept = (assign >= 0).double() * (1 if weight is None else weight)
    merged, total = torchops.merge_tokens(input, assign, groups, weight)
    torch.testing.assert_close(total.sum(1), kept.sum(1))
    torch.testing.assert_close((total.unsqueeze(-1) * merged).sum(1), (kept.unsqueeze(-1) * input).sum(1))


@settings(deadline=None, max_examples=100)
@given(assignments(), st.integers(0, 2**31))
def test_unmerge_is_the_transpose_of_the_unnormalised_merge(assignment: tuple[Tensor, int], seed: int) -> None:
    assign, groups = assignment
    torch.manual_seed(seed)
    input = torch.randn(*assign.shape, 3, dtype=torch.float64)
    merged = torch.randn(assign.shape[0], groups, 3, dtype=torch.float64)
    forward = torchops.merge_tokens(input, assign, groups, normalize=False)[0]
    torch.testing.assert_close((forward * merged).sum(), (input * torchops.unmerge_tokens(merged, assign)).sum())


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.integers(1, 40),
    protected=st.integers(0, 4),
    r=st.integers(0, 30),
    padded=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_bipartite_assignment_invariants(tokens: int, protected: int, r: int, padded: float, seed: int) -> None:
    protected = min(protected, tokens)
    torch.manual_seed(seed)
    metric = torch.randn(2, tokens, 6)
    padding = torch.rand(2, tokens) < padded
    padding[:, :protected] = False
    assign = torchops.bipartite_assignment(metric, r, protected, padding)
    sources, destinations = torchops.bipartite_pairs(metric, r, protected, padding)
    removed = min(r, (tokens - protected) // 2)
    assert torchops.num_groups(tokens, r, protected) == tokens - removed
    assert sources.shape == destinations.shape == (2, removed)
    for row in range(2):
        groups = assign[row].tolist()
        # Exactly M groups, numbered by the position of the token that stays.
        stays = [i for i in range(tokens) if i not in sources[row].tolist()]
        assert [groups[i] for i in stays] == list(range(tokens - removed))
        for source, destination in zip(sources[row].tolist(), destinations[row].tolist(), strict=True):
            if destination < 0:
                assert padding[row, source] and groups[source] == -1
            else:
                assert source >= protected and source % 2 == 0
                assert destination >= protected and destination % 2 == 1
                assert not padding[row, source] and not padding[row, destination]
                assert groups[source] == groups[destination]
