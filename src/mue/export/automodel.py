"""A plan as NeMo Automodel's ``param_group_overrides``: one lr and weight decay, and multipliers by pattern."""

from __future__ import annotations

from typing import Any

from mue.export.file_text import clipping, commonest, the_fold
from mue.export.hf_model import transformers_model
from mue.export.registry import STACKS
from mue.export.rows import folded, refuse_trained_alone, rows
from mue.export.scale import own_scale
from mue.plan.fold import unfold
from mue.plan.plan import PlanData
from mue.util.text import yaml_number


@STACKS.register("automodel", place=3)
def automodel(plan: PlanData, model: Any) -> str:
    """The YAML text. The base values are those of most rows; eps has no place per pattern and is the smallest one."""
    plan = folded(plan)
    module, name = transformers_model(plan.target, model)
    refuse_trained_alone(module, "automodel")
    found, scale = rows(plan, module), own_scale(plan, module)
    lr, wd, _ = commonest(found).setting
    # too small an eps does nothing where √v is far larger; too large a one slows
    # experts, whose gradients are small (docs/why/index.md#adams-eps)
    eps = min(row.eps for row in found)
    overrides = "\n".join(
        f"    - pattern: '^{row.regex}$'  # {row.roles}\n      lr_mult: {yaml_number(row.lr / lr)}\n"
        f"      wd_mult: {yaml_number(row.weight_decay / wd if wd else 0.0)}"
        for row in found
        if row.lr != lr or row.weight_decay != wd
    )
    std = "\n".join(f"#   {row.regex}: {yaml_number(row.std)}" for row in found if row.std is not None)
    return f"""# {plan.target.name}: hyperparameters of plan {unfold(plan).hash} ({plan.rule.name}), written by mue export. Do not edit.
# {the_fold(plan)}
# For {name}. What this stack cannot express:
{f"#  - {scale};" + chr(10) if scale else ""}#  - eps per pattern: the smallest of the plan is used for all;
#  - {clipping(plan)};
#  - init: draw these standard deviations before training (mue export --to torch writes a file that does)
{std}
optimizer:
  _target_: torch.optim.AdamW
  lr: {yaml_number(lr)}
  weight_decay: {yaml_number(wd)}
  eps: {yaml_number(eps)}
  betas: [{yaml_number(plan.betas[0])}, {yaml_number(plan.betas[1])}]
  param_group_overrides:
{overrides}
"""
