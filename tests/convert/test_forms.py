"""What a conversion knows of a model beside its planned parameters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import nn

import mue
from mue.convert.forms import conversion
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout


class Adapted(LanguageModel):
    """The planned model with a matrix beside it that nothing plans."""

    def __init__(self, plan: mue.Plan) -> None:
        super().__init__(plan.target, plan.multipliers)
        self.adapter = nn.Linear(4, 4)

    def layout(self) -> Sequence[Layout]:
        return [*super().layout(), Layout("adapter.*", "unplanned")]


def test_what_is_not_planned_travels_as_it_is() -> None:
    base, target = (mue.Dense(d, d, 2, head_dim=16) for d in (32, 64))
    plan = mue.transfer(base, target, mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.05))
    made = conversion(plan, "folded", Adapted(plan))
    assert made.change("adapter.weight") is None and made.change("adapter.bias") is None
    head = made.change("head.weight")
    assert head is not None and head.ratio == 0.5
    with pytest.raises(ValueError, match="other is in the checkpoint and not in the planned model"):
        made.change("other")
