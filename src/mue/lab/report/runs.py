"""The report of a run, and of a folder of runs, as ``mue train -o`` leaves it: the page of each, and one that compares them where there
are several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mue.lab.report import plots
from mue.lab.report.page import Section, runs_section, text, write_report
from mue.lab.report.plan_page import pictures_section, plan_sections
from mue.lab.report.routers import router_sections, routers_table
from mue.lab.train.run import CONFIG_FILE, Run, Store
from mue.lab.train.task import task_of
from mue.util.text import number


def run_report(folder: Path, *, pictures: bool = False) -> Path:
    """Write the report of one training run into its folder.

    Args:
        folder: ``<store>/runs/<key>``. pictures: of the plan's factors, which take half a second to draw.

    Returns:
        The page's path.

    Raises:
        ValueError: the run has not ended.
    """
    store = Store(folder.parent.parent)
    run, result = store.run(folder.name), store.result(folder.name)
    if run is None or result is None:
        raise ValueError(f"{folder} has no result yet: train it to its end first")
    metrics, unit = store.metrics(run.key), task_of(run.settings).unit
    curve = {
        "label": result["name"],
        "color": plots.MUE,
        "metrics": metrics,
        "flops_per_token": result["flops_per_token"],
    }
    sections = [Section(id="loss", title="Loss", figure=plots.loss_figure([curve], unit))]
    sections += router_sections(run, metrics, store.routers(run.key))
    sections += [*plan_sections(run.plan), *([pictures_section(run.plan)] if pictures else [])]
    sections += [runs_section([("run", run, result)], [("data", run.data["hash"])])]
    held = result["val_loss"]
    lead = (
        f"validation loss {number(held)} {unit} after {result['tokens']:,} tokens" if held is not None else "diverged"
    )
    return write_report(folder, f"Training {result['name']}", lead, sections)


def folder_report(folder: Path) -> Path:
    """Write the report of every run in a folder that has ended.

    Args:
        folder: of a store: its runs are in ``runs/<key>``.

    Returns:
        The one run's page; of several the page that compares them, ``folder/report.html``.

    Raises:
        ValueError: no run in it has ended.
    """
    store = Store(folder)
    ended: list[Path] = []
    open_: list[Path] = []
    for config in sorted(folder.glob(f"runs/*/{CONFIG_FILE}")):
        (open_ if store.result(config.parent.name) is None else ended).append(config.parent)
    if not ended:
        raise ValueError(
            f"none of the {len(open_)} runs in {folder} has ended: start the command again to go on with them"
        )
    pages = [run_report(run, pictures=len(ended) == 1) for run in ended]
    return pages[0] if len(ended) == 1 and not open_ else _comparison(folder, ended, open_)


def _comparison(folder: Path, ended: list[Path], open_: list[Path]) -> Path:
    store = Store(folder)
    found = []
    for path in ended:
        run = store.run(path.name)
        assert run is not None, "the folder was found by its config"
        found.append((run, store.result(path.name) or {}))
    found.sort(key=lambda pair: (pair[1]["val_loss"] is None, pair[1]["val_loss"]))  # the lowest first
    names = labels([run for run, _ in found])
    figures: list[Section] = []
    for unit in dict.fromkeys(
        task_of(run.settings).unit for run, _ in found
    ):  # losses of two units have no axis in common
        curves: list[dict[str, Any]] = [
            {
                "label": name,
                "color": plots.CYCLE[i % len(plots.CYCLE)],
                "metrics": store.metrics(run.key),
                "flops_per_token": result["flops_per_token"],
            }
            for i, (name, (run, result)) in enumerate(zip(names, found, strict=True))
            if task_of(run.settings).unit == unit
        ]
        number_of = f" {len(figures) + 1}" if figures else ""
        figures.append(
            Section(id=f"loss{number_of.strip()}", title=f"Loss, {unit}", figure=plots.loss_figure(curves, unit))
        )
    data = dict.fromkeys(run.data["hash"] for run, _ in found)
    rows = runs_section([(n, *pair) for n, pair in zip(names, found, strict=True)], [("data", ", ".join(data))])
    if open_:
        rows.texts.append(text(f"Not ended yet, and left out: {', '.join(path.name for path in open_)}.", warn=True))
    lowest, best = found[0][1]["val_loss"], names[0]
    lead = f"the lowest validation loss is {number(lowest)} ({best})" if lowest is not None else "every run diverged"
    routers = routers_table([(name, run, store.metrics(run.key)) for name, (run, _) in zip(names, found, strict=True)])
    return write_report(folder, f"{len(found)} training runs", lead, [*figures, *routers, rows])


def labels(runs: list[Run]) -> list[str]:
    """A name for each run: what it does not share with all others, and its key where that is not enough."""
    facts = [
        {
            "": run.plan.target.name,
            "rule": run.plan.rule.name,
            "lr": number(run.plan.tuned.lr),
            "wd": number(run.plan.tuned.weight_decay),
            "std": number(run.plan.tuned.init_std),
            "steps": str(run.plan.training.steps) if run.plan.training else "",
            "seed": str(run.settings.seed),
        }
        for run in runs
    ]
    telling = [key for key in facts[0] if len({fact[key] for fact in facts}) > 1]
    names = [", ".join(f"{key} {fact[key]}".strip() for key in telling) for fact in facts]
    return [
        name if name and names.count(name) == 1 else f"{name} {run.key[:8]}".strip()
        for name, run in zip(names, runs, strict=True)
    ]
