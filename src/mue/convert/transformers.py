"""What a transformers checkpoint folder needs to change its form: the model, names on disk, settings of the config."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mue.convert.forms import Conversion, conversion
from mue.layouts.transformers.configs import build, config_of
from mue.layouts.transformers.disk import StoredNames, with_setting
from mue.layouts.transformers.scalings import scalings
from mue.plan.fold import fold, unfold
from mue.plan.plan import PlanData
from mue.util.files import read_text
from mue.util.text import number

ConfigChange = Callable[[dict[str, Any]], dict[str, Any]]


def stock_conversion(
    folder: Path, plan: PlanData, form: str, route: str
) -> tuple[Conversion, StoredNames, ConfigChange]:
    """How the checkpoint in ``folder`` gets into ``form``: :func:`mue.convert.checkpoint.convert_checkpoint`'s arguments.

    In both forms the config says what the model's own code applies: where it has a setting for the routed sum's scale, that
    is R, or 1 once R is in the weights; where it has one for attention's, that is the plan's. What no setting can say goes
    into the weights of the folded form, and is the business of whoever runs the other one.

    Args:
        folder: with a ``config.json``. plan: in either form. form: the target's, from :data:`mue.convert.forms.FORMS`.
        route: who carries R when folded, where the plan does not say.

    Returns:
        What becomes of each tensor, names on disk → the model's, and what becomes of the config.

    Raises:
        ValueError: a model that is scaled already, whose settings contradict the plan, or that is not the planned one.
    """
    where = str(folder)
    data = json.loads(read_text(folder / "config.json"))
    folded = plan if plan.folding is not None else fold(plan, route)
    changed = changed_config(data, folded if form == "folded" else unfold(plan), where)
    with torch.device("meta"):  # as the folded form runs: its queries make up for what its config does not say
        model = build(config_of(changed if form == "folded" else data, where))
    return conversion(folded, form, model), StoredNames(model), lambda _: changed


def changed_config(data: dict[str, Any], plan: PlanData, where: str) -> dict[str, Any]:
    """A ``config.json`` with the route scale and the attention scale that one form of a plan leaves to the model.

    Raises:
        ValueError: a route scale that is neither 1 nor the plan's R, or one that differs by block.
    """
    moe = [(b, p.route_scale) for b, p in zip(plan.target.blocks, plan.blocks, strict=True) if b.experts]
    measured = any(b.gate_moments is not None for b, _ in moe)
    for s in scalings(config_of(data, where)):
        if s.what == "routed sum" and moe and not measured:  # measured moments have the model's own scale in them
            wanted = {scale for _, scale in moe}
            known = {1.0, *wanted, *(b.route_scale for b in unfold(plan).blocks)}
            if not any(math.isclose(s.value, k, rel_tol=1e-6) for k in known):
                raise ValueError(
                    f"{where} has {s.attribute} = {s.value:g}, which is none of the plan's ({', '.join(map(number, sorted(known)))}):"
                    " it was not trained under this plan"
                )
            if len(wanted) > 1:
                raise ValueError(
                    f"{where}: blocks differ in R, and {s.attribute} is one number: use the route 'weights'"
                )
            data = with_setting(data, s.attribute, wanted.pop())
        if s.attribute == "attention_multiplier":
            data = _with_close(data, s.attribute, s.value, plan.attention_scale)
        if s.attribute == "query_pre_attn_scalar":
            data = _with_close(data, s.attribute, s.value, plan.attention_scale**-2)
    return data


def _with_close(data: dict[str, Any], key: str, old: float, new: float) -> dict[str, Any]:
    """``data`` with a setting changed, unless that means the same, or the config takes whole numbers and this is none."""
    if math.isclose(old, new, rel_tol=1e-9):
        return data
    whole = math.isclose(new, round(new), rel_tol=1e-9)
    if key == "query_pre_attn_scalar":
        # that setting is a whole number (the scale is its -1/2 power); what it cannot say the queries carry
        return with_setting(data, key, round(new)) if whole else data
    return with_setting(data, key, new)
