"""``mue report`` of whatever ``mue train -o`` wrote, and of what is no run and no sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mue.lab.data import Corpus, load_corpus
from mue.lab.train.run import Settings, Store
from mue.lab.train.session import train
from support.command_line import in_process, refused
from support.small_run import SETTINGS, TUNED, Stop, moe_run, stop_at


@pytest.fixture
def corpus(texts: Path, tmp_path: Path) -> Corpus:
    return load_corpus(texts, cache=tmp_path / "cache")


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    refused(in_process(capsys, monkeypatch, "report", tmp_path), "neither")


def test_one_run_several_runs_and_those_that_have_not_ended(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, out = Store(tmp_path / "g1"), tmp_path / "g1"
    first, second, third = (moe_run(corpus, Settings(**{**vars(SETTINGS), "seed": i}), steps=8) for i in range(3))

    def page() -> Path:
        code, told, err = in_process(capsys, monkeypatch, "report", out)
        assert code == 0, err
        return Path(told.removeprefix("report: ").strip())

    with pytest.raises(Stop):
        train(first, store, corpus, progress=stop_at(4))
    refused(in_process(capsys, monkeypatch, "report", out), "none of the 1 runs", "has ended")
    train(first, store, corpus)
    assert page() == store.folder(first.key) / "report.html"
    assert not (out / "report.html").exists()
    train(second, store, corpus)
    with pytest.raises(Stop):
        train(third, store, corpus, progress=stop_at(4))
    assert page() == out / "report.html"
    written = (out / "report.html").read_text(encoding="utf-8")
    for words in ("2 training runs", "seed 0", "seed 1", first.key, second.key, f"left out: {third.key}"):
        assert words in written
    assert (out / "loss.png").exists() and (store.folder(second.key) / "report.html").exists()


def test_a_run_that_diverged_at_once_is_reported(corpus: Corpus, tmp_path: Path) -> None:
    from mue.lab.report.runs import folder_report

    run, store = moe_run(corpus, steps=8), Store(tmp_path)
    train(run, store, corpus)
    result = json.loads((store.folder(run.key) / "result.json").read_text())
    (store.folder(run.key) / "result.json").write_text(json.dumps({**result, "val_loss": None, "status": "diverged"}))
    (store.folder(run.key) / "metrics.jsonl").write_text("")
    assert "diverged" in folder_report(tmp_path).read_text(encoding="utf-8")


def test_several_folders_are_compared(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store and one run of another, which is in both."""
    runs = [moe_run(corpus, steps=4), moe_run(corpus, Settings(**{**vars(SETTINGS), "seed": 1}), steps=4)]
    runs.append(moe_run(corpus, steps=4, tuned=TUNED.replace(lr=0.02)))
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    for run in runs[:2]:
        train(run, one, corpus)
    for run in (runs[2], runs[0]):
        train(run, two, corpus)
    said = ("report", tmp_path / "one", *(two.folder(run.key) for run in runs[::2]))
    code, out, err = in_process(capsys, monkeypatch, *said, "-o", tmp_path / "both")
    assert code == 0 and f"report: {tmp_path / 'both' / 'report.html'}" in out, err
    written = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    for words in ("3 training runs", "tuned.lr", "lr 0.01, seed 1", " ± ", "Routers at the end"):
        assert words in written
    assert not (tmp_path / "one" / "report.html").exists()
    page = tmp_path / "cmp.html"
    refused(in_process(capsys, monkeypatch, *said, "-o", page), "--out is a folder", f"give --out {tmp_path / 'cmp'}")
    assert not page.exists()
    code, out, err = in_process(capsys, monkeypatch, "report", tmp_path / "two" / "runs")
    assert code == 0 and f"report: {tmp_path / 'two' / 'report.html'}" in out, err
    (tmp_path / "none" / "runs").mkdir(parents=True)
    refused(in_process(capsys, monkeypatch, "report", tmp_path / "none" / "runs"), "neither")
    refused(in_process(capsys, monkeypatch, *said, "--list"), "give one folder")
    refused(in_process(capsys, monkeypatch, "report", tmp_path / "one", "-o", tmp_path / "x"), "several folders")
    refused(in_process(capsys, monkeypatch, *said, tmp_path), "holds no run")
