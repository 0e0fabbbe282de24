"""The ``[sweep]`` table of an experiment file: what a sweep of a base visits, and how it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mue.lab.data.spec import data_source
from mue.lab.runners.runner import KINDS
from mue.lab.sweep.sampler import AXES, LATER, SAMPLERS, Grid, Sampler, sampler_of
from mue.lab.sweep.trial import Point
from mue.lab.train.run import Run, Settings
from mue.lab.train.spec import settings_from
from mue.lab.train.task import task_of
from mue.lab.valley.cell import tuned_from_point
from mue.plan.plan import PlanData
from mue.plan.toml import TABLES, check_keys, lr_grid, shape_from, table_of, training_from, tuned_from
from mue.plan.transfer import transfer
from mue.shapes import HParams, Training, Transformer, shape_from_dict
from mue.util.errors import positive, positive_int, true_or_false

SWEEP_KEYS = (
    "lr",
    "weight_decay",
    "init_std",
    "betas",
    "adamw_lr",
    "seeds",
    "sampler",
    "trials",
    "stop_early",
    "runner",
)


@dataclass(frozen=True)
class SweepSpec:
    """A sweep of a base, as its file says it.

    Attributes:
        base, training: its shape, and how long it is trained.
        defaults: the tuned values, of which the grid's points replace lr, weight decay, init std and, where it has them, betas and adamw_lr.
        grid: what is visited. settings: of every run, but for the seed, which is the point's.
        source: where the data is, as :func:`mue.lab.data.spec.open_data` takes it.
    """

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
            "training": self.training.to_dict(),
            "defaults": self.defaults.to_dict(),
            "grid": self.grid.to_dict(),
            "settings": self.settings.to_dict(),
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SweepSpec:
        return cls(
            base=shape_from_dict(data["base"]),
            training=Training(**data["training"]),
            defaults=HParams.from_dict(data["defaults"]),
            grid=Grid.from_dict(data["grid"]),
            settings=Settings(**data["settings"]),
            source=dict(data["source"]),
        )

    def identity(self, data_hash: str) -> dict[str, Any]:
        """What must not change under a sweep's folder: all but the grid, the seeds and how runs are laid out.

        Args:
            data_hash: of the corpus.
        """
        axes = (*AXES, *(name for name in LATER if getattr(self.grid, name)))
        fixed = {k: v for k, v in self.defaults.to_dict().items() if k not in axes}
        settings = {k: v for k, v in self.settings.to_dict().items() if k != "seed"}
        training = {"batch": self.training.batch, "steps": self.training.steps}
        return {
            "base": self.base.to_dict(),
            "training": training,
            "tuned": fixed,
            "settings": settings,
            "data": data_hash,
        }

    def first_run(self, data: dict[str, Any]) -> Run:
        """A run like all of the sweep: of its first values.

        Args:
            data: as for :meth:`run_at`.
        """
        return self.run_at({**{axis: getattr(self.grid, axis)[0] for axis in AXES}, "seed": self.grid.seeds[0]}, data)

    def run_at(self, point: Point, data: dict[str, Any]) -> Run:
        """One run of the sweep: the base with a point's values and seed, every transfer factor 1.

        Args:
            data: as a run keeps it (:func:`mue.lab.data.spec.describe_data`).
        """
        tuned = self.defaults.replace(**tuned_from_point(point))
        plan = base_plan(self.base, self.training, tuned)
        return Run(plan, replace(self.settings, seed=int(point["seed"])), data)


def sweep_from(data: Mapping[str, Any], folder: Path) -> SweepSpec:
    """Read a sweep file: ``[base]`` with ``[base.training]``, ``[data]``, ``[sweep]``, optionally ``[run]`` and
    ``[tuned]``.

    Args:
        data: the file's tables. folder: the file's, to which its relative paths are relative.

    Raises:
        ValueError: a table or key is missing, unknown or out of its range; the text names it and the fix.
    """
    check_keys(data, TABLES, "the file's top level")
    base, table = table_of(data, "base"), table_of(data, "sweep")
    for name, found in (("base", base), ("sweep", table)):
        if not found:
            raise ValueError(f"a sweep file needs a [{name}] table")
    check_keys(table, (*SWEEP_KEYS, *dict.fromkeys(key for s in SAMPLERS.values() for key in s.keys)), "[sweep]")
    if "convention" in base:
        raise ValueError(
            "[base.convention] describes a base tuned elsewhere; a sweep trains the lab's own: leave it out"
        )
    training = training_from(base, "base")
    if training is None:
        raise ValueError("a sweep needs [base.training] with batch (tokens per step) and steps")
    grid = _grid(table)
    given = table_of(data, "tuned")
    defaults: dict[str, Any] = {"lr": grid.lr[0], "weight_decay": grid.weight_decay[0], "init_std": grid.init_std[0]}
    defaults |= {name: values[0] for name in LATER if (values := getattr(grid, name))}
    for key in defaults:
        if key in given:
            raise ValueError(f"[tuned] {key} is what the sweep looks for: put its values under [sweep] {key}")
    settings = settings_from(data)
    return SweepSpec(
        base=shape_from(base, "base", ("training", "output_multiplier")),
        training=training,
        defaults=tuned_from({**given, **defaults}),
        grid=grid,
        settings=settings,
        source=data_source(data, folder, task_of(settings).reads),
    )


def _grid(table: Mapping[str, Any]) -> Grid:
    """The grid of a ``[sweep]`` table, with its sampler's defaults for what it leaves out."""
    for key, example in (("lr", "[0.001, 0.002, 0.004]"), ("weight_decay", "[0.1]"), ("init_std", "[0.05, 0.1]")):
        if key not in table:
            raise ValueError(f"[sweep] needs {key}: a list of values, e.g. {key} = {example}")
    name = table.get("sampler", Grid.sampler)
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"[sweep] sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    sampler = SAMPLERS[name]
    seeds = table.get("seeds", list(sampler.seeds))
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ValueError(f"[sweep] seeds must be a list of whole numbers, got {seeds!r}")
    runner = table.get("runner", Grid.runner)
    if runner not in KINDS:
        raise ValueError(f"[sweep] runner must be one of {', '.join(KINDS)}, got {runner!r}")
    grid = Grid(
        lr=tuple(lr_grid(table["lr"], "[sweep] lr")),
        weight_decay=tuple(lr_grid(table["weight_decay"], "[sweep] weight_decay")),
        init_std=tuple(lr_grid(table["init_std"], "[sweep] init_std")),
        betas=_betas(table),
        adamw_lr=tuple(lr_grid(table["adamw_lr"], "[sweep] adamw_lr")) if "adamw_lr" in table else (),
        seeds=tuple(dict.fromkeys(seeds)),
        sampler=name,
        trials=_trials(table, sampler),
        options=_options(table, sampler),
        stop_early=true_or_false("[sweep] stop_early", table.get("stop_early", False)),
        runner=runner,
    )
    sampler_of(grid)  # says what it cannot sample
    return grid


