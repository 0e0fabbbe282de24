"""Exports: golden files, and the written code giving exactly our groups and starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import mue
from mue.apply import param_groups
from mue.export import STACKS, export, rows
from mue.fold import fold
from mue.lab.model import LanguageModel
from mue.roles import place

GOLDEN = Path(__file__).parent / "golden"
BASE = mue.Dense(width=32, ffn=32, layers=1, head_dim=16, vocab=64)
TARGET = mue.Mixed(
    64, (mue.Block(layers=1, ffn=128), mue.Block(layers=2, experts=8, active=2, expert=32)), head_dim=16, vocab=64
)
PLAN = mue.transfer(BASE, TARGET, mue.HParams(lr=2**-9, weight_decay=0.125, init_std=2**-6, eps=2**-40))


def model() -> LanguageModel:
    """With no multipliers, as any stack's own model."""
    return LanguageModel(TARGET, fold(PLAN).multipliers)


def written(to: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(export(PLAN, to, model()), namespace)
    return namespace


@pytest.mark.parametrize("to", STACKS)
def test_the_files_are_the_golden_ones(to: str) -> None:
    text = export(PLAN, to, model()).replace(fold(PLAN).hash, "HASH")
    path = GOLDEN / f"{to}.{'yaml' if to == 'automodel' else 'py.txt'}"
    if os.environ.get("MUE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_the_written_groups_are_ours() -> None:
    net = model()
    ours, theirs = param_groups(fold(PLAN), net), written("torch")["param_groups"](net)

    def keyed(groups: list[dict[str, Any]]) -> dict[tuple[float, ...], set[int]]:
        return {(g["lr"], g["weight_decay"], g["eps"], *g["betas"]): {id(p) for p in g["params"]} for g in groups}

    assert keyed(ours) == keyed(theirs)
    torch.optim.AdamW(theirs)


def test_the_written_init_has_our_standard_deviations() -> None:
    net = model()
    written("torch")["init_"](net, seed=3)
    for p in place(net):
        std = fold(PLAN).role(p.role, p.layer).values.init_std
        if std is None:
            assert torch.equal(p.parameter, torch.ones_like(p.parameter))
        else:
            assert float(p.parameter.detach().std()) == pytest.approx(std, rel=0.1)


def test_the_written_code_refuses_another_model() -> None:
    code = written("torch")
    with pytest.raises(ValueError, match="rows match nothing"):
        code["param_groups"](LanguageModel(mue.Dense(width=64, ffn=128, layers=3, head_dim=16, vocab=64)))
    net = model()
    net.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight matches 0 rows"):
        code["param_groups"](net)


def test_the_written_code_sees_through_wrappers() -> None:
    wrapped = torch.compile(model())
    assert len(written("torch")["param_groups"](wrapped)) == len(param_groups(fold(PLAN), model()))


def test_a_trainer_gets_an_optimizer_and_a_relative_schedule() -> None:
    net = model()
    optimizer, schedule = written("transformers")["trainer_arguments"](net, lambda step: 0.5)["optimizers"]
    assert all(g["lr"] == pytest.approx(0.5 * g["initial_lr"]) for g in optimizer.param_groups)
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)


def test_layers_that_differ_are_listed() -> None:
    found = rows(fold(PLAN), model())
    assert any("experts_down" in r.pattern for r in found)
    assert all(r.std is not None or r.constant is not None for r in found)


def test_unknown_stacks_and_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown stack 'torhc'; did you mean 'torch'"):
        export(PLAN, "torhc", model())
    lion = mue.transfer(BASE, TARGET, mue.HParams(lr=1e-4, weight_decay=0.1, init_std=0.02, optimizer="lion"))
    with pytest.raises(ValueError, match="exports speak AdamW"):
        export(lion, "torch", LanguageModel(TARGET, fold(lion).multipliers))
