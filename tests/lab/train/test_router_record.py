"""What a run keeps of its routers: rows at evaluations alone, matrices once, exact over a resume, whoever the router is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mue.lab.data import Corpus
from mue.lab.data.byte_classes import BYTE_CLASSES
from mue.lab.tasks.language import LanguageTask
from mue.lab.train import session as session_module
from mue.lab.train.router_record import RouterRecord
from mue.lab.train.run import Run, Store
from mue.lab.train.session import TrainingSession, train
from mue.lab.train.step import moe_layers
from mue.lab.train.task import task_of
from mue.model.apply import init_
from mue.moe import Routing, diagnostics
from mue.moe.routers.base import ROUTER_CLASSES
from mue.plan.toml import plan_inputs
from mue.plan.transfer import plan_of
from support.small_run import SETTINGS, STEPS, Stop, moe_run, stop_at

DATA = {"hash": "0", "tokenizer": "bytes"}


def test_rows_are_at_the_first_step_and_at_evaluations_and_no_other_step_measures(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = diagnostics.measure
    monkeypatch.setattr(diagnostics, "measure", lambda routing: measured.append(1) or measure(routing))
    run, store = moe_run(corpus), Store(tmp_path)
    train(run, store, corpus)
    rows = store.metrics(run.key)
    assert [row["step"] for row in rows if "routers" in row] == [1, 10, 20, STEPS]
    assert len(measured) == 2 * 4  # blocks × rows
    assert all(len(row["load"]) == 2 for row in rows)
    last = rows[-1]["routers"][0]
    assert last["active"] == 2 and last["m1"] == pytest.approx(1, abs=1e-5) and last["F"] >= 1 - 1e-5
    assert last["share"] == pytest.approx([2 * share for share in rows[-1]["load"][0]], abs=2e-5)


def test_the_file_is_of_the_last_batch(tmp_path: Path, corpus: Corpus) -> None:
    """Counts of the last training batch, as its routing had them, and cosines of the weights after the step."""
    run, kept = moe_run(corpus), []
    with TrainingSession(run, tmp_path, corpus) as session:
        record = session.record
        session.record = lambda norm, routings, held: (kept.append(routings), record(norm, routings, held))[1]  # type: ignore[method-assign]
        while session.status is None:
            session.train_step()
        session.end()
        batch = session.batches.at(STEPS - 1)[0].flatten().tolist()
        down = session.model.state_dict()["blocks.0.moe.experts_down"].double().flatten(1)
    found = json.loads((tmp_path / "routers.json").read_text())
    assert (found["key"], found["step"], found["tokens"]) == (run.key, STEPS, 128)
    layer, routing = found["layers"][0], kept[-1][0]
    pairs = list(zip(routing.token_P.tolist(), routing.expert_P.tolist(), strict=True))
    letters = {b for b in range(256) if chr(b).isascii() and chr(b).isalpha()}
    assert found["class_tokens"][0] == sum(b in letters for b in batch) > 0 and sum(found["class_tokens"]) == 128
    assert layer["specialisation"][0] == [sum(e == n and batch[t] in letters for t, e in pairs) for n in range(8)]
    assert [layer["coactivation"][n][n] for n in range(8)] == [sum(e == n for _, e in pairs) for n in range(8)]
    assert layer["active_counts"] == [0, 0, 128] and layer["absent"] == {} and found["classes"] == list(BYTE_CLASSES)
    cosine = torch.nn.functional.cosine_similarity(down[:, None], down[None], dim=-1)
    torch.testing.assert_close(torch.tensor(layer["overlap"]).double(), cosine, rtol=0, atol=6e-4)


@pytest.mark.parametrize("stop", [2, 12, 22])
def test_a_resumed_run_keeps_its_rows_and_ends_with_the_same_file(tmp_path: Path, corpus: Corpus, stop: int) -> None:
    run = moe_run(corpus)
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    train(run, whole, corpus)
    with pytest.raises(Stop):
        train(run, broken, corpus, progress=stop_at(stop), checkpoint_seconds=0)
    assert broken.routers(run.key) is None  # matrices are of a run that has ended
    train(run, broken, corpus)
    for name in ("metrics.jsonl", "routers.json"):
        assert (whole.folder(run.key) / name).read_bytes() == (broken.folder(run.key) / name).read_bytes(), name


def test_a_full_disk_leaves_no_half_file_and_no_result(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = moe_run(corpus), Store(tmp_path)

    def full(record: RouterRecord, folder: Path) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(RouterRecord, "write", full)
        with pytest.raises(OSError, match="no space"):
            train(run, store, corpus)
    assert store.result(run.key) is None and store.routers(run.key) is None
    train(run, store, corpus)
    assert store.routers(run.key) is not None


def test_a_damaged_file_is_named(tmp_path: Path, corpus: Corpus) -> None:
    run, store = moe_run(corpus), Store(tmp_path)
    train(run, store, corpus)
    (store.folder(run.key) / "routers.json").write_text("{")
    with pytest.raises(ValueError, match=r"routers\.json is damaged .*: remove it"):
        store.routers(run.key)


class _Blind(LanguageTask):
    def tokens(self, batch: Any) -> None:
        return None


class _Short(LanguageTask):
    def tokens(self, batch: Any) -> torch.Tensor:
        return batch[0][:, :1]


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"task": _Blind()}, "specialisation", "does not say which tokens"),
        ({"task": _Short()}, "specialisation", "another number of tokens"),
        ({"tokenizer": "sha256:0"}, "specialisation", "tokens are not bytes"),
        ({"layers": 1}, "overlap", "1 blocks with a router and returns 2 routings"),
        ({"down": None}, "overlap", "does not hold one down projection"),
        ({"scores": None}, "entropy", "has no scores"),
    ],
)
def test_what_cannot_be_seen_is_said(
    tmp_path: Path, corpus: Corpus, change: dict[str, Any], name: str, reason: str
) -> None:
    run = moe_run(corpus)
    run = replace(run, data={**run.data, "tokenizer": change.get("tokenizer", run.data["tokenizer"])})
    with TrainingSession(run, tmp_path, corpus) as session:
        layers = session.moe_layers[: change.get("layers", 2)]
        batch = session.batches.at(0)
        routings: list[Routing] = session.task.loss(session.model, batch).routings
        if "down" in change:
            layers[0].experts_down = None
        if "scores" in change:
            routings[0].scores_TN = None
        record = RouterRecord(run, change.get("task", session.task), session.batches, layers)
        row = record.row(routings, 1, evaluated=True, last=True)
        record.write(tmp_path)
    found = json.loads((tmp_path / "routers.json").read_text())["layers"][0]
    assert list(found["absent"]) == [name] and reason in found["absent"][name]
    assert (row["routers"][0]["entropy"] is None) if name == "entropy" else found[name] is None


def test_a_dense_run_has_neither_rows_nor_file(tmp_path: Path, corpus: Corpus) -> None:
    assert (
        session_module.RouterRecord(moe_run(corpus), LanguageTask(), None, []).row([], 1, evaluated=True, last=True)
        == {}
    )  # type: ignore[arg-type]


EXPERTS = {"thor": "8e1a"}  # what the others can have, it cannot


@pytest.mark.parametrize("router", list(ROUTER_CLASSES))
def test_every_router_is_measured_and_its_numbers_agree(router: str) -> None:
    """Ragged, dropped, drawn or chosen by experts: counts fit together, and everything is JSON without NaN."""
    shape: dict[str, Any] = {
        "width": 32,
        "layers": 2,
        "head_dim": 16,
        "sequence": 32,
        "training": {"batch": 128, "steps": 20},
    }
    target = {**shape, "moe": EXPERTS.get(router, "8e2a"), "expert": 16, "router": router}
    tuned = {"lr": 0.01, "weight_decay": 0.1, "init_std": 0.1}
    run = Run(plan_of(plan_inputs({"base": {**shape, "ffn": 32}, "tuned": tuned, "target": target})), SETTINGS, DATA)
    task, tokens = task_of(run.settings), torch.randint(256, (4, 32))
    model = task.build(run.plan, run.settings)
    init_(run.plan, model, 0)
    batches: Any = SimpleNamespace(at=lambda step: (tokens, tokens))
    record = RouterRecord(run, task, batches, moe_layers(model))
    row = record.row(task.loss(model, (tokens, tokens)).routings, 1, evaluated=True, last=True)
    assert json.loads(json.dumps([row, record.at_end], allow_nan=False)) and record.at_end is not None
    for seen, layer in zip(row["routers"], record.at_end["layers"], strict=True):
        experts = [layer["coactivation"][n][n] for n in range(8)]
        assert sum(seen["share"]) == pytest.approx(seen["active"], rel=1e-4) and seen["m2"] > 0 and seen["m1"] > 0
        assert experts == pytest.approx([128 * share for share in seen["share"]], rel=1e-4)
        assert experts == [sum(column) for column in zip(*layer["specialisation"], strict=True)]
        assert sum(layer["active_counts"]) == 128 and layer["active_counts"][0] == pytest.approx(
            128 * seen["idle"], rel=1e-4
        )
        assert sum(n * tokens for n, tokens in enumerate(layer["active_counts"])) == sum(experts)
        known = seen["entropy"] is not None
        assert (
            list(layer["absent"]) == ([] if known else ["entropy"])
            and known == run.plan.target.blocks[0].router_kind.matrix
        )
        assert not known or 0 <= seen["entropy"] <= math.log(8) + 1e-5
        assert all(row[n] == 1 for n, row in enumerate(layer["overlap"]))
