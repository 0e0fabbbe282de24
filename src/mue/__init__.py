"""Tune one small dense transformer, train any Mixture-of-Experts with the hyperparameters that follow from it.

>>> import mue
>>> base = mue.Dense(width=128, ffn=128, layers=8)
>>> target = mue.MoE.parse("128e8a1s", width=1024, expert=1024, layers=8)
>>> plan = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01))
>>> plan.route_scale, round(plan.output_multiplier, 6)
(8.0, 0.111111)

Numbers need no torch: it is imported when a plan meets a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mue.api import Plan, transfer
from mue.plan.convention import Convention
from mue.plan.values import Multipliers
from mue.rules import RULES, get_rule
from mue.shapes import Block, Dense, HParams, Image, Mixed, MoE, Training

if TYPE_CHECKING:
    from mue.checks import check, coordinate_check
    from mue.layouts.layout import Layout

__all__ = [
    "RULES",
    "Block",
    "Convention",
    "Dense",
    "HParams",
    "Image",
    "Layout",
    "Mixed",
    "MoE",
    "Multipliers",
    "Plan",
    "Training",
    "check",
    "coordinate_check",
    "get_rule",
    "transfer",
]
__version__ = "0.1.0"


# What needs torch, imported when it is first asked for. The folders are here because messages name what lies in them, and the
# line that mends a model has to run where only ``mue`` was imported.
_ON_USE = {"Layout": "mue.layouts.layout", "check": "mue.checks", "coordinate_check": "mue.checks"}
_FOLDERS = ("fold", "moe", "layouts")


def __dir__() -> list[str]:
    """What there is for users, whether it has been imported yet or not."""
    return sorted((*__all__, *_FOLDERS, "__doc__", "__file__", "__name__", "__path__", "__version__"))


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(import_module(_ON_USE[name]), name)
    if name in _FOLDERS:
        return import_module(f"mue.{name}")
    raise AttributeError(f"module 'mue' has no attribute {name!r}")
