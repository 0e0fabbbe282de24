"""Two claims in small, on a base that trains in seconds, and rows for them as if their runs had been trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claims.spec import Claims

BASE = """
[data]
source = "texts"
[base]
width = 32
ffn = 32
layers = 1
head_dim = 16
sequence = 32
[base.training]
batch = 256
steps = 10
[tuned]
lr = 0.008
weight_decay = 0.1
init_std = 0.1
[run]
eval_sequences = 8
eval_every = 2
log_every = 2
"""
GROUP = """
[arms.a]
target = { moe = "4e2a", expert = 16, router = "softmax" }
[arms.b]
target = { moe = "4e2a", expert = 16 }
[arms.worse]
target = { moe = "4e2a", expert = 16 }
steps = 4
[claims.better]
router = "softmax"
source = "2101.03961"
claim = "softmax is not above sigmoid"
seeds = [0, 1, 2]
effect = -0.05
half_width = 0.02
checks = [{ of = "a.loss", minus = "b.loss", below = 0.01 }]
controls = [{ of = "worse.loss", minus = "b.loss", above = 0.01 }]
[claims.alone]
router = "softmax"
source = "ours"
claim = "a number by itself"
seeds = [0, 1, 2]
effect = 0
half_width = 1
checks = [{ of = "a.loss", within = 1 }, { of = "a.loss", apart = 1 }]
controls = [{ of = "a.loss", below = 100 }]
"""


def claims_folder(folder: Path, group: str = GROUP) -> Path:
    """A folder of claims' files with one group, called "group"."""
    (folder / "claims").mkdir(parents=True, exist_ok=True)
    (folder / "claims" / "group.toml").write_text(group, encoding="utf-8")
    return folder / "claims"


def rows_of(claims: Claims, losses: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Rows of arms with these losses for the seeds 0, 1, ..., by identity."""
    return {
        claims.arms["group", arm].identity(seed): {"seen": {"loss": loss}}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    }
