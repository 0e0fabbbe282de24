"""The tuned values of a finished sweep, or of a per-role search, as other commands read them from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mue.lab.sweep.state import RESULT_FILE, SWEEP_FILE, SweepState
from mue.shapes import HParams, Training, Transformer, shape_from_dict
from mue.util.files import digest


@dataclass(frozen=True)
class TunedResult:
    """What a finished sweep says.

    Attributes:
        tuned: its values. notes: what speaks against them, a sentence each. base, training: what they were tuned on.
    """

    tuned: HParams
    notes: tuple[str, ...]
    base: Transformer
    training: Training


def tuned_of(folder: Path) -> TunedResult:
    """Read the result of a finished sweep or per-role search.

    Args:
        folder: of the sweep; its ``result.json`` is enough, runs and storage may be gone.

    Raises:
        ValueError: the folder holds no finished sweep, or a file that is not one's result.
    """
    path = folder / RESULT_FILE
    if not path.exists():
        raise ValueError(f"{folder} holds no finished sweep (no result.json): run mue sweep with --out {folder} first")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tuned = HParams(**{**data["tuned"], "betas": tuple(data["tuned"]["betas"])})
        identity = data["identity"]
        notes = list(data.get("warnings", ()))
        if data.get("edge"):
            notes.append(
                f"this sweep's best lr is at the {data['edge']} edge of its grid: widen it before you trust it"
            )
        if _changed(folder, data.get("asked")):
            notes.append(f"this sweep has been changed since: finish it with mue sweep --resume {folder}")
        return TunedResult(tuned, tuple(notes), shape_from_dict(identity["base"]), Training(**identity["training"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the result of a sweep ({error}): run the sweep again") from error


def _changed(folder: Path, asked: Mapping[str, Any] | None) -> bool:
    """Whether the folder's sweep asks for something else than it did when this result was made."""
    if asked is None or not (folder / SWEEP_FILE).exists():
        return False
    now = SweepState.load(folder).spec.grid.to_dict()
    # How runs are laid out changes numbers in rounding only, and may differ from machine to machine.
    return digest({**now, "runner": None}) != digest({**asked, "runner": None})
