"""A published file, made up here, becomes cells whose valleys are those that were put in."""

from __future__ import annotations

import math

import pytest

from public import steplaw
from public.cells import PublishedRun, Shape, cells_of, read_checked

from .conftest import CURVATURE

SHAPE = Shape("one", 64, 2, 64, 1e5, 1e5)


def runs(losses: dict[float, float]) -> list[PublishedRun]:
    return [PublishedRun(SHAPE, 1e9, 2**16, 2.0**x, loss) for x, loss in losses.items()]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_file_becomes_its_valleys(kind, made_up):
    path, sha256 = made_up(kind, lambda x: -10 + 0.5 * (x["B"] - 17))
    cells, whole = cells_of(steplaw.read(kind, path, sha256))
    assert len(cells) == whole == 30
    for cell in cells:
        assert cell.valley.minimum == pytest.approx(-10 + 0.5 * (math.log2(cell.batch) - 17), abs=1e-3)
        assert cell.valley.curvature == pytest.approx(CURVATURE, rel=1e-3)
        assert cell.cost(cell.valley.minimum + 1) == pytest.approx(CURVATURE / 2, rel=1e-3)
        assert cell.cost(cell.valley.minimum + 3) == pytest.approx(CURVATURE * 4.5, rel=0.02)  # by the runs themselves


def test_what_a_token_meets_is_counted_from_the_moe_file(made_up):
    shape = steplaw.read("moe", *made_up("moe", lambda x: -10.0))[-1].shape
    assert (shape.active_width, shape.experts, shape.chosen, shape.total, shape.active) == (1536, 8, 2, 4e8, 2e8)


def test_another_file_is_refused_with_its_sum(made_up):
    path, sha256 = made_up("dense", lambda x: -10.0)
    with pytest.raises(ValueError, match=rf"dense.csv has sha256 {sha256}, not .*--sha256"):
        steplaw.read("dense", path)
    assert read_checked(path, sha256).startswith("h,ffnh")


def test_a_file_of_the_other_kind_is_refused(made_up):
    path, sha256 = made_up("dense", lambda x: -10.0)
    with pytest.raises(ValueError, match="no column 'topk': is it the moe file"):
        steplaw.read("moe", path, sha256)


def test_a_minimum_at_the_edge_is_no_cell():
    falling = {x / 2: 2 - 0.05 * x for x in range(-24, -14)}
    assert cells_of(runs(falling)) == ([], 1)
    bowl = {x / 2: 2 + 0.03 * (x / 2 + 10) ** 2 for x in range(-24, -14)}
    assert len(cells_of(runs(bowl))[0]) == 1  # the same grid around a minimum is one


def test_a_diverged_run_does_not_bend_the_valley():
    bowl = {x / 2: 2 + 0.03 * (x / 2 + 10) ** 2 for x in range(-24, -17)}
    (clean,), _ = cells_of(runs(bowl))
    (cell,), _ = cells_of(runs(bowl | {-8.5: 7.0}))
    assert cell.valley.minimum == pytest.approx(clean.valley.minimum) == pytest.approx(-10)
    assert cell.cost(-8.0) == pytest.approx(5.0, abs=0.01)  # but it is what such a rate costs


def test_noise_gives_an_error_of_its_own_size():
    # parabolas with noise of 0.002: the fitted minima scatter as their errors say
    import numpy as np

    rng, off, errors = np.random.default_rng(0), [], []
    for _ in range(200):
        points = {x / 2: 2 + 0.0125 * (x / 2 + 10) ** 2 + 0.002 * rng.standard_normal() for x in range(-24, -14)}
        for cell in cells_of(runs(points))[0]:
            off.append(cell.valley.minimum + 10)
            errors.append(cell.valley.error)
    assert 0.7 < np.std(off) / np.mean(errors) < 1.4
