"""A plan as NeMo Automodel's ``param_group_overrides``: one lr and weight decay, and multipliers by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mue.export.file_text import clipping, commonest, the_fold
from mue.export.hf_model import transformers_model
from mue.export.muon import DION, is_muon, one_rate, refuse_fused, refuse_stacked
from mue.export.registry import STACKS
from mue.export.rows import ExportRow, folded, refuse_trained_alone, rows
from mue.export.scale import own_scale
from mue.plan.fold import unfold
from mue.plan.plan import PlanData
from mue.rules.optimizers import BOTH
from mue.util.text import yaml_number


@STACKS.register("automodel", place=3)
def automodel(plan: PlanData, model: Any) -> str:
    """The YAML text. The base values are those of most rows; eps has no place per pattern and is the smallest one."""
    plan = folded(plan)
    module, name = transformers_model(plan.target, model)
    refuse_trained_alone(module, "automodel")
    found, scale = rows(plan, module, optimizers=BOTH), own_scale(plan, module)
    # too small an eps does nothing where √v is far larger; too large a one slows
    # experts, whose gradients are small (docs/why/index.md#adams-eps)
    eps = min(row.eps for row in found if row.matrices is None)
    optimizer = _muon(plan, found, eps) if is_muon(plan) else _adamw(plan, found, eps)
    std = "\n".join(f"#   {row.regex}: {yaml_number(row.std)}" for row in found if row.std is not None)
    return f"""# {plan.target.name}: hyperparameters of plan {unfold(plan).hash} ({plan.rule.name}), written by mue export. Do not edit.
# {the_fold(plan)}
# For {name}. What this stack cannot express:
{f"#  - {scale};" + chr(10) if scale else ""}#  - eps per pattern: the smallest of the plan is used for all;
#  - {clipping(plan)};
#  - init: draw these standard deviations before training (mue export --to torch writes a file that does)
{std}
optimizer:
{optimizer}"""


def _adamw(plan: PlanData, found: Sequence[ExportRow], eps: float) -> str:
    lr, wd, _ = commonest(found).setting
    overrides = "\n".join(
        f"    - pattern: '^{row.regex}$'  # {row.roles}\n      lr_mult: {yaml_number(row.lr / lr)}\n"
        f"      wd_mult: {yaml_number(row.weight_decay / wd if wd else 0.0)}"
        for row in found
        if row.lr != lr or row.weight_decay != wd
    )
    return f"""  _target_: torch.optim.AdamW
  lr: {yaml_number(lr)}
  weight_decay: {yaml_number(wd)}
  eps: {yaml_number(eps)}
  betas: [{yaml_number(plan.betas[0])}, {yaml_number(plan.betas[1])}]
  param_group_overrides:
{overrides}
"""


# dion's Muon by way of Automodel: every parameter of two axes but embedding and lm_head to Muon, all others to AdamW. It ignores
# param_group_overrides, and its scheduler writes the first group's lr and weight decay over those of all groups, which makes of
# scalar_lr, embed_lr, lm_head_lr, and of no decay for embedding and head, what lr and weight_decay are.
_ONE = "Automodel's Muon has one lr and one weight decay for all parameters, those of AdamW as well, once its schedule has begun"


def _muon(plan: PlanData, found: Sequence[ExportRow], eps: float) -> str:
    instead = 'export("torch"), with a loop of your own'
    refuse_stacked(found, "Automodel gives tensors of three axes to AdamW", instead)
    refuse_fused(found, "Automodel's Muon", instead)
    for row in found:
        if row.matrices is None and row.std is not None and row.roles not in ("embedding", "head"):
            raise ValueError(
                f"{row.pattern} is a matrix, and Automodel gives every matrix but embedding and lm_head to Muon: plan with {row.roles} in"
                ' muon_moves, or export("torch")'
            )
    scale, lr, wd = one_rate(found, plan, list(DION), _ONE)
    rate = yaml_number(lr)
    return f"""  _target_: dion.Muon
  lr: {rate}
  weight_decay: {yaml_number(wd)}
  mu: {yaml_number(plan.momentum)}
  nesterov: true
  adjust_lr: {DION[scale]}
  scalar_opt: adamw
  scalar_betas: [{yaml_number(plan.betas[0])}, {yaml_number(plan.betas[1])}]
  scalar_eps: {yaml_number(eps)}
  scalar_lr: {rate}
  embed_lr: {rate}
  lm_head_lr: {rate}
"""
