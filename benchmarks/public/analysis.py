"""Everything that the page quotes, from the runs of both files to one dictionary of numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mue.lab.valley import LossPoint, fit_valley
from mue.util.statistics import student_quantile
from public import marin
from public import slopes as lines
from public.batches import along_best, best_batches, by_bin, explained_by, group, off_best, saturating
from public.cells import Cell, PublishedRun, Valley, cells_of, converged
from public.laws import LAWS, folded_change
from public.score import cheapest, scenarios, score, upward
from public.slopes import AXES, Estimate, log2_batch, log2_tokens, position, slope, student, surface
from public.steplaw import FINAL_LR, WEIGHT_DECAY

REGIONS: dict[str, Callable[[float], bool]] = {
    "all": lambda off: True,
    "below the best batch": lambda off: off <= 0,
    "within an octave of it": lambda off: abs(off) <= 1,
    "above it": lambda off: off >= 0,
}
LONG = 10_000  # steps: five times the warmup that the paper is remembered to have


def exponents(cells: Sequence[Cell]) -> Estimate:
    """p and q of lr* ∝ B^p D^-q with a constant for each shape: bootstrap interval, and Student's over shapes fitted alone."""
    terms = {"p": log2_batch, "q": lambda c: -log2_tokens(c)}
    found = surface(cells, terms)
    alone: dict[str, dict[str, float]] = {}
    for name in found.pop("by_shape"):
        own = [c for c in cells if c.shape.name == name]
        if len(own) >= 5 and len({c.tokens for c in own}) >= 2 and len({c.batch for c in own}) >= 2:
            design = np.array([[1.0, log2_batch(c), -log2_tokens(c)] for c in own])
            weight = np.array([1 / (c.valley.error**2 + 0.1**2) for c in own])
            fit = np.linalg.lstsq(
                design * weight[:, None] ** 0.5, np.array([position(c) for c in own]) * weight**0.5, rcond=None
            )[0]
            alone[name] = {"p": float(fit[1]), "q": float(fit[2])}
    for i in found["terms"]:
        values = [own[i] for own in alone.values()]
        found["terms"][i] |= {"over_shapes": student(values), "by_shape": {n: own[i] for n, own in alone.items()}}
    return found


def by_region(cells: Sequence[Cell]) -> dict[str, Estimate]:
    """:func:`exponents` of the cells below, at and above the best batch, and of all."""
    off = off_best(cells)
    return {name: exponents([c for i, c in enumerate(cells) if holds(off[i])]) for name, holds in REGIONS.items()}


