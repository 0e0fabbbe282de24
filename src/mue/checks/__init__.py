"""Prove the wiring: is the plan really what this model, this optimizer and this scheduler do?

Here: :func:`mue.check` and what its checks share (one forward pass seen kernel by kernel, branches taken apart), one check a file
in ``subjects``; the long checks that train (coordinates, overlay). Not here: what a plan means for a tensor (``mue.model``).

>>> import mue, torch
>>> from mue.lab.models.language import LanguageModel
>>> shape = mue.MoE.parse("8e2a", width=64, expert=32, layers=2, head_dim=32, sequence=32, vocab=64)
>>> plan = mue.transfer(mue.Dense(64, 64, 2, head_dim=32), shape, mue.HParams(1e-3, 0.1, 0.02))
>>> model = LanguageModel(shape, plan.multipliers)
>>> plan.init_(model)
>>> tokens = torch.randint(64, (2, 32))
>>> mue.check(model, plan, (tokens, tokens), torch.optim.AdamW(plan.param_groups(model))).ok
True

In a test suite the call above is the whole test: it raises with
the name of what is wrong.
"""

from mue.checks.coordinates import Coordinates, coordinate_check
from mue.checks.overlay import Overlay, first_losses, overlay
from mue.checks.registry import CHECKS
from mue.checks.report import CheckError, Finding, Report
from mue.checks.run import check

__all__ = [
    "CHECKS",
    "CheckError",
    "Coordinates",
    "Finding",
    "Overlay",
    "Report",
    "check",
    "coordinate_check",
    "first_losses",
    "overlay",
]
