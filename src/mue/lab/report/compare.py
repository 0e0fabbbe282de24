"""Several runs on one page: curves over each other, final losses with their seeds and intervals, and what the runs differ in.

Runs that differ in the seed alone are one configuration, and its seeds are what an interval is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mue.lab.report import plots
from mue.lab.report.page import Section, runs_section, text, write_report
from mue.lab.report.routers import routers_table
from mue.lab.train.run import CONFIG_FILE, Run, Store
from mue.lab.train.task import task_of
from mue.plan.plan import flatten
from mue.util.statistics import mean_of
from mue.util.text import number

SEED, KEY = "run.seed", "key"
# What names a configuration first, where it differs; after these, whatever else does.
_FIRST = ("model", "rule", "tuned.lr", "tuned.weight_decay", "tuned.init_std", "training.steps", "training.batch")
_SHORT = {"model": "", "tuned.weight_decay": "wd", "tuned.init_std": "std", "training.steps": "steps"}


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and the folder that it is in."""

    run: Run
    result: Mapping[str, Any]
    folder: Path

    @property
    def loss(self) -> float | None:
        """The validation loss; None where it diverged."""
        loss: float | None = self.result["val_loss"]
        return loss

    @property
    def unit(self) -> str:
        return task_of(self.run.settings).unit

    @property
    def rows(self) -> list[dict[str, Any]]:
        return Store(self.folder.parent.parent).metrics(self.folder.name)


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed alone, by seed."""

    name: str
    runs: Mapping[int, Ended]

    @property
    def losses(self) -> list[float]:
        """Of the seeds that did not diverge."""
        return [run.loss for run in self.runs.values() if run.loss is not None]

    @property
    def mean(self) -> float:
        """Infinite where a seed diverged."""
        return mean_of(self.losses).value if len(self.losses) == len(self.runs) else float("inf")


def compare_folders(folders: Sequence[Path], out: Path) -> Path:
    """Write ``out/report.html`` on every run in some folders that has ended.

    Args:
        folders: each a run's, or one with runs in ``runs/``. The same run in two of them counts once.

    Returns:
        The page's path.

    Raises:
        ValueError: a folder without runs, or none of all that has ended.
    """
    ended: dict[str, Ended] = {}
    open_: list[str] = []
    for folder in folders:
        own, unfinished = runs_in(folder)
        ended |= {run.folder.name: run for run in own}
        open_ += unfinished
    if not ended:
        raise ValueError(
            f"none of the {len(open_)} runs in {', '.join(map(str, folders))} has ended: start the command again to go on with them"
        )
    return compare(list(ended.values()), [key for key in open_ if key not in ended], out)


def runs_in(folder: Path) -> tuple[list[Ended], list[str]]:
    """The runs of a folder that have ended, and the keys of those that have not.

    Args:
        folder: a run's, or one with runs in ``runs/``.

    Raises:
        ValueError: it holds no run.
    """
    configs = (
        [folder / CONFIG_FILE] if (folder / CONFIG_FILE).exists() else sorted(folder.glob(f"runs/*/{CONFIG_FILE}"))
    )
    if not configs:
        raise ValueError(f"{folder} holds no run: expected {CONFIG_FILE}, or runs/ as mue train leaves it")
    ended, open_ = [], []
    for config in configs:
        path = config.parent.resolve()
        store = Store(path.parent.parent)
        run, result = store.run(path.name), store.result(path.name)
        if run is None or result is None:
            open_.append(path.name)
        else:
            ended.append(Ended(run, result, path))
    return ended, open_


def compare(ended: Sequence[Ended], open_: Sequence[str], out: Path) -> Path:
    """Write the page on runs that have ended, ``out/report.html``; ``open_`` are keys of runs that have not, to be named."""
    sections: list[Section] = []
    found = configurations(ended)
    leads = []
    for unit in dict.fromkeys(run.unit for run in ended):  # losses of two units have no axis in common
        of_unit = [c for c in found if next(iter(c.runs.values())).unit == unit]
        tag = f"-{len(sections)}" if sections else ""
        sections.append(_curves(of_unit, unit, f"loss{tag}"))
        if len({run.run.data["hash"] for run in ended if run.unit == unit}) > 1:
            words = "These runs are on several corpora, and losses of two do not compare."
            sections[-1].texts.append(text(words, warn=True))
        sections.append(_losses(of_unit, unit, f"losses{tag}"))
        leads.append(_lead(of_unit[0], unit))
    sections.append(differences(found))
    every = [(_of_seed(c, seed), run) for c in found for seed, run in c.runs.items()]
    sections += routers_table([(name, run.run, run.rows) for name, run in every])
    data = dict.fromkeys(run.run.data["hash"] for run in ended)
    sections.append(runs_section([(name, r.run, r.result) for name, r in every], [("data", ", ".join(data))]))
    if open_:
        sections[-1].texts.append(text(f"Not ended yet, and left out: {', '.join(open_)}.", warn=True))
    return write_report(out, f"{len(ended)} training runs", "; ".join(leads), sections)


def _lead(best: Configuration, unit: str) -> str:
    """What the page says first of the runs of one unit, of which ``best`` has the lowest mean."""
    if best.mean == float("inf"):
        return f"in {unit}, every configuration has a run that diverged"
    of = f"the mean of {len(best.runs)} seeds" if len(best.runs) > 1 else "one seed"
    return f"the lowest validation loss is {number(best.mean)} {unit} ({best.name or 'all'}, {of})"


def _of_seed(configuration: Configuration, seed: int) -> str:
    return f"{configuration.name}, seed {seed}".removeprefix(", ")


def configurations(ended: Sequence[Ended]) -> list[Configuration]:
    """Runs by what they share beside the seed, the lowest mean first.

    Of two whose configuration and seed are the same, as of two versions of mue that plan other values, the second stands alone under its key.
    """
    groups: dict[tuple[tuple[str, Any], ...], dict[int, Ended]] = {}
    for run in ended:
        config = {k: v for k, v in config_of(run.run).items() if k != SEED}
        group, seed = tuple(config.items()), run.run.settings.seed
        if seed in groups.get(group, {}):
            group = (*group, (KEY, run.result["key"]))
        groups.setdefault(group, {})[seed] = run
    names = names_of([dict(group) for group in groups])
    found = [Configuration(name, dict(sorted(runs.items()))) for name, runs in zip(names, groups.values(), strict=True)]
    return sorted(found, key=lambda c: c.mean)


def config_of(run: Run) -> dict[str, Any]:
    """What was asked of a run, as dotted keys of its files: the plan's tables, ``run`` and the corpus."""
    inputs = run.plan.inputs.to_dict()
    config = {
        "model": run.plan.target.name,
        **flatten({k: v for k, v in inputs.items() if k != "convention"}),
        **flatten(inputs["convention"], "base.convention"),
        **flatten(run.settings.to_dict(), "run"),
        "data": run.data["hash"][:16],
    }
    return {k: v for k, v in config.items() if v is not None}


