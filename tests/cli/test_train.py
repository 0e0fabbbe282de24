"""``mue train``: the files it leaves, and their report."""

from __future__ import annotations

from pathlib import Path

import mue
from support.command_line import run


def test_train_and_report(experiment: Path, tmp_path: Path) -> None:
    experiment.write_text(
        experiment.read_text().partition("[sweep]")[0] + "[tuned]\nlr = 0.01\nweight_decay = 0.1\ninit_std = 0.1\n"
    )
    out = tmp_path / "trained"
    done = run("train", experiment, "--out", out)
    assert done.returncode == 0, done.stderr
    folder = next(out.glob("runs/*"))
    for name in ("model.safetensors", "metrics.jsonl", "report.html", "plan.json", "result.json"):
        assert (folder / name).exists(), name
    mue.Plan.load(folder / "plan.json")
    (folder / "report.html").unlink()
    assert run("report", folder).returncode == 0
    assert (folder / "report.html").exists()
