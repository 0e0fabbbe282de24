"""A plan for Hugging Face Trainer: what an own loop needs, and an optimizer with a relative schedule for ``Trainer(...)``."""

from __future__ import annotations

from typing import Any

from mue.export.hf_model import transformers_model
from mue.export.loop_file import loop_file
from mue.export.registry import STACKS
from mue.export.rows import folded
from mue.plan.plan import PlanData

_USE = "    init_(model)\n    trainer = Trainer(model=model, args=args, **trainer_arguments(model, schedule))"
_CODE = '''

def trainer_arguments(model, schedule):
    """``Trainer(..., **trainer_arguments(model, schedule))``; schedule(step) is a factor on every group's own lr.

    Trainer's own optimizer knows two groups (decayed or not) and one lr: it must not build one itself.
    """
    optimizer = OPTIMIZER
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))}
'''


@STACKS.register("transformers", place=2)
def transformers(plan: PlanData, model: Any) -> str:
    """The file's text."""
    plan = folded(plan)
    module, name = transformers_model(plan.target, model)
    return loop_file(plan, module, name, _USE, _CODE)
