"""A study in small, and rows for it as if its runs had been trained."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mue.lab.study.schedule import Planned, Schedule
from mue.lab.study.spec import StudySpec, study_from

STUDY = """
[data]
source = "texts"
[base]
width = 32
ffn = 32
layers = 1
head_dim = 16
sequence = 32
[base.training]
batch = 64
steps = 20
[tuned]
lr = 0.008
weight_decay = 0.1
init_std = 0.1
[run]
eval_sequences = 8
eval_every = 4
[study]
seeds = [0, 1]
multipliers = [0.5, 1, 2]
reach = 4
[approaches.complete-mue]
[approaches.standard]
[approaches.mup]
[approaches.step-law]
rule = "standard"
law = "step-law"
multipliers = [1]
[axes.width]
targets = [{ width = 64, ffn = 64, approaches = ["complete-mue", "standard", "step-law"] }]
[axes.experts]
approaches = ["complete-mue", "mup"]
targets = [{ moe = "4e2a", expert = 32 }]
"""
DATA = {"hash": "0" * 64, "bytes": 1000, "files": 1}


def study(text: str = STUDY, **replaced: str) -> StudySpec:
    """The study, with words of its file replaced."""
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    return study_from(tomllib.loads(text), Path("/somewhere"))


def row(planned: Planned, loss: float | None) -> dict[str, Any]:
    """The row of a run that ended with this loss, None if it diverged."""
    steps = planned.cell.target.training.steps
    # falls by 0.1 nats while the steps grow e-fold, up to where the decay begins
    curve = [[step, 3.0 - 0.1 * math.log(step / steps)] for step in (0.4 * steps, 0.8 * steps, steps)]
    return {
        "key": planned.run.key, "val_loss": loss, "seed": planned.seed, "curve": curve, "seconds": 1.0, "threads": 1
    }  # fmt: skip


def trained(schedule: Schedule, loss: Callable[[Planned], float | None]) -> dict[str, dict[str, Any]]:
    """Rows of all runs that the schedule asks for until it asks for none."""
    rows: dict[str, dict[str, Any]] = {}
    while missing := schedule.missing(rows):
        rows |= {p.run.key: row(p, loss(p)) for p in missing}
    return rows
