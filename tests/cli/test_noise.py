"""``mue noise``: a line for a plan, JSON, and one line for data that have changed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from mue.lab.trained.noise_scale import NoiseScale
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
    # no upper end is said, and JSON has no infinity for it
    for high, said in ((math.inf, "(1,000 to no upper end)"), (1e300, "(1,000 to 1e+300)")):
        found = NoiseScale(2000.0, 1000.0, high, 1.0, 1.0, 768)
        monkeypatch.setattr("mue.lab.trained.noise_scale.of_run", lambda *_, found=found: found)
        assert said in in_process(capsys, monkeypatch, "noise", run)[1]
        out = in_process(capsys, monkeypatch, "noise", run, "--json")[1]
        assert "Infinity" not in out
        assert json.loads(out)["noise_scale"] == [2000.0, 1000.0, None if high == math.inf else high]
    (data / "more.txt").write_text("more text than it was trained on")
    refused(in_process(capsys, monkeypatch, "noise", run), "have changed since its training")
