"""Does the optimizer hold what was planned? Its groups are read back, parameter by parameter. Works on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mue.checks.adamw_step import FAR, NEAR, distance
from mue.checks.context import Context
from mue.checks.optimizers import algorithm, called, holds_its_own
from mue.checks.probe import probes
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, UNMEASURED, Finding, several
from mue.checks.schedule import stated_peak, walk, writes_peaks
from mue.rules.roles import ROLES
from mue.shapes.hparams import DECOUPLED, OPTIMIZERS

NAME = "groups"
READ = ("lr", "weight_decay", "eps", "betas", "momentum")
MEND = "optimizer = torch.optim.AdamW(plan.param_groups(model))"
# Switches of torch's optimizers that change the algorithm, as they stand in a group.
USUAL = {"amsgrad": False, "maximize": False, "dampening": 0}


@check_of(NAME, place=4, needs=("roles", "plan"))
def groups(ctx: Context) -> Iterator[Finding]:
    """lr, weight decay, eps and betas of every parameter, every parameter once, and the planned algorithm."""
    if not ctx.optimizers:
        yield Finding(NAME, SKIP, measured="no optimizer was given")
        return
    found = [*_membership(ctx), *_kinds(ctx), *_options(ctx), *_values(ctx)]
    yield from found
    if all(f.status != FAIL for f in found) and any(id(p) in ctx.expected for p, _ in _held(ctx)):
        count = sum(len(o.param_groups) for o in ctx.optimizers)
        yield Finding(NAME, PASS, measured=f"{count} groups as planned")


def _held(ctx: Context) -> list[tuple[Any, dict[str, Any]]]:
    return [(p, group) for o in ctx.optimizers for group in o.param_groups for p in group["params"]]


def _membership(ctx: Context) -> Iterator[Finding]:
    """Parameters in no group, in several, or of another model: by identity, for a copy has the same names."""
    held = [id(p) for p, _ in _held(ctx)]
    missing = [p.name for p in ctx.placed if ROLES[p.role].trained and id(p.parameter) not in set(held)]
    twice = [ctx.names[i].name for i in set(held) if i in ctx.names and held.count(i) > 1]
    known = {*ctx.names, *map(id, ctx.placement.unplanned.values())}
    strange = [tuple(p.shape) for p, _ in _held(ctx) if id(p) not in known]
    own = next((o for o in ctx.optimizers if holds_its_own(o)), None)
    if own is not None and not any(i in ctx.names for i in held):
        yield Finding(
            NAME,
            UNMEASURED,
            f"optimizer {called(own)}",
            "every parameter in one group",
            "it holds tensors of its own (master weights, flat shards), and which is which is not known here",
            mend="give the optimizer before it is wrapped",
        )
        return
    if missing:
        causes: tuple[str, ...] = (
            "left out when the groups were built (a filter by name, dimension or requires_grad)",
        )
        if strange:
            causes = (
                "the optimizer was built before the model was moved, copied or tied, and holds the old tensors",
                *causes,
            )
        yield Finding(
            NAME, FAIL, several(missing), "in the optimizer", f"{len(missing)} parameters are in no group", causes, MEND
        )
    if twice:
        yield Finding(
            NAME,
            FAIL,
            several(twice),
            "in one group",
            "in several groups, so stepped several times",
            ("a pattern of another group matches too",),
            MEND,
        )
    if strange and not missing:
        yield Finding(
            NAME,
            FAIL,
            f"optimizer: a tensor of shape {strange[0]}",
            "parameters of this model only",
            f"{len(strange)} tensors are not the model's",
            ("the optimizer belongs to another copy of the model",),
            MEND,
        )


def _kinds(ctx: Context) -> Iterator[Finding]:
    """Another algorithm than the plan's gives its rates and its decay another meaning, whatever the numbers are."""
    for o in ctx.optimizers:
        found: dict[tuple[str | None, str], list[str]] = {}
        for group in o.param_groups:
            # what is no parameter of the plan was named already
            held = [p for p in group["params"] if id(p) in ctx.expected]
            if not held:
                continue
            planned = _planned(ctx, ctx.expected[id(held[0])])
            kind = algorithm(o, group)
            # without a decay there is none that could join the gradient
            if kind == planned or (kind == "adam-l2" and planned == "adamw" and not group.get("weight_decay")):
                continue
            found.setdefault((kind, planned), []).extend(ctx.names[id(p)].name for p in held)
        for (kind, planned), names in found.items():
            yield from _unknown(ctx, o, planned) if kind is None else [_another(ctx, o, kind, planned, names)]


