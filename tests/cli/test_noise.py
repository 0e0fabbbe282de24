"""``mue noise``: a line for a plan, JSON, and one line for data that have changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mue.plan.toml import read_toml, training_from
from support.command_line import in_process, refused
from support.trained import moe_run_of_bytes


def test_a_noise_scale_as_a_line_for_a_plan_and_as_json(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "texts"
    shutil.copytree(texts, data)
    run = moe_run_of_bytes(data, tmp_path / "out")
    before = sorted(p.name for p in run.iterdir())
    code, out, err = in_process(capsys, monkeypatch, "noise", run, "--batches", "3")
    assert code == 0, err
    line = out[out.index("training = {") :]
    (tmp_path / "base.toml").write_text(line)
    planned = training_from(read_toml(tmp_path / "base.toml"), "base")
    code, out, err = in_process(capsys, monkeypatch, "noise", run, "--batches", "3", "--json")
    value, low, high = json.loads(out)["noise_scale"]
    assert planned is not None and planned.critical_batch == round(value) and low < value < high
    assert (planned.batch, planned.steps) == (256, 20) and json.loads(out)["tokens_read"] == 3 * 256
    assert sorted(p.name for p in run.iterdir()) == before  # nothing is left
    (data / "more.txt").write_text("more text than it was trained on")
    refused(in_process(capsys, monkeypatch, "noise", run), "have changed since its training")
