"""Each law and rule on pairs of cells: it takes the base's own best rate, moves it, and pays what the target's valley says.

A scenario is a list of such pairs, base and target. Errors are in octaves (positive: the law is too high), costs in nats above the
target's minimum; intervals by a bootstrap over the targets' shapes and numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from public import slopes as lines
from public.batches import best_batches, group
from public.cells import Cell
from public.laws import BY_HAND, LAWS, RULES, rule_change
from public.slopes import log2_batch, position

Pairs = list[tuple[Cell, Cell]]
CLOSE = 0.75  # octaves: a cell is at its best batch
P_GRID = [round(0.05 * k, 2) for k in range(21)]
Q_GRID = [round(0.05 * k, 2) for k in range(-10, 16)]
OTHERS = ((0.5, 0.5), (0.5, 0.25), (0.5, 0.15), (0.5, 0.0), (0.35, 0.0), (0.0, 0.0))


def scenarios(moe: Sequence[Cell], dense: Sequence[Cell]) -> dict[str, Pairs]:
    """The changes that are scored, by name."""
    off = {}
    for cells in (moe, dense):
        best = best_batches(cells)
        off |= {id(c): log2_batch(c) - best[group(c)] for c in cells}

    def pairs(bases: Sequence[Cell], targets: Sequence[Cell], holds: Callable[[Cell, Cell], bool]) -> Pairs:
        return [(b, t) for b in bases for t in targets if holds(b, t)]

    def longer(b: Cell, t: Cell) -> bool:
        return b.shape == t.shape and b.batch == t.batch and t.tokens > b.tokens

    def larger(b: Cell, t: Cell) -> bool:
        return b.shape == t.shape and b.tokens == t.tokens and t.batch > b.batch

    found: dict[str, Pairs] = {}
    for kind, cells in (("MoE", moe), ("dense", dense)):
        small = [c for c in cells if off[id(c)] <= 0]
        big = [c for c in cells if off[id(c)] >= 0]
        good = [c for c in cells if abs(off[id(c)]) <= CLOSE]
        found |= {
            f"{kind}: more tokens, batch fixed": pairs(cells, cells, longer),
            f"{kind}: more tokens, batch fixed below the best": pairs(small, small, longer),
            f"{kind}: more tokens, batch fixed above the best": pairs(big, big, longer),
            f"{kind}: larger batch, tokens fixed": pairs(cells, cells, larger),
            f"{kind}: larger batch, tokens fixed, up to the best": pairs(small, small, larger),
            f"{kind}: larger batch, tokens fixed, beyond the best": pairs(big, big, larger),
            f"{kind}: more tokens, best batch to best batch": pairs(
                good, good, lambda b, t: b.shape == t.shape and t.tokens > b.tokens
            ),
        }
    found["MoE: larger batch, steps fixed"] = pairs(
        moe, moe, lambda b, t: b.shape == t.shape and t.batch > b.batch and abs(np.log2(t.steps / b.steps)) < 0.01
    )
    found["MoE: more active width, batch and tokens fixed"] = pairs(
        moe, moe, lambda b, t: (b.batch, b.tokens) == (t.batch, t.tokens) and t.shape.active > b.shape.active
    )
    at_best = {name: [c for c in cells if abs(off[id(c)]) <= CLOSE] for name, cells in (("moe", moe), ("dense", dense))}
    small = [c for c in at_best["dense"] if c.shape.width <= 1024]
    found["all at once: small dense → wider and deeper dense"] = pairs(
        small, at_best["dense"], lambda b, t: t.shape.total > 1.5 * b.shape.total and t.tokens >= b.tokens
    )
    found["all at once: small dense → MoE"] = pairs(small, at_best["moe"], lambda b, t: t.tokens >= b.tokens)
    return found


def upward(cells: Sequence[Cell], most: float = np.inf) -> Pairs:
    """What a user does to one shape: as many tokens or more, as large a batch or larger, at batches ``most`` octaves from the best."""
    best = best_batches(cells)
    good = [c for c in cells if abs(log2_batch(c) - best[group(c)]) <= most]
    return [
        (b, t)
        for b in good
        for t in good
        if b.shape == t.shape and b is not t and t.tokens >= b.tokens and t.batch >= b.batch
    ]


def cheapest(pairs: Pairs, seed: int = 0) -> dict[str, Any]:
    """The exponents p and q, from a grid, that cost least on the mean of these pairs; what they and others cost.

    Intervals by a bootstrap over the targets' shapes and numbers of tokens: of p with its own best q, and the other way round.
    """
    grid = [(p, q) for p in P_GRID for q in Q_GRID]
    cost = np.array(
        [
            [t.cost(position(b) + p * np.log2(t.batch / b.batch) - q * np.log2(t.tokens / b.tokens)) for p, q in grid]
            for b, t in pairs
        ]
    )
    groups: dict[tuple[str, float], list[int]] = {}
    for i, (_, target) in enumerate(pairs):
        groups.setdefault(group(target), []).append(i)
    rng, members = np.random.default_rng(seed), list(groups.values())
    sums, sizes = np.array([cost[m].sum(axis=0) for m in members]), np.array([len(m) for m in members])
    draws = []
    for _ in range(lines.RESAMPLES // 2):
        drawn = rng.integers(0, len(members), len(members))
        draws.append(grid[int((sums[drawn].sum(axis=0) / sizes[drawn].sum()).argmin())])
    mean = cost.mean(axis=0)
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    best = grid[int(mean.argmin())]
    return {
        "pairs": len(pairs),
        "p": {"value": best[0], "interval": [float(low[0]), float(high[0])]},
        "q": {"value": best[1], "interval": [float(low[1]), float(high[1])]},
        "cost": float(mean.min()),
        "cost of others": {f"{p:g}, {q:g}": float(mean[grid.index((p, q))]) for p, q in OTHERS},
    }


def changes(base: Cell, target: Cell) -> dict[str, float]:
    """Octaves that every rule and law moves the rate."""
    found = {}
    for rule in RULES:
        octaves = rule_change(rule, base, target)
        found[rule] = octaves["attention_q"]
        if base.shape != target.shape and rule == "complete-mue":
            found[f"{rule}, embedding"] = octaves["embedding"]
    return found | {law.name: law.change(base, target) for law in (*BY_HAND, *LAWS)}


def score(pairs: Pairs, seed: int = 0) -> dict[str, Any]:
    """For each law: mean error, root mean square error, mean cost and its interval; how far the optimum itself moved."""
    moved = np.array([position(t) - position(b) for b, t in pairs])
    rows: dict[str, list[float]] = {}
    for base, target in pairs:
        for name, octaves in changes(base, target).items():
            rows.setdefault(name, []).append(octaves)
    groups: dict[tuple[str, float], list[int]] = {}
    for i, (_, target) in enumerate(pairs):
        groups.setdefault(group(target), []).append(i)
    rng, members = np.random.default_rng(seed), list(groups.values())
    samples = [
        np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        for _ in range(lines.RESAMPLES // 4)
    ]

    def interval(values: np.ndarray) -> list[float]:
        return [float(q) for q in np.quantile([values[s].mean() for s in samples], (0.025, 0.975))]

    laws = {}
    for name, octaves in rows.items():
        error = np.array(octaves) - moved
        cost = np.array([t.cost(position(b) + o) for (b, t), o in zip(pairs, octaves, strict=True)])
        laws[name] = {
            "says": float(np.mean(octaves)),
            "error": float(error.mean()),
            "rms": float(np.sqrt((error**2).mean())),
            "cost": float(cost.mean()),
            "cost_interval": interval(cost),
        }
    return {"pairs": len(pairs), "moved": float(moved.mean()), "moved_interval": interval(moved), "laws": laws}
