"""A plan whose numbers can be changed one by one: a base of 128, a hybrid of twice the width, four times as many steps."""

from __future__ import annotations

from typing import Any

import mue

BASE = mue.Dense(width=128, ffn=128, layers=8)
TARGET = mue.MoE.parse("16e4a1s", width=256, expert=64, layers=8)
TUNED = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01)
RUNS: dict[str, Any] = {"base_training": mue.Training(1 << 16, 5000), "training": mue.Training(1 << 16, 20000)}


def make(**changes: Any) -> mue.Plan:
    numbers: dict[str, Any] = {"base": BASE, "target": TARGET, "tuned": TUNED, **RUNS, **changes}
    return mue.transfer(numbers.pop("base"), numbers.pop("target"), numbers.pop("tuned"), **numbers)
