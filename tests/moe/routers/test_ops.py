"""mue.moe.routers.ops by torch: selection with ties, weights of any score. (By the kernel: backends/test_native_route.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.moe.routers.ops import normalised_gates, select_top, take_top


def test_ties_go_to_the_lower_index() -> None:
    assert torch.equal(select_top(torch.zeros(3, 70), 4), torch.arange(4).expand(3, 4))
    assert torch.equal(select_top(torch.zeros(2, 8), 4, groups=2), torch.tensor([[0, 1, 4, 5]] * 2))
    mixed = torch.tensor([[0.0, -0.0, -1.0, 2.0, 2.0, -3.0]])
    assert select_top(mixed, 6).tolist() == [[3, 4, 0, 1, 2, 5]]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=12), st.data())
def test_selection_is_a_stable_descending_sort(scores: list[float], data: st.DataObject) -> None:
    active = data.draw(st.integers(1, len(scores)))
    score_TN = torch.tensor([scores])
    expected = torch.sort(score_TN, dim=1, descending=True, stable=True).indices[:, :active]
    assert torch.equal(select_top(score_TN, active), expected)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, -1.0]), min_size=3, max_size=3), min_size=1, max_size=12),
    st.data(),
)
def test_experts_take_the_best_tokens_and_of_equals_the_first(rows: list[list[float]], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(rows)))
    score_TN = torch.tensor(rows)
    expected = torch.sort(score_TN, dim=0, descending=True, stable=True).indices[:count].T
    assert torch.equal(take_top(score_TN, count).sort(1).values, expected.sort(1).values)
    noise = 1e-12 * torch.randn(score_TN.shape, dtype=torch.float64)  # roundings of a double decide nothing
    assert torch.equal(take_top((1 + score_TN.double()) * (1 + noise), count), take_top(1 + score_TN, count))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_gates_are_the_scores_over_their_sum(score: str) -> None:
    torch.manual_seed(0)
    logit_TN = torch.randn(20, 8, dtype=torch.float64)
    expert_TK = select_top(logit_TN, 3)
    picked_TK = (logit_TN.sigmoid() if score == "sigmoid" else logit_TN.softmax(1)).gather(1, expert_TK)
    expected = 2.5 * picked_TK / picked_TK.sum(1, keepdim=True)
    torch.testing.assert_close(normalised_gates(logit_TN, expert_TK, score, 2.5), expected)
    other = "softmax" if score == "sigmoid" else "sigmoid"
    assert (normalised_gates(logit_TN, expert_TK, other, 2.5) - expected).abs().max() > 0.05  # negative control
