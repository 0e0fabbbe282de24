"""Clipping that cannot be measured is warned of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mue
from mue.checks import CheckError
from mue.lab.models.language import LanguageModel
from support.wiring_cases import BASE, OURS, TUNED


def test_clipping_is_warned_of_where_it_cannot_be_measured(tmp_path: Path) -> None:
    from mue.fold import fold

    shape = OURS["mue hybrid"]
    plan = fold(mue.transfer(BASE, shape, TUNED.replace(clip=1.0)))
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (2, 16))
    assert [f.check for f in mue.check(model, plan, (tokens, tokens)).warnings] == ["clipping"]
    plain = lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # noqa: E731
    with pytest.raises(CheckError, match="the norm is that of the folded gradients"):
        mue.check(model, plan, (tokens, tokens), clip=plain)
