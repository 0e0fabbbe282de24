"""The part of a report that is about drawn images: grids over training, the loss at fixed times, whose patches an expert takes and when.

From a run's rows (``drawn``) and its ``task.json`` (``mue.lab.models.at_times``); what is not there is left out.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mue.lab.report.grids import Pixels, grid
from mue.lab.report.page import Section, text
from mue.lab.report.plots import BARE, CYCLE, STYLE, figure
from mue.lab.report.router_plots import drawn, load_map
from mue.util.statistics import Mean, mean_of

Rows = Sequence[Mapping[str, Any]]
Seen = tuple[Rows, Mapping[str, Any] | None]
"""A run's rows of metrics, and what its task kept at its end."""
_GRIDS, _EXPERTS, _LAYERS = 8, 16, 4


def image_sections(runs: Mapping[str, Seen], unit: str) -> list[Section]:
    """All that a page says of images; nothing where its runs draw none.

    Args:
        runs: by name. The last of them is the one whose grids and experts are shown.
    """
    name, (rows, _) = list(runs.items())[-1]
    sections = _grids(name, rows)
    # any task may keep anything: what is not of at_times is not spoken of here
    by_run = {run: kept for run, (_, kept) in runs.items() if kept and {"times", "losses"} <= kept.keys()}
    if by_run:
        sections.append(_times(by_run, unit))
    return sections + (_experts(by_run[name]) if name in by_run and by_run[name].get("by_time") else [])


def pixels_of(row: Mapping[str, Any]) -> Pixels:
    """The images (N, C, H, W) that a row of metrics has."""
    flat = np.frombuffer(base64.b64decode(row["drawn"]["bytes"]), np.uint8)
    return flat.reshape(row["drawn"]["shape"])


def way_words(way: Mapping[str, Any]) -> str:
    """How images were drawn, from the fields of a :class:`mue.lab.models.sampling.Sampling`."""
    return f"guidance {way['guidance']:g}, {way['steps']} steps of {way['sampler'].title()}'s method"


def _grids(name: str, rows: Rows) -> list[Section]:
    refused = dict.fromkeys(row["not_drawn"] for row in rows if row.get("not_drawn"))
    texts = [text(f"{name} was not drawn from at every validation: {reason}.", warn=True) for reason in refused]
    rows = [row for row in rows if row.get("drawn")]
    title = "What it draws, over training"
    if not rows:
        return [Section(id="drawn", title=title, texts=texts)] if texts else []
    shown = [rows[i] for i in sorted({round(i * (len(rows) - 1) / (_GRIDS - 1)) for i in range(_GRIDS)})]
    images = [pixels_of(row) for row in shown]
    way = shown[-1]["drawn"].get("way")  # rows of before do not say it
    how = f": {way_words(way)}" if way else ""
    with mpl.rc_context(BARE):
        columns = len(images[0])
        fig = Figure(figsize=(0.72 * columns + 1.2, 0.72 * len(shown) + 0.2), layout="constrained")
        axes = fig.subplots()
        picture = grid(np.concatenate(images), columns)
        axes.imshow(picture, interpolation="nearest")
        each = picture.shape[0] / len(shown)
        axes.set_yticks([(i + 0.5) * each for i in range(len(shown))], [f"step {row['step']:,}" for row in shown])
        axes.set_xticks([])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return [
        Section(
            id="drawn",
            title=title,
            texts=texts,
            figure=fig,
            caption=f"{name}: one class a column, the same noise in every row. Drawn with the weights of the step{how}.",
            in_page="png",
        )
    ]


