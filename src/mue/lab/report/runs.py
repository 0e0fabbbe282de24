"""The report of a run, and of a folder of runs, as ``mue train -o`` leaves it: the page of each, and one that compares them where there
are several."""

from __future__ import annotations

from pathlib import Path

from mue.lab.report import plots
from mue.lab.report.compare import compare_folders, runs_in
from mue.lab.report.images import image_sections
from mue.lab.report.page import Section, runs_section, write_report
from mue.lab.report.plan_page import pictures_section, plan_sections
from mue.lab.report.routers import router_sections
from mue.lab.train.run import Store
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
    sections += image_sections({result["name"]: (metrics, store.of_task(run.key))}, unit)
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
    ended, open_ = runs_in(folder)
    pages = [run_report(run.folder, pictures=len(ended) == 1) for run in ended]
    return pages[0] if len(ended) == 1 and not open_ else compare_folders([folder], folder)
