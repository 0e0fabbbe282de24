"""A study trained: interrupted, gone on with, joined from two machines, reported."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from mue.lab.data.spec import describe_data, open_corpus, open_data
from mue.lab.study.report import study_report
from mue.lab.study.rows import StudyFolder
from mue.lab.study.run import run_study
from mue.lab.study.schedule import Schedule
from mue.lab.study.spec import StudySpec, study_from
from support.command_line import in_process
from support.study import DATA, STUDY, row, study

SHORT = (
    STUDY.replace("seeds = [0, 1]", "seeds = [0]")
    .replace("multipliers = [0.5, 1, 2]\nreach = 4", "multipliers = [1]\nreach = 1")
    .replace("steps = 20", "steps = 6")
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return tmp_path


def read(at: Path) -> StudySpec:
    return study_from(tomllib.loads(SHORT), at)


def test_interrupted_and_gone_on_with(texts: Path) -> None:
    spec = read(texts)
    data, folder = describe_data(spec.source, open_corpus(spec.source)), StudyFolder(texts / "out")
    width, everything = Schedule(spec.on(("width",)), data), Schedule(spec, data)
    assert run_study(width, folder, workers=1, keep_weights=True) == 0
    assert len(list(texts.glob("out/runs/*/model.safetensors"))) == 4
    first = (texts / "out" / "rows.jsonl").read_bytes()
    assert len(first.splitlines()) == 4  # the base, and three approaches on the wider one
    # killed in the middle of a row: that row is lost and its run is not, for its result lies in its folder
    (texts / "out" / "rows.jsonl").write_bytes(first[:-40])
    assert run_study(width, folder, workers=1) == 0
    assert {k: r["val_loss"] for k, r in folder.rows().items()} == {
        r["key"]: r["val_loss"] for r in map(json.loads, first.decode().splitlines())
    }
    # no time left: nothing is begun, and what is left is counted
    assert run_study(everything, folder, workers=1, minutes=0) == 1
    page = study_report(texts / "out").read_text(encoding="utf-8")
    assert "refused: " in page and "no valley yet" in page
    results = json.loads((texts / "out" / "study-results.json").read_text())
    wide = next(
        c for c in results["cells"] if c["axis"] == "width" and c["target"] != "base" and c["approach"] == "standard"
    )
    assert wide["losses"]["1"]["0"] == pytest.approx(wide["transferred"]) and wide["drift"] is None


def test_rows_of_two_machines_are_one_study(tmp_path: Path) -> None:
    spec = study()
    runs = Schedule(spec, DATA).missing({})
    folders = [StudyFolder(tmp_path / name) for name in "ab"]
    for i, folder in enumerate(folders):
        folder.begin(spec, DATA)
        folder._append(row(p, 2.0) for p in runs[i::2] + runs[:1])
    folders[0].merge([folders[1].root])
    assert set(folders[0].rows()) == {p.run.key for p in runs}
    assert folders[0].merge([folders[1].root]) == 0
    other = StudyFolder(tmp_path / "c")
    other.begin(spec, {**DATA, "hash": "1" * 64})
    with pytest.raises(ValueError, match="other data"):
        folders[0].merge([other.root])
    with pytest.raises(ValueError, match="never mixed"):
        folders[0].begin(spec, {**DATA, "hash": "1" * 64})


def test_the_command(texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (texts / "study.toml").write_text(SHORT)
    code, out, _ = in_process(capsys, monkeypatch, "study", texts / "study.toml", "-o", texts / "o", "--dry-run")
    assert code == 0 and "5 runs to train (0 done)" in " ".join(out.split()) and not (texts / "o").exists()
    assert "mup has no answer" in " ".join(out.split())
    code, _, err = in_process(capsys, monkeypatch, "study", "report", texts / "o")
    assert code == 2 and "holds no study" in " ".join(err.split())
    code, _, err = in_process(capsys, monkeypatch, "study", texts / "study.toml", "--axis", "depth")
    assert code == 2 and "no axis 'depth'" in " ".join(err.split())


def test_a_comparison_with_a_diverged_seed_is_named(tmp_path: Path) -> None:
    folder, spec = StudyFolder(tmp_path), study()
    folder.begin(spec, DATA)
    runs = Schedule(spec, DATA).missing({})
    lost = "standard on width: width 64, ffn 64"
    folder._append(
        row(p, None if p.name.startswith("width: width 64, ffn 64, standard") else 2.0 + p.seed) for p in runs
    )
    assert f"so not compared: {lost}" in study_report(tmp_path).read_text(encoding="utf-8")


def test_a_study_on_images_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    image = "image = { size = 8, channels = 1, patch = 2, classes = 10 }"
    text = (
        f'data = {{ source = "digits" }}\nrun = {{ task = "diffusion", eval_sequences = 8 }}\nbase = {{ width = 16, ffn = 16, layers = 1, head_dim = 8, {image}, training = {{ batch = 64, steps = 2 }} }}\n'
        "tuned = { lr = 0.01, weight_decay = 0.0, init_std = 0.05, clip = 1 }\nstudy = { seeds = [0], multipliers = [1], reach = 1 }\n"
        "approaches = { complete-mue = {} }\naxes = { width = { targets = [{ width = 32 }] } }\n"
    )
    spec = study_from(tomllib.loads(text), tmp_path)
    data = open_data(spec.source)
    schedule, folder = Schedule(spec, describe_data(spec.source, data)), StudyFolder(tmp_path / "out")
    assert run_study(schedule, folder, workers=1) == 0
    page = study_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "images of 8 × 8" in page and "squared error per pixel" in page and "nats" not in page
