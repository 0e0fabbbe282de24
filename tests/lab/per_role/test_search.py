"""The per-role search: its designs, its intervals, what it takes and what it refuses to take, on landscapes whose truth is known."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mue
from mue.lab.per_role.search import Candidate, RolesResult, Search, multipliers, search
from mue.lab.per_role.space import Coordinate, coordinates, factor, mirrored_design, roles_of, stepped, with_multipliers
from mue.lab.per_role.stats import noise_of, paired, shares, shrunk, slopes
from mue.lab.per_role.tune import tuned_toml

BASE = mue.Dense(width=64, ffn=64, layers=3, head_dim=32)
TUNED = mue.HParams(lr=8e-3, weight_decay=0.1, init_std=0.15)
SPACE = coordinates(BASE, ("lr",))
few = settings(max_examples=20, deadline=None)


class Landscape:
    """Losses of a separable parabola over log2 multipliers, with an offset for each seed and noise for each run.

    ``best``: the minimum by coordinate, ``curvature``: nats for an octave away, twice. A job is asked for as a trainer
    would be: by its tuned values and seed alone, and answers the same again.
    """

    def __init__(self, best: dict[str, float], *, noise: float = 0.01, curvature: float = 0.02, name: str = "") -> None:
        self.best, self.noise, self.curvature, self.name = best, noise, curvature, name
        self.calls: list[tuple[str, int]] = []

    def octaves(self, tuned: mue.HParams, coordinate: Coordinate) -> float:
        return math.log2(tuned.roles.get(coordinate.tables[0], {}).get(f"{coordinate.number}_times", 1.0))

    def height(self, tuned: mue.HParams, seed: int) -> float:
        away = [self.octaves(tuned, c) - self.best.get(c.label, 0.0) for c in SPACE]
        return 2.0 + self.curvature / 2 * sum(x * x for x in away)

    def __call__(self, title: str, jobs: Sequence[Candidate]) -> list[float]:
        self.calls.append((title, len(jobs)))
        return [
            self.height(t, seed) + 0.05 * self._draw(seed) + self.noise * self._draw(seed, t.lr, t.roles)
            for t, seed in jobs
        ]

    def _draw(self, *what: Any) -> float:
        digest = hashlib.sha256(f"{self.name}{what}".encode()).digest()
        return NormalDist().inv_cdf((int.from_bytes(digest[:6], "little") + 0.5) / 2**48)


def found(landscape: Landscape, **options: Any) -> RolesResult:
    return search(TUNED, SPACE, Search(**{"numbers": ("lr",), **options}), landscape)


# ---- the space -------------------------------------------------------------------------------------------------------


def test_coordinates_follow_the_bases_own_parameters() -> None:
    labels = [c.label for c in coordinates(BASE)]
    assert labels[:10] == [
        *(f"{r} lr" for r in ("embedding", "attention_q", "attention_k", "attention_v", "attention_o")),
        *(f"{r} lr" for r in ("ffn_up", "ffn_gate", "ffn_down", "head", "norms")),
    ]
    assert (
        "norms init std" not in labels
        and "head weight decay" in labels
        and labels[-2:] == ["first_third lr", "last_third lr"]
    )
    tied = [c.label for c in coordinates(mue.Dense(width=64, ffn=64, layers=1, head_dim=32, tied=True, gated=False))]
    assert not {"head lr", "ffn_gate lr", "first_third lr"} & set(tied)
    moe = coordinates(mue.MoE.parse("8e2a1s", width=64, expert=32, layers=4, head_dim=32), ("init_std",), thirds=False)
    assert {"router", "expert_down", "shared_up"} <= {c.name for c in moe} and "ffn_up" not in {c.name for c in moe}
    mue.transfer(
        BASE, BASE, with_multipliers(TUNED, coordinates(BASE), (3,) * len(coordinates(BASE)))
    )  # every table is one a plan takes


def test_a_point_is_a_table_and_its_file_is_the_same_numbers() -> None:
    import tomllib

    from mue.plan.toml import tuned_from

    space = coordinates(BASE)
    point = tuple((i % 9) - 4 for i in range(len(space)))
    tuned = with_multipliers(TUNED, space, point)
    assert roles_of(space, (0,) * len(space)) == {} and factor(4) == 2 and factor(-8) == 0.25
    assert tuned.roles["norm"] == tuned.roles["qk_norm"] and tuned.roles["first_third.ffn_up"]["lr_times"] != 1
    assert tuned_from(tomllib.loads(tuned_toml(tuned, "a verdict"))["tuned"]) == tuned
    assert stepped((0, 0, 16), (0.24, -0.5, 3)) == (1, -2, 16)


@few
@given(factors=st.integers(1, 40))
def test_designs_are_balanced_and_orthogonal(factors: int) -> None:
    signs = mirrored_design(factors)
    pairs = len(signs)
    assert pairs >= max(16, factors + 1) and set(np.unique(signs)) == {-1, 1}
    assert (signs.T @ signs == pairs * np.eye(factors)).all() and (signs.sum(0) == 0).all()


# ---- statistics ------------------------------------------------------------------------------------------------------


@few
@given(seed=st.integers(0, 10_000))
@example(seed=18)  # the largest difference is far from the others', and right
def test_slopes_are_exact_and_blind_to_curvature_and_products(seed: int) -> None:
    rng, signs = np.random.default_rng(seed), mirrored_design(12)
    true, quadratic = rng.normal(size=12), rng.normal(size=(12, 12))

    def height(x: Any) -> float:
        return float(3 + true @ x + x @ quadratic @ x)

    plus, minus = ([height(side * row) for row in signs] for side in (1, -1))
    assert slopes(signs, plus, minus) == pytest.approx(true)
    one_sided = signs.T @ np.array(plus) / len(signs)  # control: without the mirror image products do show
    assert not np.allclose(one_sided, true, atol=1e-3)


def test_a_run_that_diverged_is_one_bad_run() -> None:
    signs, true = mirrored_design(12), np.linspace(-0.02, 0.02, 12)
    rng = np.random.default_rng(0)
    plus, minus = ([float(side * row @ true + 0.01 * rng.normal()) for row in signs] for side in (1, -1))
    for i, (p, m) in enumerate(((math.inf, 0.0), (0.0, math.inf), (math.inf, math.inf))):
        plus[i], minus[i] = p, m
    assert np.abs(slopes(signs, plus, minus) - true).max() < 0.03


def test_a_finite_difference_that_no_slopes_could_make_is_pulled_in() -> None:
    signs, true = mirrored_design(12), np.linspace(-0.02, 0.02, 12)
    plus = signs @ true
    plus[3] += 10.0
    assert np.abs(slopes(signs, list(plus), list(-signs @ true)) - true).max() < 0.05
    assert np.abs(signs.T @ (plus + signs @ true) / 2 / len(signs) - true).max() > 0.2  # control: left as it is


def test_noise_is_told_from_the_effects_themselves() -> None:
    rng = np.random.default_rng(1)
    estimates = []
    for _ in range(200):
        effects = 0.003 * rng.normal(size=30)
        effects[:6] += 0.05
        estimates.append(
            (
                noise_of(effects, ["lr"] * 30),
                noise_of(effects - 0.04, ["lr"] * 30),
                noise_of(effects - 0.04, ["lr"] * 4 + ["wd"] * 4 + ["std"] * 4 + list("abcdefghijklmnopqr")),
            )
        )
    alone, shifted, uncentred = np.median(estimates, axis=0)
    assert alone == pytest.approx(0.003, rel=0.25) and shifted == pytest.approx(alone, rel=0.1)
    assert uncentred > 0.03  # control: a shift of all passes for noise where kinds are too small to show it
    assert shrunk(np.array([0.002, -0.03, 0.0]), 0.003) == pytest.approx([0, -0.03 * 0.99, 0])


def test_paired_intervals_cover() -> None:
    rng, inside, naive = np.random.default_rng(2), 0, 0
    for _ in range(1000):
        offset = rng.normal(0, 0.1, 6)
        before, after = 2 + offset + rng.normal(0, 0.01, 6), 1.98 + offset + rng.normal(0, 0.01, 6)
        gain = paired(list(before), list(after), 0.05)
        inside += gain.low <= 0.02 <= gain.high
        half = 1.96 * np.std(before - after) / math.sqrt(6)  # control: the normal law at 6 seeds
        naive += abs(gain.mean - 0.02) <= half
    assert 0.935 <= inside / 1000 <= 0.965 and naive / 1000 < 0.93
    assert paired([1.0, 2.0], [0.5, math.inf], 0.05).mean == -math.inf
    assert paired([1.0], [0.5], 0.05).low == -math.inf


def test_shares_add_up_and_cover_together() -> None:
    rng, k, covered = np.random.default_rng(3), 6, 0
    signs, true = mirrored_design(k, 8), np.array([0.03, 0.02, 0.01, 0.0, 0.0, -0.01])
    products = np.zeros((k, k))
    products[0, 1] = 0.02  # two multipliers that help each other: half of it belongs to each
    for _ in range(250):
        on = [(side * signs > 0).astype(float) for side in (1, -1)]
        plus, minus = ([float(2 - z @ true - z @ products @ z + 0.01 * rng.normal()) for z in half] for half in on)
        bought = shares(signs, plus, minus, 0.05)
        expected = true + (products.sum(0) + products.sum(1)) / 2
        covered += all(g.low <= e <= g.high for g, e in zip(bought, expected, strict=True))
    assert 0.92 <= covered / 250 <= 0.98
    assert expected.sum() == pytest.approx(true.sum() + products.sum())  # the whole set's gain


# ---- the search ------------------------------------------------------------------------------------------------------


def test_a_planted_optimum_is_found_and_reported() -> None:
    best = {"head lr": 1.0, "ffn_down lr": 2.0, "embedding lr": -1.0, "first_third lr": 0.5}
    landscape = Landscape(best, noise=0.004)
    result = found(landscape)
    possible = 0.01 * sum(x * x for x in best.values())
    assert result.confirmed is not None and result.confirmed.holds and "confirmed on fresh seeds" in result.verdict
    reached = landscape.height(TUNED, 0) - landscape.height(with_multipliers(TUNED, SPACE, result.result), 0)
    assert reached > 0.8 * possible and result.confirmed.gain.mean == pytest.approx(reached, abs=0.01)
    rows = {row["name"]: row for row in multipliers(result)}
    assert rows["ffn_down lr"]["times"] > 2 and rows["embedding lr"]["times"] < 1
    for name in ("head lr", "ffn_down lr", "embedding lr"):
        assert rows[name]["low"] > 0 and rows[name]["kept"], name
    seeds_used = [title.split(":")[0] for title, _ in landscape.calls]
    assert seeds_used[0] == "round 1" and seeds_used[-1] == "confirmation on 8 fresh seeds"


def test_the_same_losses_give_the_same_search() -> None:
    one, two = (Landscape({"head lr": 1.5}, name="again") for _ in range(2))
    assert found(one) == found(two) and one.calls == two.calls


def test_a_step_that_gains_nothing_is_almost_never_taken() -> None:
    """At most 5 % of searches on a flat-bottomed base; without widened intervals (control) a fifth and more."""
    false = [any(found(Landscape({}, name=f"null {i}")).reached) for i in range(30)]
    assert sum(false) <= 3

    class Flat(Landscape):
        def height(self, tuned: mue.HParams, seed: int) -> float:
            return 2.0

    loose = [any(found(Flat({}, name=f"loose {i}"), error=0.999).reached) for i in range(15)]
    strict = [any(found(Flat({}, name=f"loose {i}")).reached) for i in range(15)]
    assert sum(strict) <= 2 and sum(loose) > 2 * max(1, sum(strict))


def test_what_does_not_hold_on_fresh_seeds_is_not_used() -> None:
    class Fleeting(Landscape):
        def height(self, tuned: mue.HParams, seed: int) -> float:
            return super().height(tuned, seed) if seed < 60_000 else 2.0  # the confirmation's seeds see nothing of it

    result = found(Fleeting({"head lr": 2.0}, noise=0.004))
    assert any(result.kept) and not any(result.result) and "not confirmed" in result.verdict


def test_what_one_better_global_rate_would_also_buy_is_not_credited_to_roles() -> None:
    """A base tuned at a too small lr: every role wants √2 more, which is one number."""

    class Uniform(Landscape):
        def octaves(self, tuned: mue.HParams, coordinate: Coordinate) -> float:
            return super().octaves(tuned, coordinate) + math.log2(tuned.lr / TUNED.lr)

    best = {c.label: 0.5 for c in SPACE if not c.label.startswith(("first", "last"))}
    landscape = Uniform(best, noise=0.004, curvature=0.04)
    landscape.best |= {"first_third lr": 0.5, "last_third lr": 0.5}
    result = found(landscape)
    assert result.confirmed is not None and result.confirmed.best == "one global value, lr × 1.41"
    assert result.confirmed.gain.low > 0 and not result.confirmed.holds and not any(result.result)


def test_what_cannot_be_searched_is_said() -> None:
    class Broken(Landscape):
        def height(self, tuned: mue.HParams, seed: int) -> float:
            return super().height(tuned, seed) if tuned.roles.get("head") else math.inf

    with pytest.raises(ValueError, match=r"the base itself diverges.*lower \[tuned\] lr"):
        found(Broken({"head lr": 2.0}))
    with pytest.raises(ValueError, match="leaves no multiplier"):
        search(TUNED, (), Search(), Landscape({}))
    for bad, message in (
        ({"numbers": ()}, "must list some of"),
        ({"numbers": ("lrs",)}, "did you mean 'lr'"),
        ({"thirds": 1}, "thirds must be true or false"),
        ({"step": 0}, "step must be greater than 0"),
        ({"error": 1}, "below 1"),
        ({"confirm": 2}, "at least 3 seeds"),
        ({"rounds": 0}, "rounds must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            Search(**bad)  # type: ignore[arg-type]
