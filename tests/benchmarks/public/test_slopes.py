"""Exponents that were put into a made-up file come out again, and where the batch is past the best they change as put in."""

from __future__ import annotations

import numpy as np
import pytest

from public import slopes, steplaw
from public.analysis import by_region, exponents
from public.batches import along_best, best_batches, by_bin, saturating
from public.cells import cells_of
from public.slopes import AXES, log2_batch, pooled, slope, student


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(slopes, "RESAMPLES", 200)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.35, 0.0)])
def test_exponents_come_out(p, q, made_up):
    path, sha256 = made_up("dense", lambda x: -10 + p * (x["B"] - 17) - q * (x["D"] - 33) - 0.7 * (x["N"] - 28))
    cells, _ = cells_of(steplaw.read("dense", path, sha256))
    found = exponents(cells)["terms"]
    for name, value in (("p", p), ("q", q)):
        assert found[name]["value"] == pytest.approx(value, abs=0.005)
        assert found[name]["interval"][0] - 0.005 <= value <= found[name]["interval"][1] + 0.005
    expected = {"tokens, batch fixed": -q, "batch, tokens fixed": p, "batch, steps fixed": p - q}
    assert {axis: slope(cells, axis)["slope"] for axis in AXES} == pytest.approx(expected, abs=0.005)


def test_the_bend_at_the_best_batch_is_found(made_up):
    def optimum(x):  # the best batch of the file is 2^17 at 2^33 tokens, ∝ D^½
        bend = 17 + 0.5 * (x["D"] - 33)
        return -10 + 0.2 * (x["D"] - 33) - 0.6 / 4 * np.log2(1 + 2.0 ** (4 * (bend - x["B"])))

    cells, _ = cells_of(steplaw.read("dense", *made_up("dense", optimum)))
    for (_, tokens), batch in best_batches(cells).items():
        assert batch == pytest.approx(17 + 0.5 * (np.log2(tokens) - 33), abs=0.1)
    found = saturating(cells)
    assert found["kappa"]["value"] == pytest.approx(0.6, abs=0.02)
    assert found["gamma"]["value"] == pytest.approx(0.5, abs=0.03)
    assert found["a"]["value"] == pytest.approx(0.2, abs=0.02)
    below, above = (by_region(cells)[region]["terms"] for region in ("below the best batch", "above it"))
    assert below["p"]["value"] > 0.35 > 0.15 > above["p"]["value"]
    assert below["q"]["value"] > above["q"]["value"] and above["q"]["value"] < -0.1
    steps = by_bin(cells, "batch")
    assert steps[0]["slope"] > 0.5 and steps[-1]["slope"] < 0.1
    # at the bend itself both terms count: a, and nothing of the batch
    assert along_best(cells)["lr"]["exponent"] == pytest.approx(0.2, abs=0.03)
    assert along_best(cells)["batch"]["exponent"] == pytest.approx(0.5, abs=0.03)


def test_without_a_bend_none_is_seen(made_up):
    cells, _ = cells_of(steplaw.read("moe", *made_up("moe", lambda x: -10 + 0.3 * (x["B"] - 17))))
    assert all(row["slope"] == pytest.approx(0.3, abs=0.01) for row in by_bin(cells, "batch"))
    assert all(row["slope"] == pytest.approx(0.0, abs=0.01) for row in by_bin(cells, "tokens"))


def test_a_mean_between_series_is_not_decided_by_the_sharpest():
    # two series agree within themselves to a thousandth and differ by one: the mean lies between, and is unsure
    values, errors = np.array([0.0, 1.0, 0.5]), np.array([1e-3, 2e-3, 2e-3])
    mean, between = pooled(values, errors)
    assert mean == pytest.approx(0.5, abs=0.02) and 0.3 < between < 0.8
    assert pooled(np.array([0.5, 0.5]), np.array([0.1, 0.2])) == (pytest.approx(0.5), 0.0)


def test_student_over_shapes():
    low, high = student([0.0, 0.1, 0.2, 0.3])
    assert (low + high) / 2 == pytest.approx(0.15) and high - low == pytest.approx(2 * 3.182 * 0.0645, rel=1e-2)
    assert student([0.1]) is None


def test_the_batch_is_in_tokens(made_up):
    cells, _ = cells_of(steplaw.read("dense", *made_up("dense", lambda x: -10.0)))
    assert {log2_batch(c) for c in cells} == {15.0, 16.0, 17.0, 18.0, 19.0}
