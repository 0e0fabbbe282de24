"""The ``[sweep]`` table of an experiment file: what a sweep of a base visits, and how it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mue.lab.data.spec import data_source
from mue.lab.runners.runner import KINDS
from mue.lab.train.run import Settings
from mue.lab.train.spec import PLAN_TABLES, settings_from
from mue.lab.valley.search import Space
from mue.plan.plan import PlanData
from mue.plan.toml import check_keys, lr_grid, shape_from, table_of, training_from, tuned_from
from mue.plan.transfer import transfer
from mue.shapes import HParams, Training, Transformer, shape_from_dict
from mue.util.errors import positive, positive_int

_SWEEP = ("lr", "weight_decay", "init_std", "seeds", "sampler", "trials", "precision", "extend", "stop_early", "runner")
SAMPLERS = ("grid", "valley", "random", "tpe")


@dataclass(frozen=True)
class Grid:
    """What a sweep visits, and how it is run.

    Attributes:
        sampler: "grid": every combination; "valley": what ``mue.lab.valley.search`` asks for between the lowest and the highest lr;
            "random" and "tpe": what Optuna draws from the ranges of the lists. trials: at most so many (None: a grid).
        seeds: of a grid, one unless said otherwise; of a valley search three, since runs of one seed err together.
        precision, extend: of the valley search. stop_early: give up runs that can no longer move the minimum.
        runner: how runs are trained (``mue.lab.runners.runner``).
    """

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    init_std: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    sampler: str = "grid"
    trials: int | None = None
    precision: float = Space.precision
    extend: bool = False
    stop_early: bool = False
    runner: str = "auto"


@dataclass(frozen=True)
class SweepSpec:
    """A sweep of a base: its shape and run, the grid, the rest of the tuned values, settings and data."""

    base: Transformer
    training: Training
    defaults: HParams
    grid: Grid
    settings: Settings
    source: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; :meth:`from_dict` reads it back."""
        return {
            "base": self.base.to_dict(),
            "training": asdict(self.training),
            "defaults": self.defaults.to_dict(),
            "grid": asdict(self.grid),
            "settings": self.settings.to_dict(),
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SweepSpec:
        grid: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["grid"].items()}
        return cls(
            base=shape_from_dict(data["base"]),
            training=Training(**data["training"]),
            defaults=HParams(**data["defaults"]),
            grid=Grid(**grid),
            settings=Settings(**data["settings"]),
            source=dict(data["source"]),
        )


def sweep_from(data: Mapping[str, Any], folder: Path) -> SweepSpec:
    """A sweep file: ``[base]`` with ``[base.training]``, ``[data]``, ``[sweep]``, optionally ``[run]`` and ``[tuned]``."""
    check_keys(data, (*PLAN_TABLES, "data", "run", "sweep"), "the file's top level")
    base, table = table_of(data, "base"), table_of(data, "sweep")
    for name, found in (("base", base), ("sweep", table)):
        if not found:
            raise ValueError(f"a sweep file needs a [{name}] table")
    check_keys(table, _SWEEP, "[sweep]")
    if "convention" in base:
        raise ValueError(
            "[base.convention] describes a base tuned elsewhere; a sweep trains the lab's own: leave it out"
        )
    training = training_from(base, "base")
    if training is None:
        raise ValueError("a sweep needs [base.training] with batch (tokens per step) and steps")
    grid = _grid(table)
    given = table_of(data, "tuned")
    defaults = {"lr": grid.lr[0], "weight_decay": grid.weight_decay[0], "init_std": grid.init_std[0]}
    for key in defaults:
        if key in given:
            raise ValueError(f"[tuned] {key} is what the sweep looks for: put its values under [sweep] {key}")
    return SweepSpec(
        base=shape_from(base, "base", ("training", "output_multiplier")),
        training=training,
        defaults=tuned_from({**given, **defaults}),
        grid=grid,
        settings=settings_from(data),
        source=data_source(data, folder),
    )


def _grid(table: Mapping[str, Any]) -> Grid:
    for key, example in (("lr", "[0.001, 0.002, 0.004]"), ("weight_decay", "[0.1]"), ("init_std", "[0.05, 0.1]")):
        if key not in table:
            raise ValueError(f"[sweep] needs {key}: a list of values, e.g. {key} = {example}")
    lr = tuple(lr_grid(table["lr"], "[sweep] lr"))
    sampler = table.get("sampler", "grid")
    seeds = table.get("seeds", list(Space.seeds if sampler == "valley" else Grid.seeds))
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ValueError(f"[sweep] seeds must be a list of whole numbers, got {seeds!r}")
    if sampler not in SAMPLERS:
        raise ValueError(f"[sweep] sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    trials = table.get("trials", Space.budget if sampler == "valley" else None)
    if (sampler == "grid") != (trials is None):
        raise ValueError("[sweep] trials goes with sampler = valley, random or tpe; a grid visits every combination")
    for key in ("precision", "extend"):
        if key in table and sampler != "valley":
            raise ValueError(f'[sweep] {key} goes with sampler = "valley": leave it out')
    if sampler == "valley" and len(lr) < 2:
        raise ValueError("[sweep] lr needs the two ends of the range that the valley search looks in")
    for key in ("extend", "stop_early"):
        if not isinstance(table.get(key, False), bool):
            raise ValueError(f"[sweep] {key} must be true or false, got {table[key]!r}")
    runner = table.get("runner", Grid.runner)
    if runner not in KINDS:
        raise ValueError(f"[sweep] runner must be one of {', '.join(KINDS)}, got {runner!r}")
    return Grid(
        lr=lr,
        weight_decay=tuple(lr_grid(table["weight_decay"], "[sweep] weight_decay")),
        init_std=tuple(lr_grid(table["init_std"], "[sweep] init_std")),
        seeds=tuple(dict.fromkeys(seeds)),
        sampler=sampler,
        trials=None if trials is None else positive_int("[sweep] trials", trials),
        precision=positive("[sweep] precision", table.get("precision", Space.precision)),
        extend=table.get("extend", False),
        stop_early=table.get("stop_early", False),
        runner=runner,
    )


def base_plan(base: Transformer, training: Training, tuned: HParams) -> PlanData:
    """The base itself as a plan: every factor 1, its own output multiplier."""
    return transfer(base, replace(base, output_multiplier=1.0), tuned, base_training=training, training=training)
