"""A stored optimizer (and its scheduler) from one form to the other: states, and the groups that the other form has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mue.convert.forms import Conversion, Group
from mue.layouts.layout import canonical

SETTINGS = ("lr", "weight_decay", "eps", "roles")  # what the plan decides; the rest of a group travels
RATES = ("initial_lr", "max_lr", "min_lr")  # what schedulers put beside the rate, OneCycleLR the last two


def is_optimizer(data: object) -> bool:
    """Whether this is the state dict of a torch optimizer."""
    return isinstance(data, Mapping) and {"state", "param_groups"} <= set(data)


def is_scheduler(data: object) -> bool:
    """Whether this is the state dict of a torch learning-rate scheduler."""
    return isinstance(data, Mapping) and "base_lrs" in data


def convert_optimizer(data: Mapping[str, Any], how: Conversion) -> dict[str, Any]:
    """An optimizer's state dict in the other form.

    Parameters are known by name (``param_names`` of the groups, or names as keys, as torch.distributed.checkpoint makes them)
    or by index, then in the order of ``plan.param_groups``. The result has the groups of the other form's
    ``param_groups``, each at the phase of the schedule where the old one was.

    Raises:
        ValueError: groups that are not the plan's; a state whose power of c is not known, or of another shape.
    """
    groups: list[Mapping[str, Any]] = list(data["param_groups"])
    names = _names(groups, how)
    group_of = {n: group for group, inside in zip(groups, names, strict=True) for n in inside}
    planned = {n: g for g in how.before for n in g.names}
    for n, group in group_of.items():
        _check_group(n, group, planned[n].settings)
    states = dict(zip((i for g in groups for i in g["params"]), (n for many in names for n in many), strict=True))
    keyed_by_name = any(isinstance(i, str) for g in groups for i in g["params"])
    made: list[dict[str, Any]] = []
    ids: dict[str, Any] = {}
    for after in how.after:
        held = [n for n in after.names if n in group_of]
        if not held:
            continue
        for n in held:
            ids[n] = n if keyed_by_name else len(ids)
        made.append(_group(after, held, [group_of[n] for n in held], planned, [ids[n] for n in held]))
    state = {}
    for i, own in data["state"].items():
        name = states[i]
        change = how.changes[name]
        state[ids[name]] = {k: change.state(name, k, _fits(name, k, v, how)) for k, v in own.items()}
    return {**data, "state": state, "param_groups": made}


def _names(groups: Sequence[Mapping[str, Any]], how: Conversion) -> list[list[str]]:
    """The names of each group's parameters."""
    found = []
    for i, group in enumerate(groups):
        given = group.get("param_names") or (
            group["params"] if any(isinstance(p, str) for p in group["params"]) else None
        )
        if given is None:
            return _by_order(groups, how)
        inside = [canonical(n) for n in given]
        unknown = [n for n in inside if n not in how.changes]
        if unknown:
            raise ValueError(f"optimizer group {i} holds {unknown[0]}, which the planned model does not have")
        found.append(inside)
    return found


def _by_order(groups: Sequence[Mapping[str, Any]], how: Conversion) -> list[list[str]]:
    sizes = [len(g["params"]) for g in groups]
    wanted = [len(g.names) for g in how.before]
    # by order alone only if the groups are exactly those of param_groups: a wrong pairing would be silent
    if sizes != wanted:
        raise ValueError(
            f"the optimizer's parameters have no names, and its groups of {sizes} are not those of plan.param_groups"
            f" ({wanted}) in order: save it with names (torch.optim.AdamW over named parameters, or"
            " torch.distributed.checkpoint.state_dict.get_optimizer_state_dict)"
        )
    return [list(g.names) for g in how.before]


