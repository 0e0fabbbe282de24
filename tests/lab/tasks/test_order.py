"""The order task: what a batch holds, that it is learnt, resumed, stacked and swept like any other, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import describe_data
from mue.lab.runners.stacked_runs import StackedRuns
from mue.lab.sweep.spec import base_plan
from mue.lab.tasks import order
from mue.lab.tasks.order import CLASSES, OrderTask, reordered
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import train
from support.command_line import in_process

SHAPES = {
    "dense": mue.Dense(32, 64, 2, head_dim=16, sequence=32),
    "moe": mue.MoE.parse("4e2a", width=32, expert=32, layers=2, head_dim=16, sequence=32),
}
GUESSING = math.log(len(CLASSES))


@pytest.fixture
def corpus(tmp_path: Path, texts: Path) -> Corpus:
    return load_corpus(texts, cache=tmp_path / "cache")


def run_of(corpus: Corpus, name: str = "dense", steps: int = 300, seed: int = 0) -> Run:
    tuned = mue.HParams(lr=0.003, weight_decay=0.1, init_std=0.1)
    plan = base_plan(SHAPES[name], mue.Training(2048, steps), tuned)
    return Run(plan, Settings(task="order", log_every=10, eval_sequences=256, seed=seed), describe_data({}, corpus))


def test_a_batch_holds_windows_of_the_text_in_the_order_of_their_class(corpus: Corpus) -> None:
    batches = OrderTask().batches(run_of(corpus), corpus)
    seen = set()
    for step in range(5):
        text_BT, (window_BT, class_B1) = batches.windows.at(step)[0], batches.at(step)
        assert window_BT.shape == text_BT.shape and class_B1.shape == (len(text_BT), 1)
        for text_T, window_T, kind in zip(text_BT, window_BT, class_B1.flatten().tolist(), strict=True):
            half = len(text_T) // 2
            as_said = {
                "in order": text_T, "reversed": text_T.flip(0), "halves swapped": torch.cat([text_T[half:], text_T[:half]])
            }  # fmt: skip
            seen.add(CLASSES[kind])
            if CLASSES[kind] in as_said:
                assert torch.equal(window_T, as_said[CLASSES[kind]])
            else:
                assert torch.equal(window_T.sort().values, text_T.sort().values)
                assert not any(torch.equal(window_T, other) for other in as_said.values())
    assert seen == set(CLASSES)


def test_batches_are_a_function_of_seed_and_step(corpus: Corpus) -> None:
    one, again = (OrderTask().batches(run_of(corpus), corpus) for _ in range(2))
    other = OrderTask().batches(run_of(corpus, seed=1), corpus)
    same = [
        [torch.equal(a, b) for a, b in zip(one.at(7), batch, strict=True)]
        for batch in (again.at(7), other.at(7), one.at(8))
    ]
    assert same == [[True, True], [False, False], [False, False]]
    held, of_other = one.validation(), other.validation()
    assert len(held) == 256 // 64
    assert all(torch.equal(a, b) for x, y in zip(held, of_other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_learnt(tmp_path: Path, corpus: Corpus, name: str) -> None:
    result = train(run_of(corpus, name), Store(tmp_path), corpus)
    assert result["status"] == "finished" and result["val_loss"] < 0.9 * GUESSING


def test_control_with_classes_that_have_nothing_to_do_with_the_windows_it_is_not(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "reordered", lambda w, draw: (reordered(w, draw)[0], reordered(w, f"other {draw}")[1]))
    assert train(run_of(corpus), Store(tmp_path), corpus)["val_loss"] > 0.98 * GUESSING


@pytest.mark.parametrize("name", SHAPES)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, corpus: Corpus, name: str) -> None:
    run, whole, broken = run_of(corpus, name, steps=12), Store(tmp_path / "whole"), Store(tmp_path / "broken")
    result, steps = train(run, whole, corpus), iter(range(99))
    assert train(run, broken, corpus, stop=lambda: next(steps) == 4)["step"] == 5
    assert train(run, broken, corpus)["val_loss"] == result["val_loss"]
    assert broken.metrics(run.key) == whole.metrics(run.key)


@pytest.mark.parametrize("name", SHAPES)
def test_stacked_runs_are_the_runs_alone(tmp_path: Path, corpus: Corpus, name: str) -> None:
    runs = [run_of(corpus, name, steps=6, seed=seed) for seed in (0, 1)]
    alone = [train(run, Store(tmp_path / "alone"), corpus) for run in runs]
    stack = StackedRuns()
    for run in runs:
        assert stack.join(run, Store(tmp_path / "stacked"), corpus) is None
    together = [result for _ in range(6) for _, result in stack.advance(()) if result]
    assert [r["val_loss"] for r in together] == pytest.approx([r["val_loss"] for r in alone], rel=1e-4)
    assert (
        abs(alone[0]["val_loss"] - alone[1]["val_loss"]) > 1e-3 * alone[0]["val_loss"]
    )  # the control: two runs, not one
    assert {r["stacked"] for r in together} == {2}


def test_what_it_cannot_read_is_refused(corpus: Corpus) -> None:
    short = replace(SHAPES["dense"], sequence=4)
    run = run_of(corpus)
    run = replace(run, plan=base_plan(short, mue.Training(2048, 10), run.plan.tuned))
    with pytest.raises(ValueError, match="the task order needs sequence of at least 8, got 4: raise it"):
        OrderTask().batches(run, corpus)


def test_it_is_swept_trained_and_reported_from_a_file(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        experiment.read_text()
        .replace("[run]", '[run]\ntask = "order"')
        .replace("init_std = [0.05, 0.1]", "init_std = [0.1]")
    )
    experiment.write_text(text)
    out = tmp_path / "out"
    code, _, err = in_process(capsys, monkeypatch, "sweep", experiment, "--out", out, "--workers", 1)
    assert code == 0, err
    configs = [json.loads(path.read_text()) for path in out.glob("runs/*/config.json")]
    assert len(configs) == 3 and {config["settings"]["task"] for config in configs} == {"order"}
    losses = [json.loads(path.read_text())["val_loss"] for path in out.glob("runs/*/result.json")]
    assert len(losses) == 3 and all(abs(loss - GUESSING) < 0.6 for loss in losses)  # of four classes, not of 256 bytes
    assert (out / "report.html").exists()

    experiment.write_text(text.partition("[sweep]")[0] + "[tuned]\nlr = 0.01\nweight_decay = 0.1\ninit_std = 0.1\n")
    code, _, err = in_process(capsys, monkeypatch, "train", experiment, "--out", tmp_path / "one")
    assert code == 0, err
    (page,) = (tmp_path / "one").glob("runs/*/report.html")
    for report in (page, out / "report.html"):  # of language it would be tokens
        assert "nats per window" in report.read_text() and "nats per token" not in report.read_text()