def second_opinion(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells with the valley of ``mue.lab.valley.fit_valley``; those that it cannot bracket are left out."""
    found = []
    for cell in cells:
        fit = fit_valley([LossPoint(x, y) for x, y in converged(cell.runs)])
        if fit.determined:
            error = (fit.interval[1] - fit.interval[0]) / (2 * 1.96)
            found.append(replace(cell, valley=Valley(fit.minimum, error, fit.curvature, fit.loss_at_minimum)))
    return found


def mean_rate(cells: Sequence[Cell]) -> list[Cell]:
    """Positions as log2 of the mean of peak and final rate: what a cosine from one to the other averages, times a constant."""
    return [replace(c, valley=replace(c.valley, minimum=math.log2((2.0 ** position(c) + FINAL_LR) / 2))) for c in cells]


def sensitivities(runs: Sequence[PublishedRun], cells: Sequence[Cell]) -> dict[str, Any]:
    """p and q again, below, above and over all batches, with one choice of the fit changed at a time."""
    variants = {
        "as described": list(cells),
        "mue.lab.valley.fit_valley": second_opinion(cells),
        "parabola over 1 octave to each side": cells_of(runs, 1.0)[0],
        "parabola over 2 octaves to each side": cells_of(runs, 2.0)[0],
        "mean rate in place of the peak": mean_rate(cells),
        f"only runs of {LONG:,} steps or more": [c for c in cells if c.steps >= LONG],
    }
    best, rows = best_batches(cells), {}
    for name, some in variants.items():
        rows[name] = {"cells": len(some)}
        for region in ("all", "below the best batch", "above it"):
            part = [c for c in some if group(c) in best and REGIONS[region](log2_batch(c) - best[group(c)])]
            found = surface(part, {"p": log2_batch, "q": lambda c: -log2_tokens(c)})["terms"]
            rows[name][region] = {
                term: [round(found[term]["value"], 3), *found[term]["interval"]] for term in ("p", "q")
            }
    return rows


def size(cells: Sequence[Cell]) -> Estimate:
    """Exponents of lr* at the best batch in size, over dense shapes; in width and depth apart as far as five shapes tell."""
    best = best_batches(cells)
    rows = []
    for key, at in best.items():
        own = sorted((c for c in cells if group(c) == key), key=log2_batch)
        rows.append(
            (
                own[0].shape,
                math.log2(key[1]),
                float(np.interp(at, [log2_batch(c) for c in own], [position(c) for c in own])),
            )
        )
    y = np.array([rate for *_, rate in rows])
    one = np.array([[1.0, tokens, math.log2(s.total)] for s, tokens, _ in rows])
    two = np.array([[1.0, tokens, math.log2(s.width), math.log2(s.layers)] for s, tokens, _ in rows])
    names = list(dict.fromkeys(s.name for s, *_ in rows))

    def without(design: np.ndarray, name: str) -> np.ndarray:
        keep = np.array([s.name != name for s, *_ in rows])
        return np.linalg.lstsq(design[keep], y[keep], rcond=None)[0]

    def jackknife(design: np.ndarray) -> list[dict[str, Any]]:
        whole = np.linalg.lstsq(design, y, rcond=None)[0]
        left = np.array([without(design, name) for name in names])
        error = np.sqrt((len(names) - 1) / len(names) * ((left - left.mean(axis=0)) ** 2).sum(axis=0))
        reach = student_quantile(0.975, len(names) - 1)
        return [
            {"value": float(v), "interval": [float(v - reach * e), float(v + reach * e)]}
            for v, e in zip(whole[1:], error[1:], strict=True)
        ]

    widths, depths = np.log2([[s.width, s.layers] for s, *_ in rows]).T
    return {
        "by size": dict(zip(("tokens", "total"), jackknife(one), strict=True)),
        "by width and depth": dict(zip(("tokens", "width", "layers"), jackknife(two), strict=True)),
        "correlation of width and depth": float(np.corrcoef(widths, depths)[0, 1]),
    }


def step_law(cells: Sequence[Cell]) -> Estimate:
    """Octaves that Step Law's own constants lie above lr* at the best batch: mean and extremes, by total and by active parameters."""
    best, found = best_batches(cells), {}
    for law in LAWS[:2]:
        off = []
        for key, at in best.items():
            own = sorted((c for c in cells if group(c) == key), key=log2_batch)
            off.append(
                law.log2_lr(own[0]) - float(np.interp(at, [log2_batch(c) for c in own], [position(c) for c in own]))
            )
        found[law.name] = [float(np.mean(off)), min(off), max(off)]
    return found


def shapes(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Pairs of MoE shapes at equal tokens and batch: how far lr* moves, and what the folded rule says of each matrix."""
    names = list(dict.fromkeys(c.shape.name for c in cells))
    by = {(c.shape.name, c.tokens, c.batch): c for c in cells}
    order = sorted(names, key=lambda n: next(c.shape.active for c in cells if c.shape.name == n))
    best, found = best_batches(cells), []
    for base, target in [*itertools.pairwise(order), (order[0], order[-1])]:
        both = [(by[base, t, b], c) for (n, t, b), c in by.items() if n == target and (base, t, b) in by]
        moved = np.array([position(t) - position(b) for b, t in both])
        rng = np.random.default_rng(0)
        tokens = np.array([t.tokens for _, t in both])
        levels = np.unique(tokens)
        means = [
            np.concatenate([moved[tokens == level] for level in rng.choice(levels, len(levels))]).mean()
            for _ in range(lines.RESAMPLES // 2)
        ]
        a, b = both[0][0].shape, both[0][1].shape
        most = max(levels)
        near = [
            m
            for m, (_, t) in zip(moved, both, strict=True)
            if t.tokens == most and abs(log2_batch(t) - best[group(t)]) <= 1
        ]
        found.append(
            {
                "from": base,
                "to": target,
                "moved": float(moved.mean()),
                "interval": [float(q) for q in np.quantile(means, (0.025, 0.975))],
                "near the best batch at most tokens": float(np.mean(near)),
                "active width": b.active_width / a.active_width,
                "log2 share of tokens": math.log2((b.chosen / b.experts) / (a.chosen / a.experts)),
                "complete-mue, folded": folded_change("complete-mue", a, b),
            }
        )
    return found


def analyse(runs: Mapping[str, Sequence[PublishedRun]]) -> dict[str, Any]:
    """All of it; ``runs`` by kind, "moe" and "dense"."""
    cells, found = {}, {}
    for kind, own in runs.items():
        cells[kind], whole = cells_of(own)
        curvature = np.array([c.valley.curvature for c in cells[kind]])
        decays = np.array([2.0 ** position(c) * WEIGHT_DECAY * c.steps for c in cells[kind]])
        found[kind] = {
            "runs": len(own),
            "cells": len(cells[kind]),
            "cells of all": whole,
            "error of a cell": float(np.median([c.valley.error for c in cells[kind]])),
            "curvature": [float(q) for q in np.quantile(curvature, (0.1, 0.5, 0.9))],
            "decays at the best rate": [float(decays.min()), float(np.median(decays)), float(decays.max())],
            "slopes": {axis: slope(cells[kind], axis) for axis in AXES},
            "exponents": by_region(cells[kind]),
            "local": {axis: by_bin(cells[kind], axis) for axis in ("batch", "tokens")},
            "along the best batch": along_best(cells[kind]),
            "bend": saturating(cells[kind]),
            "explained by": explained_by(cells[kind]),
            "Step Law's constants": step_law(cells[kind]),
            "sensitivities": sensitivities(own, cells[kind]),
        }
    found["moe"]["shapes"] = shapes(cells["moe"])
    found["dense"]["size"] = size(cells["dense"])
    found["scores"] = {name: score(pairs) for name, pairs in scenarios(cells["moe"], cells["dense"]).items()}
    found["cheapest exponents"] = {
        f"{kind}, {where}": cheapest(upward(own, most))
        for kind, own in cells.items()
        for where, most in (("within 1.5 octaves of the best batch", 1.5), ("all batches", math.inf))
    }
    found["marin"] = {"tokens": marin.tokens_slope(), "curvature at d512": marin.curvature()}
    found["laws"] = {law.name: {"exponents": dict(law.exponents), "source": law.source} for law in LAWS}
    return found
