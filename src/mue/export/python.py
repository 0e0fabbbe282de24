"""A plan as a Python file without any dependency but torch: for an own loop, Hugging Face Trainer, Accelerate."""

from __future__ import annotations

from collections.abc import Sequence

from mue.export.rows import ExportRow
from mue.plan import Plan

_BODY = '''

def _name(name):
    """A parameter's name without what DDP, torch.compile, FSDP and checkpointing put into it."""
    return re.sub(r"(^|\\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\\.", r"\\1", name.removeprefix("module."))


def _rows(model):
    """(row number, parameter) for every trainable parameter; each matches exactly one row, and each row something."""
    found = []
    for name, parameter in model.named_parameters():
        hits = [i for i, row in enumerate(ROWS) if re.fullmatch(row[0], _name(name))]
        if len(hits) != 1:
            if FROZEN and re.search(FROZEN, name):
                continue
            raise ValueError(f"{name} matches {len(hits)} rows of this plan; it was written for another model")
        found.append((hits[0], parameter))
    unused = set(range(len(ROWS))) - {i for i, _ in found}
    if unused:
        raise ValueError(f"rows match nothing: {[ROWS[i][0] for i in sorted(unused)]}")
    return found


@torch.no_grad()
def init_(model, seed=0):
    """Draw every parameter as planned. Build the model with its own initialisation first: some rows keep it."""
    torch.manual_seed(seed)
    for i, parameter in _rows(model):
        std, constant = ROWS[i][4:6]
        if std is not None:
            parameter.normal_(0.0, std)
        elif constant is not None:
            parameter.fill_(constant)


def param_groups(model):
    """Groups for torch.optim.AdamW, one per distinct setting."""
    groups = {}
    for i, parameter in _rows(model):
        lr, weight_decay, eps = ROWS[i][1:4]
        new = {"params": [], "lr": lr, "weight_decay": weight_decay, "eps": eps, "betas": BETAS}
        groups.setdefault(ROWS[i][1:4], new)["params"].append(parameter)
    return list(groups.values())
'''
_TRAINER = '''

def trainer_arguments(model, schedule):
    """``Trainer(..., **trainer_arguments(model, schedule))``; schedule(step) is a factor on every group's own lr.

    Trainer's own optimizer knows two groups (decayed or not) and one lr: it must not build one itself.
    """
    optimizer = torch.optim.AdamW(param_groups(model))
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))}
'''


def torch_file(plan: Plan, rows: Sequence[ExportRow], model: str, trainer: bool = False) -> str:
    """The file's text."""
    return _head(plan, model, trainer) + _table(plan, rows) + _BODY + (_TRAINER if trainer else "")


def _head(plan: Plan, model: str, trainer: bool) -> str:
    use = (
        "    init_(model)\n    trainer = Trainer(model=model, args=args, **trainer_arguments(model, schedule))"
        if trainer
        else "    init_(model)\n    optimizer = torch.optim.AdamW(param_groups(model))"
    )
    clip = "off" if plan.tuned.clip is None else f"{plan.tuned.clip:g}"
    return f'''"""{plan.target.name}: hyperparameters of plan {plan.hash} ({plan.rule.name}), written by mue export. Do not edit.

For {model}.

{use}

Multipliers are folded into these values; the model's forward code stays as it is. What this file cannot say:
 - a learning-rate schedule must multiply every group's own lr, never set one lr for all;
 - global-norm clipping (tuned at: {clip}) and folding do not commute: see mue.fold.clip_grad_norm_.
"""

import re

import torch
'''


def _table(plan: Plan, rows: Sequence[ExportRow]) -> str:
    lines = [
        f"    (r{row.pattern!r}, {row.lr!r}, {row.weight_decay!r}, {row.eps!r}, {row.std!r}, {row.constant!r}),  # {row.roles}"
        for row in _raw(rows)
    ]
    body = "\n".join(lines)
    return f"""
BETAS = {plan.betas!r}
FROZEN = r"(e_score_correction_bias|expert_bias)$"  # moved by load statistics, never by the optimizer
# (pattern of the whole name, lr, weight decay, eps, std of a normal draw, constant start); None, None: the model's own start
ROWS = [
{body}
]
"""


def _raw(rows: Sequence[ExportRow]) -> Sequence[ExportRow]:
    """Rows whose pattern prints as a raw string (repr doubles backslashes)."""

    class Raw(str):
        def __repr__(self) -> str:
            return f'"{self}"'

    return [ExportRow(Raw(row.pattern), *list(vars(row).values())[1:]) for row in rows]
