"""The valley search: it ends, finds what is there, says what it cannot know, and needs nothing but its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.lab.valley.cell import CellValues
from mue.lab.valley.search import Observation, Proposal, Space, Verdict, next_points, verdict

Loss = Callable[[Proposal], float]
SPACE = Space(lr=(2.0**-10, 1.0), weight_decay=(0.1,), init_std=(0.1,), seeds=(0, 1, 2, 3), precision=0.5, budget=14)


def valley(at: float = -6.0, noise: float = 0.01, depth: float = 3.0, wall: float = 99) -> Loss:
    """A parabola in log2 lr; seeds err on their own and together; beyond ``wall`` runs diverge."""

    def loss(proposal: Proposal) -> float:
        x = math.log2(proposal.lr)
        if x > wall:
            return math.nan
        own, shared = (
            np.random.default_rng([proposal.seed, round(100 * (x + 50))]),
            np.random.default_rng(proposal.seed),
        )
        return depth + 0.05 * (x - at) ** 2 + noise * (own.normal() + shared.normal())

    return loss


def search(space: Space, loss: Loss, workers: int = 1, order: int = 0) -> list[Observation]:
    """Every result, in the order in which ``workers`` at a time ended, which ``order`` draws."""
    rng, results, running = np.random.default_rng(order), list[Observation](), list[Proposal]()
    while True:
        running += next_points(space, results, running, workers - len(running))
        if not running:
            return results
        proposal = running.pop(int(rng.integers(len(running))))
        results.append(Observation(proposal, loss(proposal)))


def said(space: Space, loss: Loss, workers: int = 1) -> Verdict:
    return verdict(space, search(space, loss, workers))


@cache
def found(workers: int) -> tuple[Observation, ...]:
    return tuple(search(SPACE, valley(), workers))


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_a_search_ends_with_the_minimum_however_many_work_on_it(workers: int) -> None:
    results = found(workers)
    end = verdict(SPACE, results)
    assert end.done and end.why.startswith("precise enough: minimum at lr = ") and end.reached <= SPACE.precision
    assert end.interval[0] <= -6 <= end.interval[1]
    proposals = [r.proposal for r in results]
    assert len(set(proposals)) == len(proposals) <= SPACE.budget
    assert all(SPACE.lr[0] * 0.999 <= a.lr <= SPACE.lr[1] * 1.001 and a.seed in SPACE.seeds for a in proposals)
    assert next_points(SPACE, results, [], 5) == []


def test_it_costs_a_fraction_of_a_grid() -> None:
    assert len(found(1)) <= 10  # 27 of a grid


@settings(deadline=None, max_examples=15)
@given(seen=st.integers(1, 9), order=st.randoms(use_true_random=False), away=st.integers(0, 2))
def test_only_the_results_matter_not_their_order(seen: int, order: object, away: int) -> None:
    results = list(found(1)[:seen])
    running = [r.proposal for r in found(1)[seen : seen + away]]
    mixed = results.copy()
    order.shuffle(mixed)  # type: ignore[attr-defined]
    assert next_points(SPACE, mixed, running[::-1], 2) == next_points(SPACE, results, running, 2)
    assert verdict(SPACE, mixed) == verdict(SPACE, results)


@pytest.mark.parametrize("died", [1, 4, 7])
def test_a_killed_search_goes_on_from_its_results_alone(died: int) -> None:
    """What was running is lost; from there on the search is one that never knew of it."""
    results = list(found(3)[:died])
    again = next_points(SPACE, results, [], 3)
    assert again == next_points(SPACE, tuple(results), (), 3)
    for _ in range(SPACE.budget):
        new = next_points(SPACE, results, [], 3)
        if not new:
            break
        results += [Observation(a, valley()(a)) for a in new]
    end = verdict(SPACE, results)
    assert end.done and end.interval[0] <= -6 <= end.interval[1] and len(results) <= SPACE.budget


def test_runs_under_way_count_against_the_budget_and_are_not_asked_for_twice() -> None:
    running = next_points(SPACE, [], [], 3)
    assert len(set(running)) == 3 and next_points(SPACE, [], running, 0) == []
    tight = Space((2.0**-10, 1.0), (0.1,), (0.1,), budget=3)
    assert next_points(tight, [], running, 5) == []


@pytest.mark.parametrize(("at", "side", "word"), [(-12.0, "low", "smaller"), (2.0, "high", "larger")])
def test_a_minimum_beyond_the_range_is_an_edge_and_never_a_number(at: float, side: str, word: str) -> None:
    end = said(SPACE, valley(at))
    assert end.done and end.best and end.best.valley and end.best.valley.edge == side
    assert not end.best.valley.determined and f"widen it towards {word} lr" in end.why


def test_with_extend_it_follows_the_minimum() -> None:
    space = Space(SPACE.lr, (0.1,), (0.1,), SPACE.seeds, precision=0.6, budget=24, extend=True)
    results = search(space, valley(-12.0))
    end = verdict(space, results)
    assert min(r.proposal.lr for r in results) < space.lr[0]
    assert end.best and end.best.valley and end.best.valley.determined
    assert end.interval[0] <= -12 <= end.interval[1]


def test_a_second_valley_is_warned_of() -> None:
    def two(proposal: Proposal) -> float:
        return min(valley(-8.5)(proposal), valley(-1.5, depth=3.05)(proposal))

    end = said(SPACE, two)
    assert end.best and end.best.valley and "second valley" in end.why
    assert end.interval[0] <= -8.5 <= end.interval[1]


def test_control_one_valley_is_not_warned_of() -> None:
    assert "second valley" not in verdict(SPACE, found(1)).why


def test_divergence_is_a_wall_not_an_end() -> None:
    space = Space(SPACE.lr, (0.1,), (0.1,), SPACE.seeds, precision=0.8, budget=20)
    end = said(space, valley(-6.0, wall=-4.9))
    assert end.interval[0] <= -6 <= end.interval[1] <= -4.5
    hopeless = said(space, valley(wall=-99))
    assert hopeless.done and hopeless.best is None and "every run diverged: search smaller" in hopeless.why


def test_control_noise_alone_is_not_precise() -> None:
    def noise(proposal: Proposal) -> float:
        return 3 + 0.05 * float(
            np.random.default_rng([proposal.seed, round(100 * math.log2(proposal.lr) + 5000)]).normal()
        )

    space = Space(SPACE.lr, (0.1,), (0.1,), SPACE.seeds, precision=0.25, budget=14)
    end = said(space, noise)
    assert end.why.startswith(("the budget is spent", "at the edge")) and end.reached > 0.5


def test_cells_that_cannot_be_best_get_few_runs() -> None:
    space = Space(SPACE.lr, (0.1, 1.0), (0.1, 0.3), SPACE.seeds, precision=0.5, budget=48)
    depth = {(0.1, 0.1): 3.0, (1.0, 0.1): 3.2, (0.1, 0.3): 3.3, (1.0, 0.3): 3.5}

    def loss(proposal: Proposal) -> float:
        cell = proposal.weight_decay, proposal.init_std
        return valley(-6 + 0.5 * cell[0], depth=depth[cell])(proposal)

    end = said(space, loss, workers=2)
    assert end.best and end.best.values == CellValues(0.1, 0.1) and end.done
    assert end.interval[0] <= -5.95 <= end.interval[1]
    assert all(c.runs < end.best.runs for c in end.cells if c is not end.best)


def test_a_stopped_run_is_not_a_loss() -> None:
    results = [Observation(a, math.inf if k == 1 else valley()(a)) for k, a in enumerate(_asked(found(1)))]
    end = verdict(SPACE, results)
    assert end.best and end.best.valley and end.best.valley.diverged == 1
    assert end.interval[0] <= -6 <= end.interval[1]


def _asked(results: Sequence[Observation]) -> list[Proposal]:
    return [r.proposal for r in results]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": (1e-2, 1e-3)}, "two ends of a range, the lower first, got 0.01 and 0.001"),
        ({"lr": (0.0, 1e-3)}, "two ends of a range"),
        ({"seeds": ()}, "seeds must list at least one value"),
        ({"weight_decay": (0.1, 0.1)}, "weight_decay must list .* none twice"),
        ({"precision": 0.0}, "precision must be a positive number of octaves"),
        ({"budget": 0}, "the budget must be at least one run"),
    ],
)
def test_what_cannot_be_searched_is_refused(wrong: dict[str, object], message: str) -> None:
    given = {"lr": (1e-3, 1e-2), "weight_decay": (0.1,), "init_std": (0.1,), **wrong}
    with pytest.raises(ValueError, match=message):
        Space(**given)  # type: ignore[arg-type]
