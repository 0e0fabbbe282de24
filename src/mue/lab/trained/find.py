"""Where a trained model is: a run's folder, a run in the folder of a sweep, a study, a demo or ``mue train``, or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mue.lab.train.checkpoint import load_weights
from mue.lab.train.run import CHECKPOINT_FILE, CONFIG_FILE, WEIGHTS_FILE, Run, is_run, read_run
from mue.lab.train.task import task_of
from mue.model.apply import init_

_SHOWN = 5  # runs that a message lists


@dataclass(frozen=True)
class TrainedRun:
    """A run with the file that holds its weights.

    Attributes:
        run: what was trained. folder: ``<store>/runs/<key>``. weights: final ones, or a checkpoint's.
    """

    run: Run
    folder: Path
    weights: Path

    @property
    def under_way(self) -> bool:
        """The weights are of a checkpoint, and the run has not ended."""
        return self.weights.name == CHECKPOINT_FILE

    @property
    def name(self) -> str:
        """For people: the shape and the key, and that it is under way."""
        return f"{self.run.plan.target.name}, run {self.run.key}{', under way' if self.under_way else ''}"

    def model(self) -> nn.Module:
        """The model with these weights, in eval mode.

        Raises:
            ValueError: the file is damaged, or another run's.
        """
        model = task_of(self.run.settings).build(self.run.plan, self.run.settings)
        load_weights(self.weights, model, run=self.run.key, plan=self.run.plan.hash)
        return model.eval()


def untrained(run: Run) -> nn.Module:
    """The model of a run before its first step, in eval mode."""
    model = task_of(run.settings).build(run.plan, run.settings)
    init_(run.plan, model, run.settings.seed)
    return model.eval()


def find(path: Path) -> TrainedRun:
    """The trained run that is meant.

    Args:
        path: a run's folder; a folder with ``runs/`` in it, of which one keeps its weights, or ``<that folder>/<beginning of a run's
            key or of its plan's hash>``; a ``model.safetensors`` or ``checkpoint.safetensors`` in a run's folder.

    Raises:
        ValueError: nothing of the kind, no weights (with the way to get them), or several runs that keep theirs.
    """
    if path.is_file():
        if path.suffix != ".safetensors" or not is_run(path.parent):
            raise ValueError(
                f"{path} is no checkpoint of a run: expected a .safetensors file beside the run's config.json"
            )
        return TrainedRun(read_run(path.parent, same=True), path.parent, path)
    if path.is_dir() and is_run(path):
        return _with_weights(path)
    if path.is_dir() and (folders := _runs(path)):
        return _only(path, folders)
    if not path.exists() and (folders := _called(_runs(path.parent), path.name)):
        return _with_weights(folders[0]) if len(folders) == 1 else _only(path, folders)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a run's folder, one with runs/ in it, or a checkpoint")
    raise ValueError(
        f"{path} holds no run: expected its config.json, or runs/ as mue train, mue sweep or mue study leave it"
    )


def _runs(folder: Path) -> list[Path]:
    return sorted(f.parent for f in folder.glob(f"runs/*/{CONFIG_FILE}") if is_run(f.parent))


def _called(folders: list[Path], name: str) -> list[Path]:
    """Those whose key begins so; where there are none, those the hash of whose plan does."""
    by_key = [folder for folder in folders if folder.name.startswith(name)]
    return by_key or [folder for folder in folders if read_run(folder).plan.hash.startswith(name)]


def _file(folder: Path) -> Path | None:
    return next((folder / name for name in (WEIGHTS_FILE, CHECKPOINT_FILE) if (folder / name).exists()), None)


def _with_weights(folder: Path) -> TrainedRun:
    if (file := _file(folder)) is None:
        raise ValueError(
            f"{folder} keeps no weights: sweeps and studies leave theirs with --keep-weights only; mue train {folder} -o OUT trains"
            " this run again and keeps them"
        )
    return TrainedRun(read_run(folder, same=True), folder, file)


def _only(path: Path, folders: list[Path]) -> TrainedRun:
    """The one of several that keeps its weights."""
    keep = [folder for folder in folders if (folder / WEIGHTS_FILE).exists()]
    keep = keep or [folder for folder in folders if _file(folder) is not None]
    if len(keep) == 1:
        return _with_weights(keep[0])
    if not keep:
        raise ValueError(
            f"none of the {len(folders)} runs in {path} keeps its weights: sweeps and studies leave theirs with --keep-weights only;"
            f" mue train {folders[0]} -o OUT trains that run again and keeps them"
        )
    listed = ", ".join(f"{folder} ({read_run(folder).plan.target.name})" for folder in keep[:_SHOWN])
    more = f" and {len(keep) - _SHOWN} more" if len(keep) > _SHOWN else ""
    raise ValueError(f"{len(keep)} runs in {path} keep their weights, name one: {listed}{more}")