def _planned(ctx: Context, expected: dict[str, Any]) -> str:
    """The algorithm that a planned group is for."""
    name: str = expected.get("algorithm", ctx.plan.tuned.optimizer)
    return name


def _unknown(ctx: Context, optimizer: Any, planned: str) -> Iterator[Finding]:
    """A class that no name tells is measured: its first two steps are AdamW's, or those of something else.

    Under a plan for Muon the checks of orthogonal steps measure it, and name what is wrong.
    """
    if ctx.plan.tuned.optimizer == "muon" and ctx.batch is not None and not ctx.meta and _probed(ctx):
        return
    off = distance(ctx, optimizer)
    if off is not None and off <= NEAR:
        return
    if off is not None and off > FAR:
        yield Finding(
            NAME,
            FAIL,
            f"optimizer {called(optimizer)}",
            f"{planned}, for which the rates are planned",
            f"its first two steps are {100 * off:.0f} % off those of {planned} with the planned values",
            (f"another algorithm than {planned}", "its rates are not the planned ones: see the other findings"),
            MEND,
        )
        return
    yield Finding(
        NAME,
        UNMEASURED,
        f"optimizer {called(optimizer)}",
        f"{planned}, for which the rates are planned",
        "a class that is not known here: how it steps and decays is not seen"
        if off is None
        else f"its first two steps, or its decay, are near those of {planned} and not the same ({100 * off:.0f} %)",
        mend=f"make sure that its update is {planned}'s",
    )


def _probed(ctx: Context) -> bool:
    """Whether its steps along designed gradients can be seen."""
    try:
        return not isinstance(probes(ctx), str)
    except Exception:  # an optimizer that cannot be stepped is named by the checks that step it
        return False


def _another(ctx: Context, optimizer: Any, kind: str, planned: str, names: list[str]) -> Finding:
    name = called(optimizer)
    coupled = kind == "adam-l2" and planned in DECOUPLED
    several_algorithms = len({e.get("algorithm") for e in ctx.expected.values()}) > 1
    return Finding(
        NAME,
        FAIL,
        f"optimizer {name}" + (": weight_decay" if coupled else f": {several(names)}" if several_algorithms else ""),
        "decoupled decay, p *= 1 - lr·wd" if coupled else f"{planned}, for which the rates are planned",
        "L2: the decay joins the gradient and is normalised away" if coupled else kind,
        (f"{name} was written for {planned}",),
        MEND
        if planned == "adamw" and not several_algorithms
        else f'the planned optimizer, or plan for this one: mue.HParams(..., optimizer="{kind}")'
        if kind in OPTIMIZERS
        else f"give these parameters to {planned}: plan.param_groups(model) says which in group['algorithm']"
        if several_algorithms
        else f"train with {planned}",
    )


def _options(ctx: Context) -> Iterator[Finding]:
    """Switches that make another algorithm of the planned one."""
    for o in ctx.optimizers:
        # Muon has Nesterov's look-ahead unless told otherwise, and its rates are planned with it
        sgd = {"nesterov": False} if {algorithm(o, g) for g in o.param_groups} == {"sgd"} else {}
        for key, usual in {**USUAL, **sgd}.items():
            if any(g.get(key, usual) != usual for g in o.param_groups):
                yield Finding(
                    NAME,
                    FAIL,
                    f"optimizer {called(o)}: {key}",
                    f"{key}={usual!r}, as the plan's {ctx.plan.tuned.optimizer}",
                    next(f"{key}={g[key]!r}" for g in o.param_groups if g.get(key, usual) != usual),
                    ("given to the optimizer beside the plan's groups",),
                    MEND,
                )


