"""What is seen of a router, against loops in float64 over the pairs of any routing; collapse shows, balance does not, and what cannot be
measured is said."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mue.moe import Routing
from mue.moe.diagnostics import absent, coactivation, measure, overlap, specialisation

CLASSES = 3


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, list[list[tuple[int, float]]], list[list[float]] | None]:
    """Any routing, and the experts and weights of its tokens as lists: top-k, padded, or with pairs in any order."""
    tokens, experts = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    scale = draw(st.sampled_from([1.0, 3.0]))
    weight = st.floats(0.0, 2.0, width=32)
    chosen = [
        {e: draw(weight) for e in draw(st.lists(st.integers(0, experts - 1), unique=True, max_size=experts))}
        for _ in range(tokens)
    ]
    slots = max(1, *map(len, chosen))
    if draw(st.booleans()):  # padded to the longest
        pairs = [
            (t, e, w) for t, own in enumerate(chosen) for e, w in [*own.items()] + [(experts, 0.0)] * (slots - len(own))
        ]
    else:  # as experts that choose give them
        slots, pairs = 0, draw(st.permutations([(t, e, w) for t, own in enumerate(chosen) for e, w in own.items()]))
    token, expert, scaled = ([p[i] for p in pairs] for i in range(3))
    score = st.lists(st.floats(0.0, 1.0, width=32), min_size=experts, max_size=experts)
    scores = [draw(score) for _ in range(tokens)] if draw(st.booleans()) else None
    routing = Routing(
        torch.tensor(token, dtype=torch.int64),
        torch.tensor(expert, dtype=torch.int64),
        torch.tensor(scaled, dtype=torch.float64) * scale,
        tokens,
        experts,
        slots,
        route_scale=scale,
        scores_TN=None if scores is None else torch.tensor(scores, dtype=torch.float64),
    )
    return routing, [list(own.items()) for own in chosen], scores


def entropy(share: list[float]) -> float:
    return -sum(p * math.log(p) for p in share if p > 0)


@given(routings())
def test_every_number_is_what_loops_over_pairs_give(
    case: tuple[Routing, list[list[tuple[int, float]]], list[list[float]] | None],
) -> None:
    routing, chosen, scores = case
    T, N = routing.num_tokens, routing.num_experts
    seen = measure(routing)
    counts = [len(own) for own in chosen]
    active = sum(counts) / T
    load = Counter(e for own in chosen for e, _ in own)
    m1 = sum(w for own in chosen for _, w in own) / T
    m2 = sum(w * w for own in chosen for _, w in own) / T
    close = lambda value: pytest.approx(value, rel=1e-9, abs=1e-12)  # noqa: E731
    assert (seen["active"], seen["idle"]) == close((active, counts.count(0) / T))
    assert seen["spread"] == close(math.sqrt(sum((c - active) ** 2 for c in counts) / T))
    assert (seen["m1"], seen["m2"]) == close((m1, m2))
    assert seen["F"] == (close(active * m2 / m1**2) if m1 else None)
    assert seen["share"] == close([load[n] / T for n in range(N)])
    assert seen["dead"] == sum(not load[n] for n in range(N))
    pairs = sum(load.values())
    assert seen["max_vio"] == (close(max(load.values()) / (pairs / N) - 1) if pairs else None)
    assert seen["effective"] == close(math.exp(entropy([load[n] / pairs for n in range(N)])) if pairs else 0.0)
    each = [entropy([s / sum(row) for s in row]) for row in scores or [] if sum(row)]
    assert seen["entropy"] == (close(sum(each) / len(each)) if each else None)
    assert ("entropy" in absent(routing)) == (not each)


@given(routings(), st.data())
def test_matrices_are_what_loops_over_tokens_give(
    case: tuple[Routing, list[list[tuple[int, float]]], list[list[float]] | None], data: st.DataObject
) -> None:
    routing, chosen, _ = case
    N = routing.num_experts
    classes = [data.draw(st.integers(0, CLASSES - 1)) for _ in chosen]
    sets = [{e for e, _ in own} for own in chosen]
    together = [[sum(i in s and j in s for s in sets) for j in range(N)] for i in range(N)]
    assert coactivation(routing).tolist() == together
    by_class = [
        [sum(n in s and c == k for s, c in zip(sets, classes, strict=True)) for n in range(N)] for k in range(CLASSES)
    ]
    assert specialisation(routing, torch.tensor(classes), CLASSES).tolist() == by_class


def top_k(expert_TK: Tensor, experts: int) -> Routing:
    return Routing.from_topk(
        expert_TK, torch.full(expert_TK.shape, 1.0), experts, route_scale=float(expert_TK.shape[1])
    )


def test_a_collapsed_router_shows_and_a_balanced_one_does_not() -> None:
    """Both ends, of 16 experts with 4 active: every token on the same four; every expert as often as any other."""
    T, N, a = 64, 16, 4
    collapsed = measure(top_k(torch.arange(a).expand(T, a), N))
    balanced = measure(top_k((torch.arange(T)[:, None] * a + torch.arange(a)) % N, N))
    assert (collapsed["max_vio"], collapsed["dead"], collapsed["effective"]) == (N / a - 1, N - a, pytest.approx(a))
    assert (balanced["max_vio"], balanced["dead"], balanced["effective"]) == (0.0, 0, pytest.approx(N))
    assert set(balanced["share"]) == {a / N} and (balanced["active"], balanced["spread"], balanced["F"]) == (
        a,
        0.0,
        1.0,
    )


def test_entropy_of_even_and_of_certain_scores() -> None:
    routing = top_k(torch.zeros(4, 1, dtype=torch.int64), 8)
    for scores, expected in ((torch.full((4, 8), 0.3), math.log(8)), (torch.eye(8)[:4], 0.0)):
        routing.scores_TN = scores.requires_grad_()
        assert measure(routing)["entropy"] == pytest.approx(expected, abs=1e-12)
    routing.scores_TN = torch.tensor([[1.0, -0.5] * 4] * 4)
    assert measure(routing)["entropy"] is None and absent(routing) == {"entropy": "its scores are no distribution"}
    routing.scores_TN = None
    assert absent(routing) == {"entropy": "the router has no scores"}


def test_overlap_is_one_of_twins_and_near_none_of_strangers() -> None:
    down_NDH = torch.randn(5, 24, 16, dtype=torch.float64)
    down_NDH[3] = -2 * down_NDH[1]
    down_NDH[4] = 0
    found = overlap(down_NDH.requires_grad_())
    for i, j in product(range(5), repeat=2):
        a, b = (down_NDH[n].detach().flatten().tolist() for n in (i, j))
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        expected = sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0
        assert found[i, j].item() == pytest.approx(expected, abs=1e-12)
    assert found[1, 3].item() == pytest.approx(-1) and abs(found[0, 1].item()) < 5 / math.sqrt(24 * 16)


def test_a_routing_that_is_not_finite_gives_no_numbers_but_none() -> None:
    routing = top_k(torch.zeros(3, 2, dtype=torch.int64), 4)
    routing.weight_P = routing.weight_P * math.nan
    routing.scores_TN = torch.full((3, 4), math.nan)
    seen = measure(routing)
    assert (seen["m1"], seen["m2"], seen["F"], seen["entropy"]) == (None,) * 4 and seen["max_vio"] == 3.0
