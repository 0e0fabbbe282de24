"""Plans for an optimizer, between shapes and runs that most rules have an answer for."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

import mue
from support.rule_properties import TUNED

few = settings(max_examples=12, deadline=None)
RUN = mue.Training(batch=1 << 16, steps=4_000)
LONG = mue.Training(batch=1 << 17, steps=9_000)
DENSE = mue.Dense(width=128, ffn=256, layers=4)
WIDE = mue.Dense(width=512, ffn=512, layers=8)
SPARSE = mue.MoE.parse("64e8a1s", width=512, expert=128, layers=8)


def at(optimizer: str, target: Any = WIDE, rule: str = "complete-mue", **options: Any) -> mue.Plan:
    return mue.transfer(DENSE, target, TUNED.replace(optimizer=optimizer), rule=rule, **options)