def names_of(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The shortest words that tell configurations apart: model, rule and tuned values where they differ, then what else it takes."""
    differing = _differing(configs)
    words: list[list[str]] = [[] for _ in configs]
    for key in [*(k for k in _FIRST if k in differing), *(k for k in differing if k not in _FIRST)]:
        before = {tuple(own) for own in words}
        after = {(*own, str(c.get(key))) for own, c in zip(words, configs, strict=True)}
        if key not in _FIRST and len(after) == len(before):  # it tells nobody apart who was not
            continue
        for own, config in zip(words, configs, strict=True):
            own.append(f"{_SHORT.get(key, key.rpartition('.')[2])} {_shown(config.get(key))}".strip())
    return [", ".join(own) for own in words]


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return number(value) if value is None or isinstance(value, float) else str(value)


# ---- sections --------------------------------------------------------------------------------------------------------


def _curves(found: Sequence[Configuration], unit: str, id: str) -> Section:
    curves = [
        {
            "label": c.name or "all" if n == 0 else "_",  # of several seeds one is in the legend
            "color": plots.CYCLE[i % len(plots.CYCLE)],
            "style": ("-", "--", ":")[i // len(plots.CYCLE) % 3],
            "metrics": run.rows,
            "flops_per_token": run.result["flops_per_token"],
        }
        for i, c in enumerate(found)
        for n, run in enumerate(c.runs.values())
    ]
    return Section(id=id, title=f"Loss, {unit}", figure=plots.loss_figure(curves, unit))


def _losses(found: Sequence[Configuration], unit: str, id: str) -> Section:
    """Final losses, and each configuration's difference from the lowest, paired by seed."""
    best, rows = found[0], []
    for c in found:
        diverged = len(c.runs) - len(c.losses)
        mean = f"{diverged} of {len(c.runs)} diverged" if diverged else mean_of(c.losses).text(4)
        pairs = [
            run.loss - other
            for seed, run in c.runs.items()
            if run.loss is not None and seed in best.runs and (other := best.runs[seed].loss) is not None
        ]
        against = (
            "–" if c is best or not pairs else f"{'+' if sum(pairs) > 0 else ''}{mean_of(pairs).text(4)} ({len(pairs)})"
        )
        seeds = ", ".join(f"{seed}: {'diverged' if r.loss is None else f'{r.loss:.4f}'}" for seed, r in c.runs.items())
        rows.append([c.name or "all", mean, against, seeds])
    words = (
        "Mean of the seeds ± half of its 95 % interval (Student's distribution; none of one seed), and the difference from the"
        " lowest by seeds that both have, with their number."
    )
    header = ["configuration", "validation loss", "against the lowest", "seed: loss"]
    return Section(
        id=id,
        title=f"Final losses, {unit}",
        texts=[text(words)],
        header=header,
        rows=rows,
        wrap=(3,),
        tags=_untagged(rows),
    )


def differences(found: Sequence[Configuration]) -> Section:
    """Only the keys in which the configurations differ: a line for each of their values, and who has it."""
    configs = [config_of(next(iter(c.runs.values())).run) for c in found]
    configs = [{k: v for k, v in config.items() if k not in ("model", SEED)} for config in configs]
    keys = _differing(configs)
    section = Section(id="differs", title="What differs")
    if not keys:
        but = "the seed" if len(found) == 1 else "the keys, of runs of which the same was asked"
        section.texts.append(text(f"Nothing but {but}."))
        return section
    section.header = ["key", "value", "configurations"]
    rows: list[list[str]] = []
    for key in keys:
        of: dict[str, list[str]] = {}
        for c, config in zip(found, configs, strict=True):
            of.setdefault(_shown(config.get(key)), []).append(c.name)
        rows += [[key, value, "; ".join(names)] for value, names in of.items()]
    section.rows, section.wrap, section.tags = rows, (2,), _untagged(rows)
    return section


def _untagged(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Nothing marked: a table that is read line by line where the window is narrow."""
    return [[""] * len(row) for row in rows]
