"""A study's folder: what was asked (``study.json``) and a row for each run that ended (``rows.jsonl``), which is all a report needs.

Runs are trained in ``runs/`` as everywhere in the lab; what is worth keeping of each is a row of some hundred bytes, keyed by the run's
effective values. So a row answers for every approach that comes to those values, a study's evidence can be committed, and rows of
several machines are one study: a row means the same wherever it was trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mue.lab.study.spec import StudySpec, study_from
from mue.lab.train.run import Run, Store
from mue.util.files import FileLock, write_json

_KEPT = (
    "key", "plan", "status", "val_loss", "step", "tokens", "seconds", "seed", "name", "parameters", "active_parameters",
    "flops_per_token", "data", "git", "mue", "torch", "machine", "threads",
)  # fmt: skip
_DIGITS = 6  # of a loss: nats beyond are noise of the machine


class StudyFolder:
    """One folder of a study, on this machine.

    Attributes:
        root: the folder. store: of the runs in it. file: where the rows are.
    """

    def __init__(self, root: Path, file: Path | None = None) -> None:
        self.root, self.store, self.file = root, Store(root), file or root / "rows.jsonl"

    def begin(self, spec: StudySpec, data: Mapping[str, Any]) -> None:
        """Write what is asked, where it is new. Rows stay: they know their runs by key and not by question.

        Args:
            data: description of the corpus, as a run keeps it.

        Raises:
            ValueError: the folder holds a study on other data, whose losses do not compare.
        """
        path = self.root / "study.json"
        if path.exists() and (before := self.asked()["data"]["hash"]) != data["hash"]:
            raise ValueError(
                f"{self.root} holds a study on other data (sha256 {before[:16]}, these are {data['hash'][:16]}):"
                " losses on two corpora are never mixed, give another --out"
            )
        # Where the data lie is this machine's affair, and a committed file has no place for it.
        described = {k: v for k, v in data.items() if k != "source"}
        source = spec.source["source"]
        write_json(
            path, {"study": dict(spec.tables), "source": source if source == "stdlib" else "files", "data": described}
        )

    def asked(self) -> dict[str, Any]:
        """What ``study.json`` holds.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = self.root / "study.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"{self.root} holds no study: expected study.json; begin one with mue study FILE -o {self.root}"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is damaged ({error}): begin the study again with the same --out, its rows stay"
            ) from None
        return found

    def spec(self) -> StudySpec:
        """The study that was asked; its data need not be here."""
        # a path, for it is not opened, and a name would be of text or of images
        return study_from({**self.asked()["study"], "data": {"source": "data"}}, self.root)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every row by its run's key."""
        if not self.file.exists():
            return {}
        # Whole rows only: whoever was killed while it wrote one left half a line, and trains that run again.
        lines = [line for line in self.file.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
        return {row["key"]: row for row in map(json.loads, lines)}

    def add(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
        """Append the row of a run that ended.

        Returns:
            The row.
        """
        row = {k: result[k] for k in _KEPT if k in result} | self.more(run, result)
        self._append([row])
        return row

    def more(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
        """What a row has of a run beside its result: here the curve of its validation loss."""
        curve = [[m["step"], m["val_loss"]] for m in self.store.metrics(run.key) if m.get("val_loss") is not None]
        return {"curve": [[step, round(loss, _DIGITS)] for step, loss in curve]}

    def merge(self, others: Iterable[Path]) -> int:
        """Take over the rows of other folders of this study.

        Returns:
            How many were new.

        Raises:
            ValueError: one of them is on other data.
        """
        mine, ours = self.rows(), self.asked()["data"]["hash"]
        new: dict[str, dict[str, Any]] = {}
        for other in map(StudyFolder, others):
            if (theirs := other.asked()["data"]["hash"]) != ours:
                raise ValueError(
                    f"{other.root} is on other data (sha256 {theirs[:16]}, here {ours[:16]}): its losses do not compare"
                )
            new |= {key: row for key, row in other.rows().items() if key not in mine}
        self._append(new.values())
        return len(new)

    def _append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write whole lines at the end, one writer at a time."""
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        if not text:
            return
        with FileLock(self.root / "rows.lock"), self.file.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line of one who was killed: ours must not be glued to it
                    text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
