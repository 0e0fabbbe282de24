"""The batch that is best for the loss, slopes below and above it, and one curve for both.

Found after the fits, not foreseen in them: lr* is a power of neither batch nor tokens. Below the best batch it rises with the batch
and falls with tokens; above it, it hardly moves with the batch and rises with tokens. One curve has both,

    lr* = c(shape) · D^a · (1 + (B_n/B)^m)^(-κ/m),   B_n = B_0 · (D/D_0)^γ,

whose slopes are κ over batch and a - γ·κ over tokens where B is far below B_n, 0 and a where it is far above; m says how sharp the bend is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from public import slopes as lines
from public.cells import Cell
from public.slopes import Estimate, log2_batch, log2_tokens, pooled, position, student

NEAR = 1.6  # octaves about the lowest loss that the parabola over batch is fitted to
EDGES = (-9.0, -1.5, -0.5, 0.5, 1.5, 9.0)  # octaves of batch against the best one
_D0 = 33.0  # log2 tokens that constants are quoted at: 8.6 B


def group(cell: Cell) -> tuple[str, float]:
    """Cells that differ in batch alone."""
    return cell.shape.name, cell.tokens


def best_batches(cells: Sequence[Cell]) -> dict[tuple[str, float], float]:
    """log2 of the batch with the lowest loss at its own best learning rate, for each shape and number of tokens."""
    found = {}
    for key in dict.fromkeys(map(group, cells)):
        x, y = np.array([(log2_batch(c), c.valley.loss) for c in cells if group(c) == key]).T
        lowest = x[y.argmin()]
        near = abs(x - lowest) <= NEAR
        found[key] = float(lowest)
        if near.sum() >= 3:
            curve, slope, _ = np.polyfit(x[near] - lowest, y[near], 2)
            if curve > 0:
                found[key] = float(np.clip(lowest - slope / (2 * curve), x.min(), x.max()))
    return found


def off_best(cells: Sequence[Cell]) -> dict[int, float]:
    """Octaves of each cell's batch above the best one, by the cell's place in the list."""
    best = best_batches(cells)
    return {i: log2_batch(c) - best[group(c)] for i, c in enumerate(cells)}


def along_best(cells: Sequence[Cell]) -> Estimate:
    """Exponents of tokens in the best batch, and in lr* at it: a line through each shape, mean over shapes."""
    best, slopes = best_batches(cells), {"batch": {}, "lr": {}}
    rates = {}
    for key, at in best.items():
        x, y = np.array(sorted((log2_batch(c), position(c)) for c in cells if group(c) == key)).T
        rates[key] = float(np.interp(at, x, y))
    for name in dict.fromkeys(name for name, _ in best):
        keys = [key for key in best if key[0] == name]
        if len(keys) >= 2:
            tokens = [math.log2(key[1]) for key in keys]
            slopes["batch"][name] = float(np.polyfit(tokens, [best[k] for k in keys], 1)[0])
            slopes["lr"][name] = float(np.polyfit(tokens, [rates[k] for k in keys], 1)[0])
    return {
        what: {
            "exponent": float(np.mean(list(own.values()))),
            "over_shapes": student(list(own.values())),
            "by_shape": own,
        }
        for what, own in slopes.items()
    } | {"points": [[n, math.log2(t), best[n, t], rates[n, t]] for n, t in best]}


def local_slopes(cells: Sequence[Cell], axis: str) -> list[dict[str, float | str]]:
    """Slopes between neighbours on an axis ("batch" or "tokens"), each with where it lies against the best batch."""
    off, along = off_best(cells), log2_batch if axis == "batch" else log2_tokens
    rows: dict[tuple[str, float], list[tuple[float, int]]] = {}
    for i, cell in enumerate(cells):
        rows.setdefault((cell.shape.name, cell.tokens if axis == "batch" else cell.batch), []).append((along(cell), i))
    found = []
    for (shape, fixed), row in rows.items():
        for (x0, i), (x1, j) in itertools.pairwise(sorted(row)):
            a, b = cells[i].valley, cells[j].valley
            found.append(
                {
                    "shape": shape,
                    "series": f"{shape}/{fixed:g}",
                    "off_best": (off[i] + off[j]) / 2,
                    "decays": math.log2(math.sqrt(cells[i].steps * cells[j].steps)) + (a.minimum + b.minimum) / 2,
                    "slope": (b.minimum - a.minimum) / (x1 - x0),
                    "error": math.hypot(a.error, b.error) / (x1 - x0),
                }
            )
    return found


def by_bin(cells: Sequence[Cell], axis: str, seed: int = 0) -> list[Estimate]:
    """Mean local slope in bins of octaves against the best batch; intervals by a bootstrap over series."""
    slopes, rng, found = local_slopes(cells, axis), np.random.default_rng(seed), []
    for low, high in itertools.pairwise(EDGES):
        inside = [s for s in slopes if low <= s["off_best"] < high]
        if len(inside) < 3:
            continue
        values, errors = (np.array([s[what] for s in inside]) for what in ("slope", "error"))
        series: dict[str, list[int]] = {}
        for i, s in enumerate(inside):
            series.setdefault(s["series"], []).append(i)
        members, draws = list(series.values()), []
        for _ in range(lines.RESAMPLES // 2):
            rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
            draws.append(pooled(values[rows], errors[rows])[0])
        found.append(
            {
                "off_best": [low, high],
                "middle": float(np.mean([s["off_best"] for s in inside])),
                "slope": pooled(values, errors)[0],
                "interval": [float(q) for q in np.quantile(draws, (0.025, 0.975))],
                "pairs": len(inside),
                "series": len(members),
            }
        )
    return found


def explained_by(cells: Sequence[Cell]) -> Estimate:
    """Local slopes over tokens against two explanations at once: where the batch lies, and η·λ·T, both in octaves.

    The smaller the coefficient's interval against the coefficient, the more that explanation says once the other is known.
    """
    slopes = local_slopes(cells, "tokens")
    x = np.array([[1.0, s["off_best"], s["decays"]] for s in slopes])
    x[:, 1:] -= x[:, 1:].mean(axis=0)
    y, weight = np.array([s["slope"] for s in slopes]), np.array([1 / (s["error"] ** 2 + 0.05) for s in slopes])
    names = sorted({str(s["series"]) for s in slopes})
    place = np.array([names.index(str(s["series"])) for s in slopes])

    def fit(rows: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(
            (x[rows] * weight[rows, None]).T @ x[rows], (x[rows] * weight[rows, None]).T @ y[rows], rcond=None
        )[0]

    rng, draws = np.random.default_rng(0), []
    for _ in range(lines.RESAMPLES // 2):
        chosen = rng.integers(0, len(names), len(names))
        draws.append(fit(np.concatenate([np.flatnonzero(place == k) for k in chosen])))
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    whole = fit(np.arange(len(slopes)))
    return {
        "correlation": float(np.corrcoef(x[:, 1], x[:, 2])[0, 1]),
        **{
            n: {"value": float(whole[i]), "interval": [float(low[i]), float(high[i])]}
            for i, n in ((1, "off_best"), (2, "decays"))
        },
    }


def saturating(cells: Sequence[Cell], seed: int = 0) -> Estimate:
    """The curve of the module's head, fitted to every cell; intervals by a bootstrap over shapes' numbers of tokens."""
    names = list(dict.fromkeys(c.shape.name for c in cells))
    start = np.array([17.5, 0.5, 0.6, 2.0])  # log2 B_0, γ, κ, m
    whole, linear, residual = _saturating(cells, names, start)
    keys, rng, draws = list(dict.fromkeys(map(group, cells))), np.random.default_rng(seed), []
    for _ in range(lines.RESAMPLES // 20):
        drawn = [keys[i] for i in rng.integers(0, len(keys), len(keys))]
        sample = [c for key in drawn for c in cells if group(c) == key]
        if {c.shape.name for c in sample} == set(names):
            found, own, _ = _saturating(sample, names, whole)
            draws.append([*found, own[-1]])
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    named = dict(zip(("log2_noise_batch", "gamma", "kappa", "sharpness", "a"), [*whole, linear[-1]], strict=True))
    return {
        **{
            n: {"value": float(v), "interval": [float(low[i]), float(high[i])]}
            for i, (n, v) in enumerate(named.items())
        },
        "at_log2_tokens": _D0,
        "residual": residual,
        "by_shape": dict(zip(names, map(float, linear), strict=False)),
    }


def _saturating(cells: Sequence[Cell], names: list[str], start: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Gauss-Newton with damping over the four that are not linear; the rest by least squares within."""
    b, t, y = (np.array([f(c) for c in cells]) for f in (log2_batch, log2_tokens, position))
    root = 1 / np.sqrt(np.array([c.valley.error**2 for c in cells]) + 0.1**2)
    design = np.array([[*(float(c.shape.name == n) for n in names), log2_tokens(c) - _D0] for c in cells])

    def residuals(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise, gamma, kappa, sharp = theta
        bent = y + kappa / sharp * np.log2(1 + 2.0 ** (sharp * (noise + gamma * (t - _D0) - b)))
        linear = np.linalg.lstsq(design * root[:, None], bent * root, rcond=None)[0]
        return (bent - design @ linear) * root, linear

    theta, damping = start.copy(), 1.0
    now, _ = residuals(theta)
    for _ in range(80):
        slopes = np.array([(residuals(theta + step)[0] - now) / 1e-4 for step in np.eye(4) * 1e-4]).T
        move = np.linalg.solve(slopes.T @ slopes + damping * np.eye(4), -slopes.T @ now)
        trial = np.clip(theta + move, (8, -1, 0.1, 0.5), (26, 2, 3, 8))
        then, _ = residuals(trial)
        if then @ then < now @ now:
            done = abs(trial - theta).max() < 1e-5
            theta, now, damping = trial, then, damping / 3
            if done:
                break
        else:
            damping *= 4
    _, linear = residuals(theta)
    return theta, linear, float(np.sqrt(np.mean((now / root) ** 2)))
