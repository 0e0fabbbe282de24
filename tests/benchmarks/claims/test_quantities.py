"""Quantities: those of metrics against hand-made rows, those of models on runs of seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mue
from claims.quantities import QUANTITIES, Trained, measure
from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import train
from mue.moe import Routing
from mue.shapes import Transformer

BASE = mue.Dense(32, 32, 1, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1)
SETTINGS = Settings(eval_every=2, eval_sequences=8, log_every=2)
OWN = {"head_dim": 16, "sequence": 32, "layers": 1, "width": 32, "expert": 16}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Corpus]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog; 0123456789\n" * 300)
    source = {"source": [str(folder / "a.txt")], "cache": str(folder / "cache")}
    return source, open_corpus(source)


def a_run(
    target: Transformer, text: tuple[dict[str, Any], Corpus], steps: int = 4, settings: Settings = SETTINGS
) -> Run:
    training = mue.Training(256, steps)
    plan = mue.transfer(BASE, target, TUNED, base_training=training, training=training)
    return Run(plan, settings, describe_data(*text))


def trained(tmp_path: Path, text: tuple[dict[str, Any], Corpus], moe: str, **more: Any) -> Trained:
    settings = more.pop("settings", SETTINGS)
    run, store = a_run(mue.MoE.parse(moe, **OWN, **more), text, settings=settings), Store(tmp_path)
    return Trained(run, train(run, store, text[1], keep_weights=True), store, text[1])


def of(trained: Trained, *names: str) -> list[float | None]:
    return list(map(measure(trained, frozenset(names)).get, names))


@pytest.fixture
def made_up(tmp_path: Path, text: tuple[dict[str, Any], Corpus]) -> Trained:
    """Two layers over 300 steps, measured in the first and in every hundredth; their last 100 steps are one row."""
    run, store = a_run(mue.MoE.parse("4e2a", **{**OWN, "layers": 2}), text), Store(tmp_path)
    folder = store.folder(run.key)
    folder.mkdir(parents=True)
    rows = []
    for step, active, vio, share in (
        (1, 3.5, 2.0, [0.5, 0.5, 0.5, 0.5]),
        (100, 2.4, 0.5, [0.5, 0.5, 0.5, 0.5]),
        (200, 2.2, 0.4, [0.5, 0.5, 0.5, 0.5]),
        (300, 2.0, 0.1, [0.9, 0.1, 0.5, 0.5]),
    ):
        first = {"active": active, "max_vio": vio, "idle": 0.0, "share": share}
        second = {"active": active + 0.2, "max_vio": 2 * vio, "idle": 0.03, "share": share[:2][::-1] + share[2:]}
        rows.append(json.dumps({"step": step, "routers": [first, second]}))
    rows.insert(2, json.dumps({"step": 150, "loss": 1.0}))  # a step that was not evaluated
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return Trained(run, {"val_loss": 1.25}, store, text[1])


def test_numbers_of_metrics(made_up: Trained) -> None:
    assert of(made_up, "loss", "active", "active_at_init", "active_off") == [1.25, 2.1, 3.6, 0.1]
    assert of(made_up, "active_spread") == [pytest.approx(np.std([2.5, 2.3, 2.1]), rel=1e-5)]
    assert of(made_up, "max_vio", "max_vio_ever", "idle") == [0.2, 4.0, 0.03]
    # each layer prefers what the other does not: uneven in layers, even in the pool
    uneven = np.std([0.9, 0.1, 0.5, 0.5]) / 0.5
    assert of(made_up, "layer_unevenness", "pool_unevenness") == [pytest.approx(uneven, rel=1e-5), 0.0]


def test_a_run_that_diverged_has_nothing(made_up: Trained) -> None:
    gone = replace(made_up, result={"val_loss": None})
    assert set(measure(gone, frozenset(name for name, q in QUANTITIES.items() if not q.numbered)).values()) == {None}


def test_the_trained_number_of_experts_is_the_validation_loss(tmp_path: Path, text: Any) -> None:
    one = trained(tmp_path, text, "8e2a", router="elastic", router_settings={"pool": 4})
    loss, same, fewer, more = of(one, "loss", "loss_at@2", "loss_at@1", "loss_at@6")
    assert same == pytest.approx(loss, abs=2e-5)
    assert fewer != same and more != same
    for file in tmp_path.rglob("model.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="weights"):
        of(one, "loss_at@2")


def test_a_controller_takes_a_disturbance_back_and_one_without_gain_does_not(tmp_path: Path, text: Any) -> None:
    held = trained(tmp_path, text, "8e2a", router="dtop-p")
    undisturbed, back, of_weight, shift = of(
        held, "recovery@1", "recovery@2", "recovery_of_weight@2", "shift_of_weight@2"
    )
    assert back is not None and undisturbed is not None and of_weight is not None
    assert 0 < back <= 60 and undisturbed < back and of_weight <= undisturbed + 1
    assert shift == pytest.approx(0, abs=0.02)  # standardised logits have no scale
    assert of(held, "theta@0")[0] == pytest.approx(1, abs=0.1)
    dead = trained(tmp_path, text, "8e2a", router="dtop-p", router_settings={"proportional": 0.0, "integral": 0.0})
    assert of(dead, "recovery@2") == [None]
    loose = trained(tmp_path, text, "8e2a", router="top-p", router_settings={"p": 0.3, "renormalise": True})
    assert of(loose, "shift_of_weight@2")[0] > 0.1  # type: ignore[operator]


def test_harder_tokens_can_have_more_experts_under_top_p_alone(tmp_path: Path, text: Any) -> None:
    assert of(trained(tmp_path, text, "8e2a"), "harder_tokens") == [0.0]
    (more,) = of(trained(tmp_path, text, "8e2a", router="top-p"), "harder_tokens")
    assert more is not None and more != 0.0


@pytest.mark.parametrize("sign", [1, -1])
def test_more_experts_for_harder_tokens_are_a_positive_number(sign: int) -> None:
    """Four tokens of which the last two are predicted wrongly; three experts for these and one for the others, or the other way round."""
    counts = [1, 1, 3, 3][::sign]
    expert_TK = torch.tensor([[i if i < n else 4 for i in range(3)] for n in counts])
    routing = Routing.from_topk(expert_TK, (expert_TK < 4).float(), 4)
    logits = 5.0 * torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 1]]), 2).float()
    stub = SimpleNamespace(
        model=lambda: lambda tokens, following: SimpleNamespace(logits=logits, routings=[routing]),
        batches=SimpleNamespace(validation=lambda: [(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.int64))]),
    )
    assert QUANTITIES["harder_tokens"].of(stub) == 2.0 * sign


def test_two_draws_disagree_where_there_are_draws(tmp_path: Path, text: Any) -> None:
    thor = trained(tmp_path, text, "4e1a", router="thor", settings=replace(SETTINGS, consistency=5.0))
    apart, variance, before = of(thor, "disagreement", "draw_variance", "disagreement_at_init")
    assert apart is not None and variance is not None and before is not None
    assert apart > 0 and variance > 0 and before > 0
    fixed = trained(tmp_path, text, "4e2a", router="hash")
    assert of(fixed, "disagreement", "draw_variance", "disagreement_at_init") == [0.0, 0.0, 0.0]
