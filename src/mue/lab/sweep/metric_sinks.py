"""Metrics for other viewers: the rows of ``metrics.jsonl``, which stay the record, copied to TensorBoard or W&B.

sinks = open_sinks(["tensorboard"], folder)         # optional packages, imported here
with Broadcast(*sinks, display) as listener: run_sweep(..., listener=listener)
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mue.lab.runners.listener import RunListener
from mue.lab.train.run import METRICS_FILE, Run, Store
from mue.util.errors import extra


def open_sinks(kinds: Sequence[str], folder: Path) -> list[MetricSink]:
    """Open one sink for each kind.

    Args:
        kinds: "tensorboard", "wandb". folder: of the sweep, in which the runs' folders are and where sinks write.

    Raises:
        ValueError: an unknown kind, or a package that is not installed.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--log takes {' or '.join(KINDS)}, not {kind!r}; metrics.jsonl is always written")
    return [_opened(kind, folder) for kind in dict.fromkeys(kinds)]


def _opened(kind: str, folder: Path) -> MetricSink:
    try:
        return KINDS[kind](folder)
    except ImportError as error:
        raise ValueError(f"--log {kind} needs the {kind} extra: {extra(kind)} ({error})") from error


class MetricSink(RunListener, ABC):
    """Passes on the whole rows that a run has written since; a resumed run rewrites the same bytes, so a place in the file
    stays true."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._store, self._read = folder, Store(folder), dict[str, int]()

    def moved(self, run: Run, step: int, loss: float) -> None:
        self.follow(run)

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        self.follow(run)

    @abstractmethod
    def follow(self, run: Run) -> None:
        """Pass on the run's new rows."""

    def rows(self, run: Run) -> Iterator[dict[str, Any]]:
        """The run's new rows."""
        path = self._store.folder(run.key) / METRICS_FILE
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read.get(run.key, 0))
            for line in file:
                if line.endswith(b"\n"):
                    self._read[run.key] = self._read.get(run.key, 0) + len(line)
                    yield json.loads(line)


class TensorBoard(MetricSink):
    """``<folder>/tensorboard/<run key>``; a run that goes on in a new session is written from its first row again."""

    def __init__(self, folder: Path) -> None:
        import tensorboard  # noqa: F401 - named in the error where it is missing; torch's writer needs it
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(folder)
        self.open = SummaryWriter
        self.writers: dict[str, Any] = {}

    def follow(self, run: Run) -> None:
        if run.key not in self.writers:
            folder = self.folder / "tensorboard" / run.key
            shutil.rmtree(folder, ignore_errors=True)  # else TensorBoard shows the rows of both sessions
            self.writers[run.key] = self.open(str(folder))
            self.writers[run.key].add_text("tuned", json.dumps(run.plan.tuned.to_dict()))
        for row in self.rows(run):
            for name, value in scalars(row).items():
                self.writers[run.key].add_scalar(name, value, row["step"])

    def __exit__(self, *error: object) -> None:
        for writer in self.writers.values():
            writer.close()


class WandB(MetricSink):
    """One W&B run for each of ours, under its key; project and mode come from W&B's own settings (``WANDB_MODE=offline``)."""

    def __init__(self, folder: Path) -> None:
        import wandb

        super().__init__(folder)
        self.wandb = wandb
        self.runs: dict[str, Any] = {}

    def follow(self, run: Run) -> None:
        if run.key not in self.runs:
            config = {**run.plan.tuned.to_dict(), "seed": run.settings.seed}
            # Several runs are open at once, and one that goes on in a new session is the same run there, too.
            self.runs[run.key] = self.wandb.init(
                id=run.key, dir=str(self.folder), config=config, resume="allow", reinit="create_new"
            )
        for row in self.rows(run):
            self.runs[run.key].log(scalars(row), step=row["step"])

    def __exit__(self, *error: object) -> None:
        for run in self.runs.values():
            run.finish()


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row's numbers by name; of the experts' load, the busiest one's in each layer, over a fair share; of routers, each layer's."""
    out = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
    for layer, shares in enumerate(row.get("load", ())):
        out[f"load/layer {layer}"] = max(shares) * len(shares)
    for layer, seen in enumerate(row.get("routers", ())):
        out |= {f"routers/{name}/layer {layer}": x for name, x in seen.items() if isinstance(x, int | float)}
    return out


KINDS: dict[str, type[MetricSink]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""What ``--log`` takes; the package of each is in the extra of its name."""