def _betas(table: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    """The pairs of betas that are looked for, each once, in the file's order; none where the table does not say."""
    given, example = table.get("betas", []), "betas = [[0.9, 0.95], [0.8, 0.9]]"
    pairs = given if isinstance(given, list) and ("betas" not in table or given) else [None]
    found = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"[sweep] betas must list pairs of (beta1, beta2), e.g. {example}, got {given!r}")
        beta1, beta2 = (positive("[sweep] betas", beta, zero=True, below=1) for beta in pair)
        found.append((beta1, beta2))
    return tuple(dict.fromkeys(found))


def _trials(table: Mapping[str, Any], sampler: type[Sampler]) -> int | None:
    """How many trials a sweep has at most; None where its sampler knows every point from the start."""
    trials = table.get("trials", sampler.trials)
    if sampler.exhaustive != (trials is None):
        *some, last = (name for name, other in SAMPLERS.items() if not other.exhaustive)
        raise ValueError(
            f"[sweep] trials goes with sampler = {', '.join(some)} or {last}; a grid visits every combination"
        )
    return None if trials is None else positive_int("[sweep] trials", trials)


def _options(table: Mapping[str, Any], sampler: type[Sampler]) -> dict[str, Any]:
    """The sampler's own keys; ``ValueError`` for a key that only others have."""
    for key in table:
        owners = [f'"{name}"' for name, other in SAMPLERS.items() if key in other.keys]
        if owners and key not in sampler.keys:
            raise ValueError(f"[sweep] {key} goes with sampler = {' or '.join(owners)}: leave it out")
    return sampler.read(table)


def base_plan(base: Transformer, training: Training, tuned: HParams) -> PlanData:
    """The base itself as a plan: every factor 1, its own output multiplier.

    Args:
        base: its shape. training: batch and steps, of the base and of the run alike. tuned: what it trains with.
    """
    # As a target it has no A* of its own: what it is trained with is A = A*/ρ_e with ρ_e = 1.
    return transfer(base, replace(base, output_multiplier=1.0), tuned, base_training=training, training=training)
