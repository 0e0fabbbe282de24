"""What the demo on images found, in sentences and as a page, from its summary and its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
from matplotlib.figure import Figure

from mue.lab.demo.report import loss_section, mean_of_seeds
from mue.lab.report import plots
from mue.lab.report.images import image_sections, way_words
from mue.lab.report.page import Section, runs_section, text, write_report
from mue.lab.report.plan_page import plan_sections
from mue.lab.report.routers import router_sections
from mue.lab.sweep.report import sweep_section
from mue.lab.sweep.result import Cell
from mue.lab.train.run import Run, Store
from mue.lab.train.task import task_of
from mue.lab.valley.multiplier_check import MultiplierCheck


def findings(summary: Mapping[str, Any]) -> list[str]:
    """The results in sentences, whatever they say.

    Args:
        summary: what ``demo.json`` holds.
    """
    runs, scores, way = summary["runs"], summary["scores"], summary["way"]
    of_seeds = summary["transferred"]
    moe, dense, base = mean_of_seeds(of_seeds["MoE"]), mean_of_seeds(of_seeds["dense"]), runs["base"]["val_loss"]
    out = []
    diverged = [name for name, run in runs.items() if run["val_loss"] is None and "×" not in name]
    if diverged:
        out.append(f"Diverged, with no held-out loss and nothing drawn: {'; '.join(diverged)}.")
    if moe is not None and dense is not None and base is not None:
        pairs = [100 * (a / b - 1) for a, b in zip(of_seeds["MoE"], of_seeds["dense"], strict=True)]
        apart = f"{statistics.mean(pairs):+.1f} % ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}"
        out.append(
            f"Held-out loss, squared error per pixel, means of {len(pairs)} seeds, nothing retuned: the MoE reaches {moe:.4f}, the dense model of equal"
            f" active FLOPs {dense:.4f} ({apart}, one standard error); the tuned base reached {base:.4f} in"
            f" {runs['base']['tokens'] / runs['MoE']['tokens']:.2g} times the tokens."
        )
    losses = {float(m): loss for m, loss in summary["check"]["losses"].items()}
    around = ", ".join(f"{'diverged' if losses[m] is None else f'{losses[m]:.4f}'} at {m:g}×" for m in sorted(losses))
    out.append(f"Around the transferred rate the MoE ends so (one seed): {around}.")
    for name, own in scores.items():
        share, low, high = own["asked"]
        out.append(
            f"Of {own['count']} digits that the {name} draws at guidance {way['guidance']:g}, {share:.1%} ({low:.1%} to {high:.1%}) are of the class asked"
            f" for, by a classifier that is right on {own['accuracy']:.1%} of held-out digits."
        )
    own = scores.get("MoE")
    if own is None:
        return out
    if own["distance"] is not None:
        out.append(
            f"The Fréchet distance to the training digits, in {own['features']} (no FID), is {own['distance']:.2f} for the MoE's samples; for held-out"
            f" digits it is {own['floor']:.2f}."
        )
    copies = own["copies"]
    out.append(
        f"Copies: the MoE's samples lie {copies['samples']:.3f} from their nearest training digit, held-out digits {copies['held_out']:.3f} (medians);"
        f" {copies['share']:.1%} of the samples are nearer than the nearest 5 % of held-out digits."
    )
    return out


def write_diffusion_report(
    store: Store,
    named: Mapping[str, Run],
    results: Mapping[str, dict[str, Any]],
    summary: Mapping[str, Any],
    cells: Sequence[Cell],
    samples: Path | None,
) -> Path:
    """Write ``report.html`` and its pictures into the store's folder.

    Args:
        named, results: every run after the sweep, and its result, by name. summary: what ``demo.json`` holds.
        cells: of the sweep. samples: the PNG of digits; None where the MoE diverged.
    """
    moe, unit = named["MoE"], task_of(named["MoE"].settings).unit
    check = MultiplierCheck.from_dict(summary["check"])
    points = [(math.log2(m), loss) for m, loss in check.losses.items()]
    valley = {"label": "complete-mue", "points": points, "valley": check.valley, "color": plots.MUE}
    seen = {name: (store.metrics(named[name].key), store.of_task(named[name].key)) for name in ("dense", "base", "MoE")}
    sections = [
        Section(
            id="digits",
            title="Digits that the MoE draws",
            texts=[text(sentence) for sentence in findings(summary)],
            figure=None if samples is None else _picture(samples),
            caption=f"A class a column, a seed a row: {way_words(summary['way'])}. None was picked.",
            in_page="png",
        ),
        *([_scores(summary["scores"])] if summary["scores"] else []),
        *image_sections(seen, unit),
        loss_section(store, named, results, unit),
        Section(id="check", title="Around the transferred rate", figure=plots.check_figure([valley], unit)),
        sweep_section(summary["sweep"], cells),
        *plan_sections(moe.plan),
        *router_sections(moe, store.metrics(moe.key), store.routers(moe.key)),
        runs_section(
            [(name, run, results[name]) for name, run in named.items()],
            [
                ("command", f"{summary['command']}, {summary['seconds']:.0f} s"),
                ("machine", f"{summary['machine']}, torch {summary['torch']}, Python {summary['python']}"),
                ("code", f"mue {summary['mue']}, git {summary['git']}"),
                ("data", f"{summary['data']['train_images']:,} images, sha256 {summary['data']['hash']}"),
            ],
        ),
    ]  # fmt: skip
    share = [own["asked"][0] for name, own in summary["scores"].items() if name == "MoE"]
    held = {name: mean_of_seeds(losses) for name, losses in summary["transferred"].items()}
    cards = [
        ("learning rate tuned on the base", f"{summary['sweep']['tuned']['lr']:.2e}"),
        *((f"held-out loss, {name}", "diverged" if loss is None else f"{loss:.4f}") for name, loss in held.items()),
        *(("digits of the class asked for", f"{asked:.1%}") for asked in share),
    ]
    lead = f"Tuned on {results['base']['name']}, trained {results['MoE']['name']} with what follows from it, on scikit-learn's handwritten digits."
    return write_report(store.root, "Tune one dense diffusion transformer, train the MoE", lead, sections, cards)


def _picture(path: Path) -> Figure:
    pixels = matplotlib.image.imread(path)
    with mpl.rc_context(plots.BARE):
        fig = Figure(figsize=(pixels.shape[1] / 80, pixels.shape[0] / 80))
        axes = fig.add_axes((0, 0, 1, 1))
        axes.imshow(pixels, interpolation="nearest")
        axes.axis("off")
        return fig


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> Section:
    header = [
        "",
        "samples",
        "of the class asked for",
        "Fréchet distance",
        "its floor",
        "nearest training image",
        "nearer than 5 %",
    ]
    rows = []
    for name, own in scores.items():
        share, low, high = own["asked"]
        copies = own["copies"]
        distance, floor = ("–" if own[k] is None else f"{own[k]:.3f}" for k in ("distance", "floor"))
        rows.append(
            [name, str(own["count"]), f"{share:.1%} ({low:.1%} to {high:.1%})", distance, floor, f"{copies['samples']:.3f}", f"{copies['share']:.1%}"]
        )  # fmt: skip
    one = next(iter(scores.values()))
    rows.append(
        ["held-out images", "", f"{one['accuracy']:.1%}", rows[0][4], "", f"{one['copies']['held_out']:.3f}", "5 %"]
    )
    return Section(
        id="scores",
        title="Judged by images that were held out",
        texts=[
            text(
                f"The Fréchet distance is to the training images, in {one['features']}, each in units of its spread over them; the floor is that of the held-out images."
                " It is no FID: that is of Inception's 2,048 features. Distances to the nearest training image are root mean squares over pixels, medians."
            )
        ],
        header=header,
        rows=rows,
    )