def _times(runs: Mapping[str, Mapping[str, Any]], unit: str) -> Section:
    means = {name: [mean_of(losses) for losses in found["losses"]] for name, found in runs.items()}
    with mpl.rc_context(STYLE):
        fig, (axes,) = figure(6.4, 3.4)
        for (name, found), color in zip(runs.items(), CYCLE, strict=False):
            values = [mean.value for mean in means[name]]
            low, high = ([m.value + sign * m.half for m in means[name]] for sign in (-1, 1))
            axes.plot(found["times"], values, "o-", color=color, label=name)
            axes.fill_between(found["times"], low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel("time: 0 image, 1 noise")
        axes.set_ylabel(unit)
        axes.legend()
    first, *others = runs
    header = ["time", *runs, *(f"{other} − {first}" for other in others)]
    rows = []
    for i, time in enumerate(runs[first]["times"]):
        apart = [
            mean_of([b - a for a, b in zip(runs[first]["losses"][i], runs[other]["losses"][i], strict=True)])
            for other in others
        ]
        rows.append([f"{time:.2f}", *(means[name][i].text(4) for name in runs), *(_signed(mean) for mean in apart)])
    return Section(
        id="times",
        title="Held-out loss at fixed times",
        figure=fig,
        caption="The same held-out images with the same noise at every time and for every model; means with 95 % intervals over images."
        " Times are the middles of equally likely parts of the training's.",
        header=header,
        rows=rows,
    )


def _signed(mean: Mean) -> str:
    return f"{mean.value:+.4f} ± {mean.half:.4f}" if math.isfinite(mean.half) else f"{mean.value:+.4f}"


def _experts(found: Mapping[str, Any]) -> list[Section]:
    """Load by time and by place, of the layers that are drawn."""
    layers = drawn(len(found["by_time"]))
    with mpl.rc_context(BARE):
        by_time, axes = figure(9.6, 2.9, len(layers))
        for panel, layer in zip(axes, layers, strict=True):
            table = np.array(found["by_time"][layer]).T  # experts by times
            image = load_map(panel, table * len(table))
            panel.set_xticks(range(len(found["times"])), [f"{t:.2f}" for t in found["times"]], rotation=90, fontsize=7)
            panel.set_title(f"block {layer + 1} with experts", fontsize=9)
            panel.yaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set_xlabel("time")
        axes[0].set_ylabel("expert")
        by_time.colorbar(image, ax=axes, label="load ÷ fair share", shrink=0.9)
        layers = layers[:: max(1, math.ceil(len(layers) / _LAYERS))]
        experts = min(_EXPERTS, len(found["by_place"][0][0]))
        by_place = Figure(figsize=(9.6, 0.75 * len(layers) + 0.5), layout="constrained")
        maps = by_place.subplots(len(layers), experts, squeeze=False)
        for row, layer in zip(maps, layers, strict=True):
            table = np.array(found["by_place"][layer])  # places by experts
            side = math.isqrt(len(table))
            for expert, panel in enumerate(row):
                image = load_map(panel, table[:, expert].reshape(side, side) * table.shape[1])
                panel.set_xticks([])
                panel.set_yticks([])
                panel.set_title(f"{expert}" if layer == layers[0] else "", fontsize=8)
            row[0].set_ylabel(f"block {layer + 1}", fontsize=8)
        by_place.colorbar(image, ax=maps, label="load ÷ fair share", shrink=0.9)
    spread = [_spread(found["by_time"][i], found["by_place"][i]) for i in range(len(found["by_time"]))]
    words = (
        "An expert's share moves over the times by a factor of up to "
        f"{max(by for by, _ in spread):.1f}, and over the places of an image by up to {max(by for _, by in spread):.1f}."
    )
    return [
        Section(
            id="experts-by-time",
            title="Experts' load by time step",
            texts=[text(words)],
            figure=by_time,
            caption="White: a fair share of a time's pairs; orange: more; purple: less. On held-out images.",
        ),
        Section(
            id="experts-by-place",
            title="Experts' load by image position",
            figure=by_place,
            caption="A map for each expert, of the image's patches over all times; colours as above.",
        ),
    ]


def _spread(by_time: Sequence[Sequence[float]], by_place: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The largest ratio of an expert's shares, over times and over places, of those that take a tenth of a fair share or more."""

    def largest(rows: Sequence[Sequence[float]]) -> float:
        table = np.clip(np.array(rows), 0.1 / len(rows[0]), None)
        return float((table.max(0) / table.min(0)).max())

    return largest(by_time), largest(by_place)
