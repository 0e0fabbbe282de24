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
from mue.util.files import write_folder, write_json

LAST = 0.0
"""In the place of an average's decay: the weights after the last step."""
WORDS = "weights"
"""The key of exported weights' ``config.json`` under which it says which they are."""


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
        return found, _words(found)
    if decay not in kept:
        raise ValueError(f"{found.folder} has no average of its weights with decay {decay!r}: {_instead(found, kept)}")
    return replace(found, weights=found.folder / ema_file(decay)), f"the average of decay {decay!r}"


def _words(found: TrainedRun) -> str:
    """Words for the weights that a folder has without an average in their place."""
    if found.under_way:
        return "the weights of a checkpoint"
    if (found.folder / RESULT_FILE).exists():
        return "the last weights"
    words: str = _config(found).get(WORDS, "the weights of the folder")  # exported
    return words


def _instead(found: TrainedRun, kept: Sequence[float]) -> str:
    """What there is where an average is not."""
    if kept:
        return f"it keeps {', '.join(f'{d:g}' for d in kept)}"
    if found.under_way and found.run.settings.ema:
        return f"its averages ({', '.join(f'{d:g}' for d in found.run.settings.ema)}) are written when it ends"
    if not found.under_way and not (found.folder / RESULT_FILE).exists():
        return f"exported, it has {_words(found)} alone; leave --ema out"
    return "it keeps none; say [run] ema = [0.99, 0.999] before it is trained"


def _config(found: TrainedRun) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((found.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return config


def _best(folder: Path, kept: Sequence[float]) -> float:
    """The decay of lowest held-out loss, :data:`LAST` for the last weights."""
    try:
        result: Mapping[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:  # under way, or weights that were exported
        return LAST
    losses = {d: result.get("ema_val_loss", {}).get(repr(d)) for d in kept} | {LAST: result["val_loss"]}
    finite = {d: loss for d, loss in losses.items() if loss is not None}
    return min(finite, key=lambda d: finite[d]) if finite else LAST


def export_weights(found: TrainedRun, words: str, out: Path) -> None:
    """Write a run's weights and what it takes to build its model, as a folder that :func:`mue.lab.trained.find.find` reads.

    Args:
        found, words: the weights that are meant, as :func:`with_average` gives them. out: must not exist, and does so in the end or not at all.
    """

    def fill(folder: Path) -> None:
        write_json(folder / CONFIG_FILE, {**_config(found), WORDS: words})
        shutil.copyfile(found.weights, folder / WEIGHTS_FILE)

    write_folder(out, fill)
