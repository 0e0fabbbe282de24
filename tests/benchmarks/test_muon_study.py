"""The study of Muon from dense to MoE, and the sweep of its base: files that say what they are meant to train."""

from __future__ import annotations

from pathlib import Path

from mue.lab.study.spec import study_from
from mue.lab.sweep.spec import sweep_from
from mue.plan.toml import read_toml

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


def test_every_target_has_a_plan_for_muon() -> None:
    study = study_from(read_toml(STUDIES / "muon.toml"), STUDIES)
    assert study.tuned.optimizer == "muon" and study.tuned.adamw_lr
    base = sweep_from(read_toml(STUDIES / "muon_base.toml"), STUDIES)
    assert base.base == study.base and base.training == study.training
    assert len(base.grid.adamw_lr) * len(base.grid.lr) * len(base.grid.seeds) == 40
