"""What is said of a run's routers in words: the plan's assumptions beside what was measured, and whether load is balanced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mue.lab.report.page import text
from mue.lab.train.run import Run
from mue.shapes import Block

Rows = Sequence[Mapping[str, Any]]
LEVEL = 0.02  # of a plan's value: nearer than this counts as held, about what a batch of some thousand tokens can tell


@dataclass(frozen=True)
class RouterReading:
    """A run's rows, and whose they are.

    Attributes:
        rows: those with ``load``. layers: of each block with experts, what layer of the model it is. Where the plan is known their F is
            made with its a, as the plan's is: a run writes it with the mean number of active experts, which is another where that
            differs by token.
        plan: of each of them, what the plan assumes; None where the model is somebody's own, and its blocks are not the plan's.
        sets: the sets of experts by name, each with the places in ``layers`` that read it: a layer's own, or a pool.
        drawn: places in ``layers`` whose experts are drawn without regard to the token, so that a batch's load is chance.
    """

    rows: Rows
    layers: Sequence[int]
    plan: Sequence[Mapping[str, float]] | None
    sets: Mapping[str, Sequence[int]]
    drawn: frozenset[int]

    @property
    def measured(self) -> Rows:
        """The rows with ``routers``."""
        return [row for row in self.rows if row.get("routers")]

    def values(self, row: Mapping[str, Any], name: str) -> list[Any]:
        """A measurement of each layer; of shares a list for each set of experts, over all layers that read it."""
        if name != "share":
            return [layer[name] for layer in row["routers"]]
        shares = [[row["routers"][place]["share"] for place in places] for places in self.sets.values()]
        return [[sum(each) for each in zip(*of_set, strict=True)] for of_set in shares]

    def assumed(self, name: str) -> list[float]:
        """What the plan assumes, entry for entry; [] where that is not known."""
        if self.plan is None:
            return []
        places = range(len(self.layers)) if name != "share" else (places[0] for places in self.sets.values())
        return [self.plan[place][name] for place in places]


def reading(run: Run, rows: Rows) -> RouterReading:
    """The rows of a run with what the plan says of their layers.

    Args:
        rows: with ``load``.
    """
    blocks = {layer: block for layer, block in enumerate(run.plan.target.per_layer) if block.experts}
    own = len(blocks) != len(rows[-1]["load"])
    layers = list(range(len(rows[-1]["load"]))) if own else list(blocks)
    pools = {} if own else {layer: pool for pool in run.plan.target.pool_layers for layer in pool}
    sets: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        pool = pools.get(layer)
        sets.setdefault(f"The pool of layers {pool[0]} to {pool[-1]}" if pool else f"Layer {layer}", []).append(place)
    plan = None if own else [assumed(block) for block in blocks.values()]
    if plan is not None:
        rows = [_with_planned_active(row, plan) for row in rows]
    kinds = [] if own else [block.router_kind for block in blocks.values()]
    drawn = frozenset(place for place, kind in enumerate(kinds) if kind.stochastic and not kind.matrix)
    return RouterReading(rows, layers, plan, sets, drawn)


def _with_planned_active(row: Mapping[str, Any], plan: Sequence[Mapping[str, float]]) -> Mapping[str, Any]:
    """The row, F of its routers made with the plan's a: σ_down is made for a·m2/m1², whatever a token's mean number is."""
    if not row.get("routers"):
        return row

    def again(layer: Mapping[str, Any], a: float) -> dict[str, Any]:
        known = layer["F"] is not None and layer["m1"]
        return {**layer, "F": a * layer["m2"] / layer["m1"] ** 2 if known else layer["F"]}

    found = [again(layer, each["active"]) for layer, each in zip(row["routers"], plan, strict=True)]
    return {**row, "routers": found}


def assumed(block: Block) -> dict[str, float]:
    """What a plan's numbers assume of a block's router: a, the token share of an expert, m1, m2 and F."""
    m1, F = block.active / block.route_scale, block.gate_variance
    return {"active": block.active, "share": block.share, "m1": m1, "m2": F * m1**2 / block.active, "F": F}


def span(values: Sequence[Any]) -> str:
    """The mean over layers, and the range where layers (or an expert's shares) differ."""
    flat = [x for value in values for x in (value if isinstance(value, list) else [value]) if x is not None]
    if not flat:
        return "not finite"
    low, high, mean = min(flat), max(flat), sum(flat) / len(flat)
    if high - low <= 5e-4 * max(abs(high), 1e-9):
        return f"{mean:.4g}"
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"


def drift_words(
    name: str, plan: Sequence[float], first: Sequence[Any], last: Sequence[Any], layers: Sequence[int]
) -> str:
    """How far a quantity started from the plan's value, how far it drifted, and what follows from it.

    Args:
        name: of the quantity. plan, first, last: of each layer. layers: what they are called.
    """
    if any(x is None for x in (*first, *last)):
        return "a measurement is not finite"
    start, at_start = _farthest([a / p for a, p in zip(first, plan, strict=True)])
    end, _ = _farthest([b / p for b, p in zip(last, plan, strict=True)])
    drift, drifted = _farthest([b / a if a else 1.0 for a, b in zip(first, last, strict=True)])
    words = "as planned at init" if abs(start - 1) < LEVEL else f"{_off(start)} at init in layer {layers[at_start]}"
    words += ", no drift" if abs(drift - 1) < LEVEL else f", drifted by {drift - 1:+.0%} in layer {layers[drifted]}"
    return words + _meaning(name, start, end)


def _meaning(name: str, start: float, end: float) -> str:
    """What is off where a quantity is ``start`` times the plan's at init and ``end`` times at the end; nothing where both are near."""
    began, ended = abs(start - 1) >= LEVEL, abs(end - 1) >= LEVEL
    if not (began or ended):
        return ""
    if name == "m1":
        return f": R is made for the plan's, so the routed sum began at ×{start:.3g} and ended at ×{end:.3g} of its planned scale"
    if name == "F":
        std = f"the routed sum's std began at ×{math.sqrt(start):.3g} of what σ_down is made for" if began else ""
        even = f"a token's weights are {'less' if end > 1 else 'more'} even at the end than planned" if ended else ""
        return ": " + ", and ".join(filter(None, (std, even)))
    if name == "active":
        return f": a token took ×{end:.3g} of the planned expert compute at the end"
    return ": it follows from m1 and F"


def share_words(plan: Sequence[float], last: Sequence[Sequence[float]]) -> str:
    """Load's effect: σ0 of an expert goes with its share^-½ (docs/why/limits.md#drift)."""
    ratios = [x / p for p, shares in zip(plan, last, strict=True) for x in shares]
    busiest, idlest = max(ratios), min(ratios)
    if busiest < 1 + LEVEL and idlest > 1 - LEVEL:
        return "every expert has the planned share"
    rare = f"×{idlest**-0.5:.3g} for the least used" if idlest > 0 else "without bound for one that got no token"
    return (
        f"from ×{idlest:.2g} to ×{busiest:.3g} of the plan's at the end, and σ0 with share^-½: ×{busiest**-0.5:.3g} for the busiest"
        f" expert, {rare}"
    )


def _farthest(ratios: Sequence[float]) -> tuple[float, int]:
    """The ratio farthest from 1, and where it is."""
    place = max(range(len(ratios)), key=lambda i: abs(ratios[i] - 1))
    return ratios[place], place


def _off(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%} {'above' if ratio > 1 else 'below'} plan"


def balance_texts(seen: RouterReading) -> list[dict[str, Any]]:
    """Whether load is balanced, over the last quarter of the rows: collapsed sets of experts and dead experts are warned of."""
    late = seen.rows[-max(1, len(seen.rows) // 4) :]
    when = "in the last row" if len(late) == 1 else f"in the last {len(late)} rows"
    out, worst = [], 0.0
    if seen.drawn:
        out.append(
            text("Where experts are drawn at random the load of a batch is chance: nothing is said of their balance.")
        )
    for name, places in seen.sets.items():
        if seen.drawn.issuperset(places):
            continue
        experts = len(late[0]["load"][places[0]])
        load = [sum(row["load"][place][n] for row in late for place in places) for n in range(experts)]
        if not (total := sum(load)):
            out.append(text(f"{name}: no expert got a token {when}.", warn=True))
            continue
        shares = [x / total for x in load]
        worst = max(worst, max(shares) * experts)
        even = math.exp(-sum(x * math.log(x) for x in shares if x))
        if (active := _active(seen, places[0])) and (word := _uneven(even, active, experts)):
            out.append(text(f"{name} {word}: as if {even:.1f} of {experts} experts were used evenly.", warn=True))
        if dead := sum(x == 0 for x in shares):
            out.append(text(f"{name}: {dead} of {experts} experts got no token {when}.", warn=True))
    if seen.measured:
        idle = [layer["idle"] for layer in seen.measured[-1]["routers"]]
        if max(idle) > 0:
            whose = f"layer {seen.layers[idle.index(max(idle))]}"
            out.append(
                text(
                    f"{max(idle):.1%} of the tokens of {whose} had no expert at the end: dropped for want of capacity, or chosen by none."
                )
            )
    if not worst:
        return out
    lead = f"The busiest expert has {worst:.2f} times its fair share {when}"
    return [text(lead + ("." if any(words["warn"] for words in out) else ", and no expert is dead.")), *out]


def _uneven(even: float, active: float, experts: int) -> str:
    """A word for a load that is as uneven as if ``even`` experts were used evenly, on the way (in octaves) from all, 1, to a, 0."""
    active = max(1.0, active)
    if active >= experts:
        return ""
    way = math.log(even / active) / math.log(experts / active)
    return "has collapsed" if way < 0.25 else "is far from balanced" if way < 0.5 else ""


def _active(seen: RouterReading, place: int) -> float | None:
    """Mean active count of a layer as last measured, else as planned; None where neither is known."""
    if seen.measured:
        return float(seen.measured[-1]["routers"][place]["active"])
    return seen.plan[place]["active"] if seen.plan else None


def absent_texts(found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What these routers cannot have, with the reason."""
    reasons = dict.fromkeys(
        (name, why) for layer in (found or {}).get("layers", ()) for name, why in layer["absent"].items()
    )
    if not reasons:
        return []
    return [text("Not to be had here: " + "; ".join(f"{name} ({why})" for name, why in reasons) + ".")]
