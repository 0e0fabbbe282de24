"""Runs side by side: what makes a configuration, what names it, and the intervals of its losses."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mue
from mue.lab.report import compare as page
from mue.lab.report.compare import SEED, Ended, compare, config_of, configurations, differences, names_of
from mue.lab.report.page import Section
from mue.lab.train.run import Run, Settings

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
TARGET = mue.MoE.parse("8e2a", width=64, expert=32, layers=2, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1)


def run(
    seed: int = 0, loss: float | None = 2.0, target: mue.MoE = TARGET, settings: Any = None, **options: Any
) -> Ended:
    training = mue.Training(128, 10)
    tuned = options.pop("tuned", TUNED)
    plan = mue.transfer(BASE, target, tuned, base_training=training, training=training, **options)
    made = Run(plan, Settings(seed=seed, **(settings or {})), {"hash": "0" * 64})
    return Ended(made, {"val_loss": loss, "key": made.key}, Path("nowhere"))


def test_seeds_are_one_configuration_and_everything_else_is_another() -> None:
    ended = [
        run(0, 2.0),
        run(1, 2.2),
        run(0, 1.9, rule="standard"),
        run(1, 2.0, rule="standard"),
        run(2, 2.1, rule="standard"),
    ]
    standard, ours = configurations(ended)
    assert (standard.name, ours.name) == ("rule standard", "rule complete-mue")
    assert list(standard.runs) == [0, 1, 2] and standard.mean == pytest.approx(2.0) and ours.mean == pytest.approx(2.1)
    assert SEED in config_of(ended[0].run)


def test_a_seed_that_diverged_puts_its_configuration_last() -> None:
    first, last = configurations([run(0, None), run(1, 1.0), run(0, 3.0, rule="standard")])
    assert first.name == "rule standard" and last.mean == float("inf") and last.losses == [1.0]


def test_runs_of_one_configuration_and_seed_all_stand() -> None:
    """Asked for the same, and trained under another key, as by another version of mue. Without it there is one of each."""
    one, other = run(0, 2.0), replace(run(0), result={"val_loss": 2.5, "key": "of another version"})
    found = configurations([one, run(1, 2.2), other])
    assert [list(c.runs) for c in found] == [[0, 1], [0]] and [c.mean for c in found] == [pytest.approx(2.1), 2.5]
    assert found[1].name == "key of another version" != found[0].name
    assert "Nothing but the keys" in differences(found).texts[0]["text"]
    assert [list(c.runs) for c in configurations([one, run(1, 2.2)])] == [[0, 1]]


def pages(ended: list[Ended], monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Section]]:
    """The lead and the sections of the page on some runs."""
    kept: list[Any] = []
    monkeypatch.setattr(Ended, "rows", [{"step": 1, "tokens": 128, "loss": 2.0}])
    monkeypatch.setattr(page, "write_report", lambda _, __, lead, sections: kept.extend((lead, sections)))
    monkeypatch.setattr(page, "runs_section", lambda *_: Section(id="runs", title="Runs"))
    compare(ended, [], Path("nowhere"))
    return kept[0], kept[1]


def test_losses_of_two_units_do_not_meet_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    text = [run(0, 2.0), run(0, 1.9, rule="standard")]
    images = run(0, 0.4, settings={"task": "diffusion"})
    images = replace(images, run=replace(images.run, data={"hash": "1" * 64}))
    lead, sections = pages(
        [replace(e, result={**e.result, "flops_per_token": 1}) for e in (*text, images)], monkeypatch
    )
    first, second = lead.split("; ")
    assert first.startswith("the lowest validation loss is 1.9 nats per token (")
    assert second.startswith("the lowest validation loss is 0.4 squared error per pixel (")
    assert not any("several corpora" in t["text"] for s in sections for t in s.texts)


def test_two_corpora_of_one_unit_are_warned_of_where_their_losses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    other = run(0, 1.9)
    other = replace(other, run=replace(other.run, data={"hash": "1" * 64}))
    ended = [replace(e, result={**e.result, "flops_per_token": 1}) for e in (run(0), other)]
    lead, sections = pages(ended, monkeypatch)
    assert [s.id for s in sections if any("several corpora" in t["text"] for t in s.texts)] == ["loss"]
    assert ";" not in lead
    lost, _ = pages([replace(e, result={**e.result, "val_loss": None}) for e in ended], monkeypatch)
    assert "every configuration has a run that diverged" in lost


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ([{"tuned": replace(TUNED, lr=0.02)}], ["lr 0.01", "lr 0.02"]),
        ([{"settings": {"eval_every": 5}}], ["eval_every 0", "eval_every 5"]),
        ([{"target": replace(TARGET, router="softmax")}], ["router sigmoid", "router softmax"]),
        (
            [{"target": replace(TARGET, router="softmax"), "rule": "standard"}, {"rule": "standard"}],
            ["rule complete-mue, router sigmoid", "rule standard, router softmax", "rule standard, router sigmoid"],
        ),
        ([{"target": replace(TARGET, width=128)}], ["8e2a d64 L2", "8e2a d128 L2"]),
        ([], [""]),
    ],
)
def test_names_are_the_shortest_that_tell_apart(others: list[dict[str, Any]], names: list[str]) -> None:
    configs = [config_of(run(**options).run) for options in ({}, *others)]
    assert names_of(configs) == names


def test_only_what_differs_is_listed() -> None:
    section = differences(
        configurations([run(0), run(1), run(0, 2.1, tuned=replace(TUNED, lr=0.02, betas=(0.8, 0.9)))])
    )
    assert list(dict.fromkeys(row[0] for row in section.rows)) == ["tuned.lr", "tuned.betas[0]", "tuned.betas[1]"]
    first, second = (row for row in section.rows if row[0] == "tuned.lr")
    assert first[1:] == ["0.01", "lr 0.01"] and second[1:] == ["0.02", "lr 0.02"]
    assert "Nothing but the seed" in differences(configurations([run(0), run(1)])).texts[0]["text"]


def test_differences_are_paired_by_seed() -> None:
    """Seeds move both losses by 1, and the difference by 0.01: paired its interval is narrow, unpaired it were not."""
    from mue.lab.report.compare import _losses

    ended = [run(s, 2.0 + s) for s in range(3)] + [run(s, 2.1 + 1.01 * s, rule="standard") for s in range(4)]
    best, other = _losses(configurations(ended), "nats", "losses").rows
    pairs = [0.1, 0.11, 0.12]
    half = 4.302653 * statistics.stdev(pairs) / 3**0.5
    assert best[2] == "–" and other[2] == f"+{statistics.mean(pairs):.4f} ± {half:.4f} (3)"
    assert other[3].startswith("0: 2.1000, 1: 3.1100")
