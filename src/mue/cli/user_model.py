"""What ``mue check MODEL PLAN`` is given: a function of the user's that builds, or a stock family's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mue.api import Plan
from mue.util.errors import nearest
from mue.util.importing import imported, not_taken, user_code

# Of what a function may return: the arguments of mue.check but for the plan.
KEYS = ("model", "batch", "optimizer", "scheduler", "checkpoint", "clip", "loss")


def arguments(model: str, plan: Plan) -> dict[str, Any]:
    """The arguments of :func:`mue.check` besides the plan.

    Args:
        model: ``module:function`` or ``file.py:function``, called with the plan, that returns a model or a mapping with
            the key ``model`` and any of the others of :data:`KEYS`; or a transformers ``config.json``, a folder that
            holds one, or a family's name, which is then built on the meta device.
        plan: passed to the function.

    Raises:
        ValueError: nothing that can be imported or built; unknown keys.
        UserCodeError: the function failed.
    """
    if ":" in model:
        return _read(_called(model, plan), model)
    from mue.layouts.transformers.configs import build, read_config

    config = read_config(model)
    with torch.device("meta"), user_code(model):  # shapes and names without weights, so that a model of any size fits
        return {"model": build(config)}


def exported(model: str, plan: Plan) -> Any:
    """What a plan is exported for: a function's model, or its rows of paths (a list); any other text stays as it is.

    Args:
        model: as in :func:`arguments`, or a name that the stack knows. plan: passed to the function.

    Raises:
        ValueError, UserCodeError: as :func:`arguments`.
    """
    if ":" not in model:
        return model
    made = _called(model, plan)
    return made if isinstance(made, list) else _read(made, model)["model"]


def _called(model: str, plan: Plan) -> Any:
    """What ``module:function`` or ``file.py:function`` returns, called with the plan.

    Raises:
        ValueError: nothing that can be imported, or that does not take the plan.
        UserCodeError: the function failed.
    """
    build = imported(model)
    if why := not_taken(build, plan):
        raise ValueError(
            f"{model} is called with the plan, which it does not take ({why}): give a function of the plan that returns a model, or a"
            f" dict with {', '.join(KEYS)}"
        )
    with user_code(model):
        return build(plan)


def _read(made: Any, model: str) -> dict[str, Any]:
    given = {"model": made} if isinstance(made, nn.Module) else made
    if not isinstance(given, Mapping) or not isinstance(given.get("model"), nn.Module):
        raise ValueError(f"{model} returned {type(made).__name__}: return a model, or a dict with the key 'model'")
    for key in given:
        if key not in KEYS:
            raise ValueError(f"{model} returned the unknown key {key!r}{nearest(str(key), KEYS)}")
    return dict(given)
