"""Several runs to their ends, each trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mue.lab.data import Corpus
from mue.lab.runners.listener import RunListener
from mue.lab.runners.run_all import run_all
from mue.lab.train.run import Run, Store
from mue.lab.train.session import train
from support.dense_runs import dense_run


class Ended(RunListener):
    def __init__(self) -> None:
        self.runs: list[tuple[str, bool]] = []

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        self.runs.append((run.key, fresh))


def test_run_all_stacked(tmp_path: Path, source: dict[str, object], corpus: Corpus) -> None:
    runs = [dense_run(source, corpus, seed=seed, steps=4) for seed in (0, 1, 0)]
    store, heard = Store(tmp_path), Ended()
    train(runs[1], store, corpus)
    results = run_all(runs, store, workers=2, kind="stacked", listener=heard)
    assert heard.runs == [(runs[1].key, False), (runs[0].key, True)]
    assert {key: result["status"] for key, result in results.items()} == dict.fromkeys(dict(heard.runs), "finished")
