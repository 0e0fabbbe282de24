"""The tuned values of a finished sweep, or of a per-role search, as other commands read them from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mue.lab.sweep.state import RESULT_FILE, SWEEP_FILE, SweepState
from mue.lab.train.run import Settings
from mue.lab.train.schedule import DECAYING
from mue.shapes import HParams, Training, Transformer, shape_from_dict
from mue.util.files import digest


@dataclass(frozen=True)
class TunedResult:
    """What a finished sweep says.

    Attributes:
        tuned: its values. notes: what speaks against them, a sentence each. base, training: what they were tuned on.
        settings: what else the runs had that gave them. data: the hash of the text they read; "" where a result does not say.
    """

    tuned: HParams
    notes: tuple[str, ...]
    base: Transformer
    training: Training
    settings: Settings
    data: str

    def other_data(self, data: str, where: str) -> tuple[str, ...]:
        """What to say where a run reads other data than the values were tuned on. They may serve there as well, and nobody has measured it.

        Args:
            data: the hash of the run's data. where: the sweep's folder.
        """
        if self.data in ("", data):
            return ()
        return (f"{where} was tuned on other data (sha256 {self.data[:16]} there, {data[:16]} here)",)

    def check_settings(self, settings: Settings, where: str) -> tuple[str, ...]:
        """Refuse to train with the values under another schedule or on another task than they were tuned for.

        Args:
            settings: of the run that is to use them. where: the sweep's folder, for messages.

        Returns:
            What else differs and matters less, a sentence each: the precision, which changes rounding and not the problem.

        Raises:
            ValueError: names the setting, both values and the fix.
        """
        for name in self._deciding():
            there, here = getattr(self.settings, name), getattr(settings, name)
            if there != here:
                raise ValueError(
                    f"{where} was tuned with {name} = {_toml(there)}, this trains with {_toml(here)}: put {name} = {_toml(there)}"
                    " under [run], or sweep with this one"
                )
        if self.settings.precision == settings.precision:
            return ()
        return (f"{where} was tuned in {self.settings.precision}, this trains in {settings.precision}",)

    def unusual(self) -> str:
        """The settings that a reader of a plan would not guess, as ``[run]`` has them; "" where there are none."""
        usual = Settings()
        names = [n for n in (*self._deciding(), "precision") if getattr(self.settings, n) != getattr(usual, n)]
        return ", ".join(f"{name} = {_toml(getattr(self.settings, name))}" for name in names)

    def _deciding(self) -> list[str]:
        """The settings that decide what is tuned: decay and shift only of schedules that read them, balance only of experts."""
        experts = any(block.experts for block in self.base.blocks)
        name = self.settings.schedule
        return [
            "task",
            "schedule",
            *["decay"] * (name in DECAYING),
            *["shift"] * (name == "wsqd"),
            *["balance", "consistency"] * experts,
        ]


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
        tuned = HParams.from_dict(data["tuned"])
        identity = data["identity"]
        notes = list(data.get("warnings", ()))
        if data.get("edge"):
            notes.append(
                f"this sweep's best lr is at the {data['edge']} edge of its grid: widen it before you trust it"
            )
        if _changed(folder, data.get("asked")):
            notes.append(f"this sweep has been changed since: finish it with mue sweep --resume {folder}")
        base, settings = shape_from_dict(identity["base"]), Settings(**identity.get("settings", {}))
        training, hash_ = Training(**identity["training"]), str(identity.get("data", ""))
        return TunedResult(tuned, tuple(notes), base, training, settings, hash_)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the result of a sweep ({error}): run the sweep again") from error


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


def _changed(folder: Path, asked: Mapping[str, Any] | None) -> bool:
    """Whether the folder's sweep asks for something else than it did when this result was made."""
    if asked is None or not (folder / SWEEP_FILE).exists():
        return False
    now = SweepState.load(folder).spec.grid.to_dict()
    # How runs are laid out changes numbers in rounding only, and may differ from machine to machine.
    return digest({**now, "runner": None}) != digest({**asked, "runner": None})
