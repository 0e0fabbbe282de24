"""The valley fit: its interval covers, it says when it does not know, and it moves and scales with its data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.lab.valley import LossPoint, Valley, fit_valley
from support.paths import ROOT
from valley_population import Material, load, population

GRID = range(-3, 4)
Shape = Callable[[float], float]


def parabola(x: float) -> float:
    return 3 + 0.05 * x**2


def steep_right(x: float) -> float:
    """Almost a straight slope far to the left, exponential to the right; minimum at 0."""
    return 3 + 0.1 * (math.sqrt(1 + (x / 1.5) ** 2) - 1) + 0.01 * (math.exp(x) - 1 - x)


def draw(
    shape: Shape, at: float, noise: float, rng: np.random.Generator, seeds: int = 1, wall: float = 99
) -> list[LossPoint]:
    """A sweep over GRID; learning rates beyond ``wall`` diverge."""
    return [
        LossPoint(x, shape(x - at) + noise * rng.normal() if x < wall else math.nan, seed)
        for x in GRID
        for seed in range(seeds)
    ]


def coverage(
    shape: Shape, noise: float, draws: int, seeds: int = 1, told: float | None = None, wall: float = 99
) -> tuple[float, float]:
    """The share of intervals that hold the minimum, and their median width."""
    rng = np.random.default_rng(0)
    hits, widths = 0, []
    for _ in range(draws):
        at = rng.uniform(-0.7, 0.7)
        low, high = fit_valley(draw(shape, at, noise, rng, seeds, wall), noise=told).interval
        hits += low <= at <= high
        widths.append(high - low)
    return hits / draws, float(np.median(widths))


@pytest.mark.parametrize(
    ("shape", "noise", "seeds", "wall"),
    [(parabola, 0.01, 1, 99), (parabola, 0.03, 2, 99), (steep_right, 0.01, 2, 99), (steep_right, 0.01, 2, 2.5)],
)
def test_the_interval_covers_and_is_no_wider_than_it_must(shape: Shape, noise: float, seeds: int, wall: float) -> None:
    """Smoother valleys than real ones, and runs that share no noise: here 95 % intervals may cover more, within an octave.

    On valleys like those of real sweeps they cover what they say: the next test, and ``benchmarks/valley_search.py``.
    """
    share, width = coverage(shape, noise, 150, seeds, wall=wall)
    assert share >= 0.93 and width < 1


def test_on_valleys_made_from_recorded_sweeps_the_interval_covers_as_it_says() -> None:
    """Nine learning rates × three seeds of sweeps on which no constant of the fit was chosen; bounded on both sides."""
    recorded = load(ROOT / "benchmarks" / "recorded" / "sweeps.json")[15:]
    material = Material.of(recorded, np.random.default_rng(0))
    shares = []
    for confidence in (0.95, 0.5):
        hits = []
        for valley in population(material, 150, -2.0, 2.0, seed=21):
            points = [valley.run(float(x), seed) for x in np.linspace(-4, 4, 9) for seed in range(3)]
            low, high = fit_valley(points, confidence=confidence).interval
            hits.append(low <= valley.at <= high)
        shares.append(float(np.mean(hits)))
    assert 0.90 <= shares[0] <= 0.99
    assert shares[1] < 0.90  # negative control: an interval that claims less covers less


def test_control_understated_noise_does_not_cover() -> None:
    assert coverage(parabola, 0.03, 100, told=0.006)[0] < 0.8


def test_control_shuffled_losses_are_undetermined() -> None:
    rng = np.random.default_rng(1)
    bounded = 0
    for _ in range(60):
        points = draw(parabola, 0.0, 0.03, rng)
        losses = rng.permutation([p.loss for p in points])
        bounded += fit_valley([LossPoint(p.log2_lr, y) for p, y in zip(points, losses, strict=True)]).determined
    assert bounded < 20  # of 60; the same sweeps unshuffled: most


def test_a_clean_parabola() -> None:
    valley = fit_valley([LossPoint(x - 8, parabola(x - 0.4)) for x in GRID])
    assert valley.minimum == pytest.approx(-7.6, abs=0.01)
    assert valley.loss_at_minimum == pytest.approx(3, abs=1e-4)
    assert valley.curvature == pytest.approx(0.1, rel=0.01)
    assert valley.determined and valley.edge is None and valley.warning is None
    assert valley.predict(-6.6) - valley.loss_at_minimum == pytest.approx(0.05, rel=0.03)
    assert valley.predict(40.0) - valley.loss_at_minimum > 1  # along the tangent, still upwards
    assert "minimum at lr = 0.0051 (2^-7.60), 95 % interval 2^" in valley.verdict


@pytest.mark.parametrize(("shift", "edge", "word"), [(-5, "low", "smaller"), (5, "high", "larger")])
def test_a_minimum_beyond_the_grid_is_an_edge(shift: float, edge: str, word: str) -> None:
    valley = fit_valley([LossPoint(x, parabola(x - shift)) for x in GRID])
    assert valley.edge == edge and f"widen it towards {word} lr" in valley.verdict and not valley.determined
    assert valley.minimum == (-3 if edge == "low" else 3)  # never a number from outside the grid


def test_divergence_bounds_the_grid_and_is_kept_as_a_result() -> None:
    points = [LossPoint(x, parabola(x - 2)) for x in GRID if x < 3] + [
        LossPoint(3, math.nan),
        LossPoint(3, math.inf, 1),
    ]
    valley = fit_valley(points)
    assert valley.diverged == 2 and valley.edge is None and all(math.isfinite(p.loss) for p in valley.used)
    with pytest.raises(ValueError, match=r"no run has a finite loss \(1 diverged\): sweep smaller learning rates"):
        fit_valley([LossPoint(0, math.nan)])


def test_too_little_says_what_is_missing() -> None:
    two = fit_valley([LossPoint(0, 3.0), LossPoint(1, 3.1), LossPoint(2, math.nan)])
    assert two.interval == (-math.inf, math.inf) and "2 learning rates" in two.verdict and "at least 3" in two.verdict
    with pytest.raises(ValueError, match="no curve was fitted"):
        two.predict(0.0)
    three = fit_valley([LossPoint(x, parabola(x)) for x in (-1, 0, 1)])
    assert three.interval == (-math.inf, math.inf) and three.minimum == pytest.approx(0, abs=0.02)
    assert all(map(math.isfinite, fit_valley([LossPoint(x, parabola(x)) for x in (-1, 0, 1)], noise=0.001).interval))
    assert "every loss is the same" in fit_valley([LossPoint(x, 3.0) for x in GRID]).verdict


def test_one_bad_run_among_replicates_does_not_bend_the_valley() -> None:
    points = draw(parabola, 0.3, 0.005, np.random.default_rng(3), seeds=3)
    bad = [LossPoint(p.log2_lr, p.loss + 0.5 * (p == points[12]), p.seed) for p in points]
    assert abs(fit_valley(bad).minimum - fit_valley(points).minimum) < 0.05


def test_a_second_valley_is_pointed_out() -> None:
    points = [
        LossPoint(x, y + 0.001 * s, s) for x, y in enumerate([3.2, 3.0, 3.1, 3.4, 3.1, 3.05, 3.3]) for s in range(3)
    ]
    valley = fit_valley(points)
    assert "second valley" in str(valley.warning) and 0 < valley.minimum < 2


def test_bad_arguments() -> None:
    points = [LossPoint(x, parabola(x)) for x in GRID]
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            fit_valley(points, confidence=confidence)
    for noise in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="noise"):
            fit_valley(points, noise=noise)
    with pytest.raises(ValueError, match="learning rate is zero"):
        fit_valley([*points, LossPoint(-math.inf, 3.0)])


def close(a: float, b: float, by: float) -> bool:
    return a == b or abs(a - b) < by


@settings(deadline=None, max_examples=25)
@given(shift=st.floats(-30, 30), factor=st.floats(1e-3, 1e3), offset=st.floats(-10, 10), seed=st.integers(0, 999))
def test_shift_and_scale(shift: float, factor: float, offset: float, seed: int) -> None:
    points = draw(parabola, 0.2, 0.01, np.random.default_rng(seed))
    plain = fit_valley(points)

    def moved(valley: Valley, by: float) -> bool:
        # Rounding decides of which node a draw at the border of two is: ends rest on few draws, the minimum on all.
        ends = zip(valley.interval, plain.interval, strict=True)
        return close(valley.minimum, plain.minimum + by, 0.01) and all(close(a, b + by, 0.15) for a, b in ends)

    assert moved(fit_valley([LossPoint(p.log2_lr + shift, p.loss) for p in points]), shift)
    scaled = fit_valley([LossPoint(p.log2_lr, factor * (p.loss + offset)) for p in points])
    assert moved(scaled, 0.0)
    assert scaled.noise == pytest.approx(factor * plain.noise, rel=1e-3)


def test_thousands_of_runs_are_averaged_not_inverted() -> None:
    rng = np.random.default_rng(5)
    few = [LossPoint(x, parabola(x - 0.3) + 0.05 * rng.normal(), s) for x in GRID for s in range(3)]
    many = [LossPoint(x, parabola(x - 0.3) + 0.05 * rng.normal(), s) for x in GRID for s in range(600)]
    low, high = fit_valley(many).interval
    assert low <= 0.3 <= high
    assert high - low < 0.5 * np.subtract(*fit_valley(few).interval[::-1])


def test_rounded_learning_rates_are_fitted_as_the_exact_ones() -> None:
    exact = [LossPoint(float(x), 2.5 + 0.04 * (x + 7) ** 2 + 0.01 * ((x * x) % 3), 0) for x in range(-12, -1)]
    rounded = [LossPoint(math.log2(0.0078) if p.log2_lr == -7 else p.log2_lr, p.loss, p.seed) for p in exact]
    both = [fit_valley(points) for points in (exact, rounded)]
    assert len(both[0].used) == len(both[1].used) == 9
    assert both[0].minimum == pytest.approx(both[1].minimum, abs=0.03)


@pytest.mark.parametrize("octaves", [1e-9, 1e-4, 0.01, 0.03, 0.1])
def test_learning_rates_close_together(octaves: float) -> None:
    """Closer than the places at which curves are drawn: still a curve from the first to the last of them."""
    points = [LossPoint(-7 + octaves * i / 2, 2.0 + 0.01 * (i - 1) ** 2) for i in range(3)]
    valley = fit_valley(points)
    assert valley.curve[0][0] == -7 and valley.curve[-1][0] == pytest.approx(-7 + octaves, abs=1e-12)
    assert -7 <= valley.minimum <= -7 + octaves and math.isfinite(valley.predict(-7.5) + valley.predict(-6))


def test_which_way_to_go_where_too_few_have_a_loss() -> None:
    points = [LossPoint(-1, 3.0), LossPoint(0, 3.1), LossPoint(1, math.inf), LossPoint(2, math.nan)]
    assert "all above diverged: add smaller ones" in fit_valley(points).verdict
    assert fit_valley(points).edge == "low"
    below = [LossPoint(-2, math.inf), *points[:2]]
    assert "add smaller ones" not in fit_valley(below).verdict
    assert fit_valley(points[:2]).edge is None  # of two learning rates one is always at an end


@pytest.mark.parametrize(
    "losses", [(2.5, 2.1, 2.0, 2.2, 2.6), (2.0, 2.1, 2.3, 2.6, 3.0), (2.0, math.inf, math.inf), (2.0, 2.0, 2.0)]
)
def test_a_valley_is_read_back_as_it_was_written(losses: tuple[float, ...]) -> None:
    """A clear one, one at the edge, one without a curve, one whose interval is open at both ends."""
    points = [LossPoint(i - 9.0, loss, seed) for seed in (0, 1) for i, loss in enumerate(losses)]
    valley = fit_valley(points)
    stored = json.loads(json.dumps(valley.to_dict()))
    again = Valley.from_dict(stored, points)
    assert repr(again) == repr(valley)  # NaN included
    assert again.to_dict() == stored
    stored["verdict"], stored["minimum_log2_lr"] = "another", -7.5
    told = Valley.from_dict(stored, points)  # what was stored is what is told, whatever a fit would say today
    assert told.verdict == "another" and told.minimum == -7.5 and told.curve == valley.curve
