"""The seam for a problem: a task from outside the package trains, resumes, is keyed by its name, and is refused what it cannot do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import nn

import mue
from mue.lab.data import Corpus, ImageSet, load_corpus, load_images
from mue.lab.data.spec import describe_data
from mue.lab.models.language import LanguageModel
from mue.lab.models.output import Output
from mue.lab.runners.open import open_runner
from mue.lab.sweep.spec import base_plan
from mue.lab.tasks.language import WindowBatches, text_windows
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import TrainingSession, train
from mue.lab.train.spec import settings_from
from mue.lab.train.stacked_session import StackedSession, stack_kind
from mue.lab.train.task import TASKS, Batch, Task, task_of
from mue.plan.plan import PlanData
from mue.shapes import Transformer

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.02, weight_decay=0.1, init_std=0.1)
SETTINGS = Settings(eval_sequences=8, log_every=1, task="copy")


@TASKS.register("copy")
class Copy(Task):
    """Say each token again: learnt in a few steps, and nothing of it is language modelling but the decoder."""

    unit = "nats per token"

    def build(self, plan: PlanData, settings: Settings) -> nn.Module:
        return LanguageModel(plan.target, plan.multipliers, balance="none")

    def batches(self, run: Run, corpus: Corpus) -> WindowBatches:
        return text_windows(run, corpus)

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        tokens_BT, _ = batch
        output = model(tokens_BT)
        output.loss = F.cross_entropy(output.logits.flatten(0, 1), tokens_BT.flatten())
        return output

    def baseline_loss(self, shape: Transformer) -> float:
        return math.log(shape.vocab)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "text.txt").write_text("to be, or not to be, that is the question. " * 100)
    return load_corpus(tmp_path / "text.txt", cache=tmp_path / "cache")


def run_of(corpus: Corpus, settings: Settings = SETTINGS, steps: int = 30) -> Run:
    return Run(base_plan(BASE, mue.Training(128, steps), TUNED), settings, describe_data({}, corpus))


def test_a_task_from_outside_is_trained_on_its_own_loss(tmp_path: Path, corpus: Corpus) -> None:
    result = train(run_of(corpus), Store(tmp_path), corpus)
    language = train(run_of(corpus, replace(SETTINGS, task="language")), Store(tmp_path), corpus)
    assert result["status"] == language["status"] == "finished"
    assert result["val_loss"] < 0.1 * math.log(256)
    # The control: what the same decoder learns of language in as many steps is far from that, so it was the task's loss that fell.
    assert language["val_loss"] > 5 * result["val_loss"]


def test_an_interrupted_run_of_it_goes_on_bit_for_bit(tmp_path: Path, corpus: Corpus) -> None:
    run, whole, broken = run_of(corpus), Store(tmp_path / "whole"), Store(tmp_path / "broken")
    result = train(run, whole, corpus)
    stopped = train(run, broken, corpus, stop=lambda: True)
    assert stopped["status"] == "stopped" and stopped["step"] == 1
    assert train(run, broken, corpus)["val_loss"] == result["val_loss"]
    assert broken.metrics(run.key) == whole.metrics(run.key)
    config = json.loads((broken.folder(run.key) / "config.json").read_text())
    assert config["settings"]["task"] == "copy"
    assert Run.from_dict({k: config[k] for k in ("plan", "settings", "data")}).key == run.key


def test_the_task_is_in_the_key_and_language_is_not(corpus: Corpus) -> None:
    copy, language = run_of(corpus), run_of(corpus, replace(SETTINGS, task="language"))
    assert copy.key != language.key
    assert copy.effective["settings"].pop("task") == "copy"
    assert "task" not in language.effective["settings"] and "task" not in language.to_dict()["settings"]


def test_what_it_cannot_do_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    run, language = run_of(corpus), run_of(corpus, replace(SETTINGS, task="language"))
    sentence = "runs of the task 'copy' cannot be stacked: .*Task.stackable.*processes"
    with pytest.raises(ValueError, match=sentence):
        stack_kind(run)
    with pytest.raises(ValueError, match=sentence):
        open_runner("stacked", Store(tmp_path), workers=2, example=run)
    with TrainingSession(run, _made(tmp_path / "a"), corpus) as session, pytest.raises(ValueError, match=sentence):
        StackedSession(session, 2)
    # The control: the same with a task that can.
    assert stack_kind(language)
    open_runner("stacked", Store(tmp_path), workers=2, example=language).close()
    with TrainingSession(language, _made(tmp_path / "b"), corpus) as session:
        StackedSession(session, 2)


def test_an_unknown_task_is_named_with_the_nearest(tmp_path: Path, corpus: Corpus) -> None:
    for make in (
        lambda: settings_from({"run": {"task": "langauge"}}),
        lambda: train(run_of(corpus, replace(SETTINGS, task="langauge")), Store(tmp_path / "out"), corpus),
    ):
        with pytest.raises(ValueError, match=r"unknown task 'langauge'.*language"):
            make()
    assert not (tmp_path / "out").exists()
    assert settings_from({"run": {"task": "copy"}}).task == "copy"


def test_tasks_are_named_without_torch() -> None:
    """A sweep that only reads what is stored starts in a fraction of the time that torch takes."""
    read = "import sys; from mue.lab.train.spec import settings_from; settings_from({'run': {'task': 'order'}})"
    loaded = "print('torch' in sys.modules)"
    for more, seen in (("", "False"), ("import torch", "True")):
        done = subprocess.run(
            [sys.executable, "-c", "\n".join((read, more, loaded))], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == seen


def test_tasks_say_what_guessing_costs() -> None:
    assert task_of(Settings()).baseline_loss(BASE) == math.log(BASE.vocab)
    assert {"language", "order"} <= set(TASKS)
    assert [task_of(Settings(task=name)).unit for name in ("language", "order")] == [
        "nats per token",
        "nats per window",
    ]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_data_of_another_kind_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    class OnImages(Copy):
        reads = ImageSet.kind

    with pytest.raises(
        ValueError, match=r"the task copy reads images, and the data are text: take another \[run\] task"
    ):
        OnImages().batches_of(run_of(corpus), corpus)
    with pytest.raises(ValueError, match="the task copy reads text, and the data are images"):
        train(run_of(corpus), Store(tmp_path), load_images("digits"))
    assert not (tmp_path / "runs").exists()


def test_a_validation_without_a_loss_is_no_mean_and_a_failed_question_leaves_the_model_training(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrainingSession(run_of(corpus, steps=2), _made(tmp_path / "a"), corpus) as session:
        assert math.isfinite(session.validate()) and session.model.training  # the control

        def fails() -> None:
            raise RuntimeError("no answer" if not session.model.training else "not in eval mode")

        with pytest.raises(RuntimeError, match="no answer"):
            session.asked(fails)
        assert session.model.training
        some = iter([1.0, None])

        def now_and_then(self: Copy, model: nn.Module, batch: Batch) -> Output:
            output = model(batch[0])
            output.loss = None if (left := next(some, None)) is None else output.logits.new_tensor(left)
            return output

        session.validation = [*session.validation, *session.validation][:2]
        monkeypatch.setattr(Copy, "loss", now_and_then)
        with pytest.raises(AssertionError, match="the task copy gives no loss for a validation batch"):
            session.validate()