def _check_group(name: str, group: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    # The peak that a group states is the planned rate, or the run had another one. OneCycleLR's initial_lr is where it starts.
    peak = "max_lr" if "max_lr" in group else "initial_lr"
    for key, meant in ((peak, "lr"), ("weight_decay", "weight_decay"), ("eps", "eps")):
        if key in group and meant in planned and not _close(group[key], planned[meant]):
            raise ValueError(
                f"the optimizer's group of {name} has {key} = {group[key]}, the plan {planned[meant]}: only a run with the"
                " plan's own groups can be converted"
            )


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_close, a, b))
    # a rate that went through float32 is still the planned one
    return math.isclose(float(a), float(b), rel_tol=1e-6)


def _group(
    after: Group,
    names: Sequence[str],
    old: Sequence[Mapping[str, Any]],
    planned: Mapping[str, Group],
    ids: Sequence[Any],
) -> dict[str, Any]:
    """One group of the new form from the old groups of its parameters, which must agree in all that the plan leaves open."""
    # where in its schedule the run is: the same multiple of the peak goes on in the other form
    peaks = [planned[n].settings["lr"] for n in names]
    phases = [{k: float(g[k]) / peak for k in ("lr", *RATES) if k in g} for g, peak in zip(old, peaks, strict=True)]
    travels = [{k: v for k, v in g.items() if k not in (*SETTINGS, *RATES, "params", "param_names")} for g in old]
    for n, phase, rest in zip(names, phases, travels, strict=True):
        alike = phase.keys() == phases[0].keys() and all(_close(v, phases[0][k]) for k, v in phase.items())
        if not alike or rest != travels[0]:
            raise ValueError(
                f"{names[0]} and {n} share a group in the other form, but not their schedule or settings here: use the"
                " plan's groups, with one schedule for all"
            )
    made = {k: v for k, v in after.settings.items() if k in SETTINGS}
    like, peak = old[0]["lr"], made["lr"]
    made["lr"] = like.new_tensor(peak * phases[0]["lr"]) if isinstance(like, Tensor) else peak * phases[0]["lr"]
    # 1 to the digits of a rate that went through float32
    made.update({k: peak if _close(phases[0][k], 1) else peak * phases[0][k] for k in RATES if k in phases[0]})
    if "roles" not in old[0]:
        del made["roles"]
    named = {"param_names": list(names)} if "param_names" in old[0] else {}
    return {**travels[0], **made, **named, "params": list(ids)}


def _fits(name: str, key: str, value: Any, how: Conversion) -> Any:
    shape = how.shapes[name]
    like_weight = isinstance(value, Tensor) and key.startswith(("exp_avg", "max_exp_avg", "momentum_buffer"))
    if like_weight and tuple(value.shape) != shape:
        raise ValueError(
            f"optimizer state {key} of {name} has shape {tuple(value.shape)}, the parameter {shape}: the optimizer's"
            " parameters are in another order than plan.param_groups; save it with names"
        )
    return value


def convert_scheduler(data: Mapping[str, Any], before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
    """A scheduler's state dict for the new groups: rates are absolute there, and would undo the conversion.

    Args:
        before, after: ``param_groups`` of the optimizer's state dict in the old form and in the new one.

    Raises:
        ValueError: an entry per group that is none of the known ones.
    """
    made: dict[str, Any] = {}
    for key, value in data.items():
        if key == "base_lrs":
            made[key] = [g.get("initial_lr", g["lr"]) for g in after]
        elif key == "_last_lr":
            made[key] = [g["lr"] for g in after]
        elif key == "_schedulers":
            made[key] = [convert_scheduler(d, before, after) for d in value]
        elif isinstance(value, list) and value and len(value) == len(before):
            # one value for all groups is no rate of a group, whatever it means; min_lrs are rates, and would have to be
            # scaled
            if any(v != value[0] for v in value) or key == "min_lrs":
                raise ValueError(
                    f"the scheduler's {key} has one entry for each group, and its meaning is not known here: build the"
                    " scheduler anew after converting"
                )
            made[key] = [value[0]] * len(after)
        else:
            made[key] = value
    return made
