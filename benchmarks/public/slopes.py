"""How far log2(lr*) moves per doubling: one line per series of cells, their mean over series, intervals two ways.

A series is every cell of one shape at one batch (over tokens), at one number of tokens (over batch), or of one number of steps
(over batch and tokens together). Slopes of series are averaged with a variance between series (DerSimonian and Laird, 1986). The
95 % interval is by a bootstrap over series (2,000 times), and again, more cautiously, Student's over the shapes, of which there
are four or five: series of one shape share architecture, code and data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mue.util.statistics import student_quantile
from public.cells import Cell

RESAMPLES = 2000
LEAST = 3  # cells of a series

Estimate = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """A line through the cells of one series: octaves of lr* per doubling."""

    shape: str
    label: str
    slope: float
    error: float
    cells: int


def log2_tokens(cell: Cell) -> float:
    return math.log2(cell.tokens)


def log2_batch(cell: Cell) -> float:
    return math.log2(cell.batch)


AXES: dict[str, tuple[Callable[[Cell], Hashable], Callable[[Cell], float]]] = {
    "tokens, batch fixed": (lambda c: c.batch, log2_tokens),
    "batch, tokens fixed": (lambda c: c.tokens, log2_batch),
    "batch, steps fixed": (lambda c: round(math.log2(c.steps), 2), log2_batch),
}
"""By name: what the cells of a series share beside the shape, and what its line runs over."""


def position(cell: Cell) -> float:
    return cell.valley.minimum


def series_of(cells: Sequence[Cell], axis: str, place: Callable[[Cell], float] = position) -> list[Series]:
    """The series of an axis that have at least ``LEAST`` cells."""
    fixed, along = AXES[axis]
    groups: dict[tuple[str, Hashable], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.shape.name, fixed(cell)), []).append(cell)
    found = []
    for (shape, label), members in groups.items():
        if len(members) < LEAST or len({along(c) for c in members}) < LEAST:
            continue
        x = np.array([along(c) for c in members])
        y = np.array([place(c) for c in members])
        weight = 1 / np.array([c.valley.error for c in members]) ** 2
        middle = (weight * x).sum() / weight.sum()
        spread = (weight * (x - middle) ** 2).sum()
        slope = (weight * (x - middle) * y).sum() / spread
        found.append(
            Series(shape, f"{label:g}" if isinstance(label, float) else str(label), slope, spread**-0.5, len(members))
        )
    return found


def pooled(values: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Mean with a variance between (DerSimonian and Laird), and the standard deviation between."""
    weight = errors**-2
    mean = (weight * values).sum() / weight.sum()
    q = (weight * (values - mean) ** 2).sum()
    scale = weight.sum() - (weight**2).sum() / weight.sum()
    between = max(0.0, (q - (len(values) - 1)) / scale) if scale > 0 else 0.0
    weight = 1 / (errors**2 + between)
    return float((weight * values).sum() / weight.sum()), math.sqrt(between)


def student(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's distribution; None of a single value."""
    if len(values) < 2:
        return None
    half = student_quantile(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def slope(cells: Sequence[Cell], axis: str, place: Callable[[Cell], float] = position, seed: int = 0) -> Estimate:
    """The mean slope of an axis: its two intervals, the spread between series, and each shape's own mean."""
    series = series_of(cells, axis, place)
    if not series:
        return {"slope": None, "series": 0}
    values, errors = np.array([s.slope for s in series]), np.array([s.error for s in series])
    mean, between = pooled(values, errors)
    draws = np.random.default_rng(seed).integers(0, len(series), (RESAMPLES, len(series)))
    low, high = np.quantile([pooled(values[d], errors[d])[0] for d in draws], (0.025, 0.975))
    by_shape = {}
    for name in dict.fromkeys(s.shape for s in series):
        own = np.array([s.shape == name for s in series])
        by_shape[name] = pooled(values[own], errors[own])[0]
    return {
        "slope": mean,
        "interval": [float(low), float(high)],
        "over_shapes": student(list(by_shape.values())),
        "between_series": between,
        "by_shape": by_shape,
        "series": len(series),
        "cells": sum(s.cells for s in series),
    }


def surface(cells: Sequence[Cell], terms: dict[str, Callable[[Cell], float]], seed: int = 0) -> Estimate:
    """log2(lr*) as a constant for each shape plus one coefficient for each term, by weighted least squares.

    The weights have the variance of a cell and one between cells. Intervals by a bootstrap over the series of one shape and
    number of tokens.
    """
    names = list(dict.fromkeys(c.shape.name for c in cells))
    columns = [[float(c.shape.name == n) for c in cells] for n in names]
    extra = np.array([[term(c) for c in cells] for term in terms.values()])
    design = np.vstack([columns, extra - extra.mean(axis=1, keepdims=True)]).T
    y, own = np.array([position(c) for c in cells]), np.array([c.valley.error**2 for c in cells])
    groups: dict[tuple[str, float], list[int]] = {}
    for i, c in enumerate(cells):
        groups.setdefault((c.shape.name, c.tokens), []).append(i)
    coefficients, between = _weighted(design, y, own)
    rng, members = np.random.default_rng(seed), list(groups.values())
    draws = []
    for _ in range(RESAMPLES // 4):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        if (design[rows][:, : len(names)].sum(axis=0) > 0).all():
            draws.append(_weighted(design[rows], y[rows], own[rows])[0][len(names) :])
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    found = coefficients[len(names) :]
    return {
        "terms": {
            n: {"value": float(v), "interval": [float(a), float(b)]}
            for n, v, a, b in zip(terms, found, low, high, strict=True)
        },
        "residual": between,
        "cells": len(cells),
        "by_shape": dict(zip(names, map(float, coefficients), strict=False)),
    }


def _weighted(design: np.ndarray, y: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares with the cells' own variance and one between cells, that which makes the weighted squares their number.

    Paule and Mandel (1982). Ordinary residuals less the mean own variance would be nothing where a few cells know little, and
    then the few sharpest cells would decide alone.
    """

    def fit(between: float) -> tuple[np.ndarray, float]:
        root = 1 / np.sqrt(own + between)
        coefficients = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
        return coefficients, float((((y - design @ coefficients) * root) ** 2).sum())

    freedom, low, high = len(y) - design.shape[1], 0.0, 4.0
    if fit(0.0)[1] <= freedom:
        return fit(0.0)[0], 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fit(middle)[1] > freedom else (low, middle)
    return fit(high)[0], math.sqrt(high)
