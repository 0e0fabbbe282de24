"""The part of a report that is about images, of a run that was trained for it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mue.lab.report.grids import grid
from mue.lab.report.images import image_sections, pixels_of
from mue.lab.report.runs import run_report
from mue.lab.train.run import Store
from mue.lab.train.session import train
from support.diffusion import BASE, images, run_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store, corpus = Store(tmp_path_factory.mktemp("images")), images()
    for run in (run_of(corpus, eval_every=5), run_of(corpus, BASE)):
        train(run, store, corpus)
    return store


def test_a_runs_page_has_grids_times_and_experts(store: Store) -> None:
    moe, dense = (run_of(images(), eval_every=5), run_of(images(), BASE))
    page = run_report(store.folder(moe.key)).read_text()
    for words in (
        "What it draws, over training",
        "Held-out loss at fixed times",
        "by time step",
        "by image position",
    ):
        assert words in page
    assert len(list(store.folder(moe.key).glob("*.png"))) > 4
    # without validations on its way there are no grids, and without experts no loads
    sections = image_sections({"dense": (store.metrics(dense.key), store.of_task(dense.key))}, "squared error")
    assert [section.id for section in sections] == ["times"]


def test_models_are_compared_in_pairs(store: Store) -> None:
    kept = {
        name: ([], store.of_task(run.key))
        for name, run in {"dense": run_of(images(), BASE), "MoE": run_of(images(), eval_every=5)}.items()
    }
    times = next(s for s in image_sections(kept, "squared error") if s.id == "times")
    assert list(times.header) == ["time", "dense", "MoE", "MoE − dense"]
    first, second = (kept[name][1] for name in ("dense", "MoE"))
    assert first and second
    apart = [b - a for a, b in zip(first["losses"][0], second["losses"][0], strict=True)]
    assert times.rows[0][3].startswith(f"{math.fsum(apart) / len(apart):+.4f} ± ")
    assert image_sections({"text": ([{"loss": 1.0}], None)}, "nats") == []


def test_a_row_has_the_images_that_were_drawn(store: Store) -> None:
    rows = [row for row in store.metrics(run_of(images(), eval_every=5).key) if "drawn" in row]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    drawn = [pixels_of(row) for row in rows]
    assert all(d.shape == (3, 1, 8, 8) for d in drawn) and (drawn[0] != drawn[-1]).any()


def test_a_task_may_keep_what_it_likes(store: Store) -> None:
    """Of another task's JSON nothing is said; beside it what a diffusion run kept is shown as before."""
    kept = store.of_task(run_of(images(), eval_every=5).key)
    assert kept
    for own in ({"recall": 0.3}, {"losses": [1.0]}, {}):
        assert image_sections({"own": ([], own)}, "nats") == []
        sections = image_sections({"own": ([], own), "MoE": ([], kept)}, "squared error")
        assert [s.id for s in sections] == ["times", "experts-by-time", "experts-by-place"]
        assert list(sections[0].header) == ["time", "MoE"]
    without = {name: kept[name] for name in ("times", "losses")}
    assert [s.id for s in image_sections({"dense": ([], without)}, "squared error")] == ["times"]


def test_a_grid_says_how_it_was_drawn_or_why_not(store: Store) -> None:
    rows = [row for row in store.metrics(run_of(images(), eval_every=5).key) if "drawn" in row]
    (grids,) = image_sections({"MoE": (rows, None)}, "squared error")
    assert "guidance 1.5, 12 steps of Heun's method" in grids.caption and not grids.texts
    before = [{**row, "drawn": {k: v for k, v in row["drawn"].items() if k != "way"}} for row in rows]
    (old,) = image_sections({"MoE": (before, None)}, "squared error")
    assert "Heun" not in old.caption and old.caption.endswith("with the weights of the step.")
    lost = [{"step": 25, "not_drawn": "its run diverged"}] * 2
    (both,) = image_sections({"MoE": ([*rows, *lost], None)}, "squared error")
    (none,) = image_sections({"MoE": (lost, None)}, "squared error")
    for section in (both, none):
        (said,) = section.texts
        assert said["warn"] and "its run diverged" in said["text"]
    assert both.figure is not None and none.figure is None


def test_a_grid_has_every_pixel_as_a_square() -> None:
    draw = np.random.RandomState(0)
    for channels in (1, 3):
        images_NCHW = draw.randint(0, 256, (5, channels, 8, 8)).astype(np.uint8)
        found = grid(images_NCHW, 3)
        zoom, gap = 6, 6
        assert found.shape == (2 * (48 + gap) + gap, 3 * (48 + gap) + gap, 3)
        fourth = found[54 + gap : 54 + gap + 48, gap : gap + 48]
        assert (fourth[::zoom, ::zoom] == images_NCHW[3].transpose(1, 2, 0)).all() and (
            fourth[5::zoom, 5::zoom] == fourth[::zoom, ::zoom]
        ).all()
        assert (found[-50:, -50:] == 255).all() and (found[:gap] == 255).all()
