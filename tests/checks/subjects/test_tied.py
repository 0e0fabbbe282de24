"""Head and embedding: what this check says and what coverage says is the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mue
from mue.lab.models.language import LanguageModel
from support.wiring.case import BASE, TUNED


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fault", ["", "alias", "copy", "apart"])
def test_the_head_is_the_embedding_exactly_where_planned(tied: bool, fault: str) -> None:
    shape = mue.Dense(width=64, ffn=64, layers=2, head_dim=16, sequence=32, vocab=96, tied=tied)
    plan = mue.transfer(BASE, shape, TUNED)
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    if fault == "alias":
        model.head = nn.Linear(64, 96, bias=False)
        model.head.weight = model.embedding.weight
    elif fault:
        model.head = nn.Linear(64, 96, bias=False)
        if fault == "copy":
            with torch.no_grad():
                model.head.weight.copy_(model.embedding.weight)
    if tied and fault:
        rows = [r for r in LanguageModel.layout(model) if r.pattern != "head.weight"]
        rows.append(mue.Layout("head.weight", "head", ("out", "in")))
        model.layout = lambda: rows  # type: ignore[method-assign]
    report = mue.check(model, plan, only=["tied weights"], raises=False)
    right = fault in (("", "alias") if tied else ("", "apart"))
    assert report.ok is right, report
    if not right:
        (found,) = report.failures
        wanted = {
            "alias": "the head is the embedding (head.weight)",
            "copy": "a copy of it",
            "apart": "a tensor of its own",
        }
        assert found.measured == wanted[fault] and ("embedding.weight" in found.expected), found