def _values(ctx: Context) -> Iterator[Finding]:
    """Each setting of each group against the planned one. Of lr the phase of a schedule that has begun is taken out."""
    rows = [
        (ctx.names[id(p)], group, ctx.expected[id(p)])
        for p, group in _held(ctx)
        if id(p) in ctx.expected and id(p) in ctx.names
    ]
    # another algorithm was named already, and reads these settings in its own way
    kinds = {id(g): algorithm(o, g) for o in ctx.optimizers for g in o.param_groups}
    rows = [row for row in rows if kinds[id(row[1])] in (None, "adam-l2", _planned(ctx, row[2]))]
    own_rates = ctx.scheduler is not None and writes_peaks(ctx.scheduler)
    phase = None if own_rates else _phase(ctx, [(g, e) for _, g, e in rows])
    if phase is None and not own_rates:
        yield Finding(
            NAME,
            UNMEASURED,
            "lr of all groups",
            "the planned peaks",
            "one multiple of them, and a scheduler is on the optimizer that was not given",
            mend="mue.check(..., scheduler=scheduler)",
        )
    wrong: dict[tuple[str, str, str, str], list[str]] = {}
    for placed, group, expected in rows:
        for key in READ:
            if key not in group or key not in expected or (key == "lr" and phase is None):
                continue
            planned, actual = expected[key], group[key]
            if key == "lr":
                planned, actual = expected["lr"] * phase, float(actual)
            if not _same(actual, planned):
                wrong.setdefault((key, placed.role, _text(planned), _text(actual)), []).append(placed.name)
    for (key, role, planned, actual), names in wrong.items():
        yield Finding(
            NAME, FAIL, f"{several(names)}: {key}", f"{key} {planned}", f"{key} {actual}", _causes(key, role), MEND
        )


def _phase(ctx: Context, rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> float | None:
    """What a scheduler has multiplied into every lr so far; None where that cannot be told from another peak.

    It is known where the scheduler was seen to keep all ratios (the check ``scheduler`` then judges the peak), or where the groups
    state a peak that is the planned one. Otherwise it is no phase, but another rate.
    """
    ratios = sorted(float(g["lr"]) / e["lr"] for g, e in rows if e["lr"])
    if not ratios:
        return 1.0
    middle: float = ratios[len(ratios) // 2]
    seen = walk(ctx)
    kept = [g for g, e in rows if _same(stated_peak(g), e["lr"])]
    if (seen is not None and seen.clean) or len(kept) * 2 >= len(rows):
        return middle
    scheduled = all("initial_lr" in g for g, _ in rows)
    one = all(_same(float(g["lr"]), e["lr"] * middle) for g, e in rows)
    return None if ctx.scheduler is None and scheduled and one else 1.0


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list) or isinstance(b, tuple | list):
        if not (isinstance(a, tuple | list) and isinstance(b, tuple | list)):
            return False
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    # a rate that went through float32 or through text is still the planned one
    return abs(float(a) - float(b)) <= 1e-6 * max(abs(float(a)), abs(float(b)))


def _text(value: Any) -> str:
    return ", ".join(f"{v:.6g}" for v in value) if isinstance(value, tuple | list) else f"{float(value):.6g}"


def _causes(key: str, role: str) -> tuple[str, ...]:
    if key == "lr":
        return (
            f"{role} is in the group of another role (often the base lr), or a scheduler writes one lr into all of them",
            "the groups are another plan's (a stale plan)",
            "lr was overwritten after the groups were built",
        )
    if key == "weight_decay":
        return (
            "the decay list was built by number of dimensions or by name, not by role",
            "one decay for all groups",
            "a stale plan",
        )
    if key == "eps":
        return ("eps given as one default instead of by group", "torch's default 1e-8 was kept")
    return ("given as the optimizer's default instead of by group", "not rescaled for batch and duration")
