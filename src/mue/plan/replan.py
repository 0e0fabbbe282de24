"""A plan made once more: from what it follows from, from its file, or from other tuned values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mue.plan.convention import Convention
from mue.plan.fold import fold
from mue.plan.plan import FORMAT, Inputs, PlanData, drop_texts, flatten
from mue.plan.transfer import plan_of
from mue.rules.options import read_back
from mue.rules.registry import RULES
from mue.shapes import DEFAULT_HEAD_DIM, HParams, Training, shape_from_dict
from mue.util.files import read_text, rounded


def inputs_from_dict(data: Mapping[str, Any]) -> Inputs:
    """What :meth:`mue.plan.plan.Inputs.to_dict` wrote, read back; a base that is a plan is planned anew.

    Args:
        data: of a plan file or a run.

    Raises:
        KeyError, TypeError: data of another form. ValueError: numbers that no shape, run or rule can have.
    """
    base, tuned, depth = data["base"], data["tuned"], data["depth_exponent"]
    return Inputs(
        base=plan_of(inputs_from_dict(base["plan"])) if "plan" in base else shape_from_dict(base),
        target=shape_from_dict(data["target"]),
        tuned=None if tuned is None else HParams.from_dict(tuned),
        base_training=None if data["base_training"] is None else Training(**data["base_training"]),
        training=None if data["training"] is None else Training(**data["training"]),
        rule=data["rule"],
        convention=Convention(**data["convention"]),
        options=({} if depth is None else {"depth_exponent": depth})
        | read_back(RULES.lookup(data["rule"]), data.get("options", {})),
    )


def of_format(number: Any, inputs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A file's inputs as a file of today would have them, so that an old one keeps its meaning.

    Args:
        number: the file's ``format``. inputs: as it holds them. where: what messages call the file.

    Raises:
        ValueError: a format that this version does not know.
    """
    if number not in range(1, FORMAT + 1):
        raise ValueError(
            f"{where} has format {number!r}, and this version of mue reads 1 to {FORMAT}: read it with the version that wrote it"
        )
    inputs = dict(inputs)
    if "plan" in inputs["base"]:
        inputs["base"] = {"plan": of_format(number, inputs["base"]["plan"], where)}
    if number < 2:  # a shape's head_dim was 64 unless it was given
        shapes = [name for name in ("base", "target") if "plan" not in inputs[name]]
        inputs |= {name: {"head_dim": DEFAULT_HEAD_DIM, **inputs[name]} for name in shapes}
    return inputs


def load(path: str | os.PathLike[str]) -> PlanData:
    """A saved plan, read back.

    It is planned anew from the inputs in it, so that the numbers are those of the rule and not what somebody wrote there.

    Raises:
        ValueError: the file is no plan, or its numbers are not those that follow from its inputs.
    """
    try:
        data = json.loads(read_text(path))
        data["inputs"] = of_format(data.get("format", 1), data["inputs"], str(path))
        folded = data.get("folded")
        plan = _folded(plan_of(inputs_from_dict(data["inputs"])), folded["route"] if folded else None)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; write a plan with plan.save or mue plan --save") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a saved plan ({error}); write one with plan.save or mue plan --save"
        ) from error
    # 12 digits: the last bits differ between libraries and machines, and mean nothing.
    # Texts are left out: a source that is worded better, or a note that is new, refuses no file of before.
    stored = rounded(flatten(drop_texts({k: data.get(k) for k in plan.content()})))
    ours = rounded(flatten(drop_texts(plan.content())))
    wrong = next((k for k in ours if ours[k] != stored.get(k)), None)
    if wrong or data.get("hash") != plan.hash:
        raise ValueError(
            f"{path} was edited or written by another version: {wrong or 'hash'} is"
            f" {stored.get(wrong) if wrong else data.get('hash')!r}, its inputs give {ours[wrong] if wrong else plan.hash!r}; plan again"
        )
    return plan


def retuned(plan: PlanData, **changes: Any) -> PlanData:
    """The same transfer from other tuned values (``lr=…, weight_decay=…``), through any chain of plans; folded as it was."""
    base = plan.inputs.base
    if isinstance(base, PlanData):
        inputs = replace(plan.inputs, base=retuned(base, **changes))
    else:
        inputs = replace(plan.inputs, tuned=plan.tuned.replace(**changes))
    return _folded(plan_of(inputs), plan.folding.route if plan.folding else None)


def scaled(plan: PlanData, multiplier: float) -> PlanData:
    """The same transfer with every tuned learning rate times ``multiplier``: one point of a sweep around it.

    Args:
        plan: folded or not; the result is what it is. multiplier: a pure number, 1 for the plan itself.

    Raises:
        ValueError: a rate that is no positive number any more.
    """
    # ``lr_times`` is relative to the global rate, which moves already.
    roles = {r: {k: v * multiplier if k == "lr" else v for k, v in t.items()} for r, t in plan.tuned.roles.items()}
    beside = plan.tuned.adamw_lr
    own = {} if beside is None else {"adamw_lr": beside * multiplier}
    return retuned(plan, lr=plan.tuned.lr * multiplier, roles=roles, **own)


def _folded(plan: PlanData, route: str | None) -> PlanData:
    """The plan, folded where there is a route."""
    return plan if route is None else fold(plan, route)
