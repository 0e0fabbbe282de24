"""Which of a run's weights are meant, and a folder of them alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mue.lab.train.averages import ema_file
from mue.lab.train.run import CONFIG_FILE, RESULT_FILE, WEIGHTS_FILE
from mue.lab.trained.find import TrainedRun
from mue.util.files import write_folder

LAST = 0.0
"""In the place of an average's decay: the weights after the last step."""


def with_average(found: TrainedRun, decay: float | None) -> tuple[TrainedRun, str]:
    """A run with an average of its weights in the place of the last ones.

    Args:
        decay: of the average; :data:`LAST`: none. None: the average whose held-out loss is the lowest, where it is lower than that of the last
            weights.

    Returns:
        The run, and words for its weights.

    Raises:
        ValueError: the run keeps no such average.
    """
    kept = [d for d in found.run.settings.ema if (found.folder / ema_file(d)).exists()]
    if decay is None:
        decay = _best(found.folder, kept)
    if decay == LAST:
        return found, "the weights of a checkpoint" if found.under_way else "the last weights"
    if decay not in kept:
        have = (
            f"it keeps {', '.join(f'{d:g}' for d in kept)}"
            if kept
            else "it keeps none; say [run] ema = [0.99, 0.999] before it is trained"
        )
        raise ValueError(f"{found.folder} has no average of its weights with decay {decay!r}: {have}")
    return replace(found, weights=found.folder / ema_file(decay)), f"the average of decay {decay!r}"


def _best(folder: Path, kept: Sequence[float]) -> float:
    """The decay of lowest held-out loss, :data:`LAST` for the last weights."""
    try:
        result: Mapping[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:  # under way, or weights that were exported
        return LAST
    losses = {d: result.get("ema_val_loss", {}).get(repr(d)) for d in kept} | {LAST: result["val_loss"]}
    finite = {d: loss for d, loss in losses.items() if loss is not None}
    return min(finite, key=lambda d: finite[d]) if finite else LAST


def export_weights(found: TrainedRun, out: Path) -> None:
    """Write a run's weights and what it takes to build its model, as a folder that :func:`mue.lab.trained.find.find` reads.

    Args:
        found: the weights that are meant. out: must not exist, and does so in the end or not at all.
    """

    def fill(folder: Path) -> None:
        shutil.copyfile(found.folder / CONFIG_FILE, folder / CONFIG_FILE)
        shutil.copyfile(found.weights, folder / WEIGHTS_FILE)

    write_folder(out, fill)
