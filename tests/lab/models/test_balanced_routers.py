"""Routers that balance by themselves or by capacity, from an ordinary plan file to a trained model: what each promises of its loads."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

import mue
from mue.checks import CheckError
from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import describe_data
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import TrainingSession, train
from mue.plan.toml import plan_inputs
from mue.plan.transfer import plan_of
from support.command_line import in_process, refused

FILE = """
[base]
width = 32
ffn = 32
layers = 2
head_dim = 16
sequence = 32
training = {{ batch = 256, steps = 20 }}
[tuned]
lr = 0.003
weight_decay = 0.1
init_std = 0.1
[target]
moe = "{moe}"
expert = 16
width = 32
layers = 2
head_dim = 16
sequence = 32
training = {{ batch = 256, steps = 20 }}
router = {router}
"""
CASES = {
    "switch": ("8e1a", '"switch"'),
    "gshard": ("8e2a1s", '{ name = "switch", capacity = 2.0 }'),
    "expert-choice": ("8e2a", '"expert-choice"'),
    "quantile": ("8e2a", '"quantile"'),
}

ROOM = {"switch": 40, "gshard": 128}  # pairs of an expert: capacity · 256 · a/N


@pytest.fixture(scope="module")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(texts, cache=tmp_path_factory.mktemp("cache"))


def run(corpus: Corpus, case: str) -> Run:
    moe, router = CASES[case]
    plan = plan_of(plan_inputs(tomllib.loads(FILE.format(moe=moe, router=router))))
    given = Settings(eval_every=20, eval_sequences=8, log_every=1)
    return Run(plan, given, describe_data({"source": []}, corpus))


@pytest.mark.parametrize("case", CASES)
def test_a_plan_file_trains_and_loads_are_as_promised(tmp_path: Path, corpus: Corpus, case: str) -> None:
    asked, store = run(corpus, case), Store(tmp_path)
    result = train(asked, store, corpus)
    rows = [json.loads(line) for line in (store.folder(asked.key) / "metrics.jsonl").read_text().splitlines()]
    assert result["status"] == "finished" and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert result["val_loss"] < rows[0]["loss"] - 0.5
    if case == "expert-choice":
        assert all(share == 0.125 for row in rows for layer in row["load"] for share in layer)
    if case == "quantile":
        assert busiest(rows) < 0.26
    if case in ROOM:
        shares = [max(layer["share"]) for row in rows if "routers" in row for layer in row["routers"]]
        assert len(shares) == 4 and max(shares) <= ROOM[case] / 256
        assert case == "gshard" or max(shares) == ROOM[case] / 256  # the control: some expert was asked for more


def busiest(rows: list[dict[str, list[list[float]]]]) -> float:
    """The share of the busiest expert, a mean over layers and all steps but the first three."""
    return sum(max(layer) for row in rows[3:] for layer in row["load"]) / sum(len(row["load"]) for row in rows[3:])


def test_control_without_thresholds_the_busiest_expert_has_far_more(tmp_path: Path, corpus: Corpus) -> None:
    with TrainingSession(run(corpus, "quantile"), tmp_path, corpus) as session:
        for _ in range(20):
            session.train_step()
            for layer in session.moe_layers:
                layer.router.threshold.zero_()  # type: ignore[union-attr,operator]
    assert busiest([json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]) > 0.36


def test_a_trained_expert_choice_passes_the_checks_by_its_thresholds(tmp_path: Path, corpus: Corpus) -> None:
    """In evaluation its tokens have differing numbers of experts; weights that are far from even are still seen."""
    asked = run(corpus, "expert-choice")
    with TrainingSession(asked, tmp_path, corpus) as session:
        for _ in range(8):
            session.train_step()
        batch = session.to_device(session.batches.at(9))
        mue.check(session.model, asked.plan, batch, only=("gates",))
        for layer in session.moe_layers:
            layer.router.weight.data.mul_(8)  # type: ignore[union-attr,operator]
            layer.router.threshold.fill_(1 / 16)  # type: ignore[union-attr,operator]
        with pytest.raises(CheckError, match="F = "):
            mue.check(session.model, asked.plan, batch, only=("gates",))


@pytest.mark.parametrize(
    ("moe", "router", "words"),
    [
        ("8e1a", '{ name = "switch", capacity = 0.01 }', ("capacity = 0.01", "drops them all", "set it to")),
        ("8e1a", '{ name = "switch", capacity = 0 }', ("capacity of the switch router must be a number above 0",)),
        ("8e3a", '"switch"', ("uses 1 expert per token (Switch) or 2 (GShard)",)),
        ("512e1a", '"expert-choice"', ("expert choice gives each of 512 experts", "give it at least 512 tokens")),
        ("8e2a", '{ name = "quantile", memory = 1.0 }', ("memory of the quantile router must be",)),
        ("8e2a", '"quantil"', ("unknown router 'quantil'", "did you mean 'quantile'")),
        ("8e4a2g", '"expert-choice"', ("knows no groups",)),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    texts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    moe: str,
    router: str,
    words: tuple[str, ...],
) -> None:
    path = tmp_path / "train.toml"
    path.write_text(
        FILE.format(moe=moe, router=router) + f'[data]\nsource = "{texts}"\ncache = "{tmp_path / "cache"}"\n'
    )
    refused(in_process(capsys, monkeypatch, "train", path, "--out", tmp_path / "out"), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["train.toml"]


def test_their_state_is_in_the_weights_that_are_kept(tmp_path: Path, corpus: Corpus) -> None:
    for case in CASES:
        with TrainingSession(run(corpus, case), tmp_path, corpus) as session:
            for _ in range(3):
                session.train_step()
            state = {n.rpartition("router.")[2]: v for n, v in session.model.state_dict().items() if "router." in n}
        if case in ("switch", "gshard"):
            assert set(state) == {"weight", "step"} and state["step"] == 3
        else:
            assert set(state) == {"weight", "threshold", "seen", "passes", "steps"}
            assert state["steps"] == 3 and state["passes"] == 0 and torch.any(state["threshold"] != 0)
