"""Faults of optimizers and schedulers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from support.wiring.case import FOLDED, TUNED, Case
from support.wiring.fault import EXPERTS, HEAD, MOE, ROUTER, fault, named, regroup, unless

ANY = r"embed|head|wte|blocks|layers|\.h\."


def _set(groups: list[dict[str, Any]], **values: float) -> None:
    for g in groups:
        g.update(values)
        if "lr" in values:
            g["initial_lr"] = values["lr"]


@fault("router at base lr", "groups", named("router", then=".*: lr"), ROUTER)
def _(c: Case) -> None:
    """The router's rate is the dense base's."""
    _set(c.apart("router"), lr=TUNED.lr)


@fault("head lr scaled like a hidden matrix", "groups", named("head", then=".*: lr"), HEAD)
def _(c: Case) -> None:
    """The head's rate follows the width."""
    for g in c.apart("head"):
        _set([g], lr=g["lr"] / 2)


@fault("down lr of the unfolded plan", "groups", named("expert_down", then=".*: lr"), MOE, FOLDED)
def _(c: Case) -> None:
    """The rate without the folded multiplier's share."""
    for g in c.apart("expert_down"):
        _set([g], lr=g["lr"] * 2)


@fault(
    "weight decay on norms",
    "groups",
    named("norm", "qk_norm", "final_norm", then=".*: weight_decay"),
    unless(not_gains="its norms have no gains"),
)
def _(c: Case) -> None:
    """Gains are decayed."""
    _set(c.apart("norm", "qk_norm", "final_norm"), weight_decay=0.1)


@fault("no weight decay on stacked experts", "groups", named(*EXPERTS, then=".*: weight_decay"), MOE)
def _(c: Case) -> None:
    """A filter by number of axes took experts for vectors."""
    _set(c.apart(*EXPERTS), weight_decay=0.0)


@fault("one weight decay for all widths", "groups", r": weight_decay")
def _(c: Case) -> None:
    """The base's decay everywhere."""
    for g in c.optimizer.param_groups:
        if g["weight_decay"]:
            g["weight_decay"] = TUNED.weight_decay


@fault("eps unscaled", "groups", r": eps")
def _(c: Case) -> None:
    """torch's default eps in every group."""
    _set(c.optimizer.param_groups, eps=1e-8)


@fault("betas not rescaled for the duration", "groups", r": betas")
def _(c: Case) -> None:
    """The base's betas on a longer run."""
    for g in c.optimizer.param_groups:
        g["betas"] = TUNED.betas


def _other(c: Case, kind: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], *keys: str) -> None:
    """Another optimizer with the planned groups, as far as it knows their keys."""
    _peaks(c)
    groups = [{k: v for k, v in g.items() if k in ("params", "lr", *keys)} for g in c.optimizer.param_groups]
    c.optimizer, c.scheduler = kind(groups), None


@fault("Adam for AdamW", "groups", r"torch\.optim\.Adam")
def _(c: Case) -> None:
    """Decay goes through the moments."""
    _other(c, torch.optim.Adam, "weight_decay", "eps", "betas")


@fault("SGD for AdamW", "groups, moved", r"SGD")
def _(c: Case) -> None:
    """Rates of Adam on plain gradients."""
    _other(c, torch.optim.SGD, "weight_decay")


@fault("RMSprop for AdamW", "groups, moved", r"RMSprop")
def _(c: Case) -> None:
    """No first moment, and decay in the gradient."""
    _other(c, torch.optim.RMSprop, "weight_decay", "eps")


@fault("Adagrad for AdamW", "groups, moved", r"Adagrad")
def _(c: Case) -> None:
    """Rates that fall with the sum of squares."""
    _other(c, torch.optim.Adagrad, "weight_decay", "eps")


@fault("stacked experts filtered out of the optimizer", "groups", named(*EXPERTS), MOE)
def _(c: Case) -> None:
    """A classifier that knows matrices of two axes, or modules of nn.Linear, only."""
    out = {id(p.parameter) for p in c.of(*EXPERTS)}
    for g in c.optimizer.param_groups:
        g["params"] = [p for p in g["params"] if id(p) not in out]


@fault("one parameter in two groups", "groups", named("attention_o"))
def _(c: Case) -> None:
    """Stepped once by each of them."""
    p = c.of("attention_o")[0]
    c.optimizer.param_groups.append({**c.group(p), "params": [p.parameter]})


@fault("optimizer of an older copy of the model", "groups", ANY)
def _(c: Case) -> None:
    """The model was built again after its optimizer."""
    c.model = copy.deepcopy(c.model)
    c.clip = None


@fault("optimizer of a stale plan", "groups, scheduler", r": (lr|weight_decay|eps)|highest rates")
def _(c: Case) -> None:
    """The plan was tuned again, the groups are the old ones."""
    regroup(c, c.plan.retuned(lr=TUNED.lr * 2).param_groups(c.model))


@fault("default groups: one lr for everything", "groups", r": lr")
def _(c: Case) -> None:
    """AdamW(model.parameters()) with the tuned values."""
    trained = [p for p in c.model.parameters() if p.requires_grad]
    regroup(c, [{"params": trained}], lr=TUNED.lr, weight_decay=TUNED.weight_decay)


# ---- scheduler ---------------------------------------------------------------------------------------------------------------


def _peaks(c: Case) -> list[float]:
    """The planned rates, on the groups again."""
    for g in c.optimizer.param_groups:
        g["lr"] = g["initial_lr"]
    return [g["initial_lr"] for g in c.optimizer.param_groups]


@fault("scheduler that writes absolute lr", "scheduler", r"step")
def _(c: Case) -> None:
    """A function of the step sets one rate in all groups."""

    def write(step: int) -> None:
        for g in c.optimizer.param_groups:
            g["lr"] = TUNED.lr * min(1.0, (step + 1) / 10)

    c.scheduler = write


@fault("OneCycleLR with one peak", "scheduler", r"OneCycleLR")
def _(c: Case) -> None:
    """A number for max_lr is every group's."""
    c.scheduler = torch.optim.lr_scheduler.OneCycleLR(
        c.optimizer, max_lr=TUNED.lr, total_steps=50, cycle_momentum=False
    )


@fault("scheduler that cycles momentum", "scheduler", r"OneCycleLR")
def _(c: Case) -> None:
    """OneCycleLR's default changes betas."""
    c.scheduler = torch.optim.lr_scheduler.OneCycleLR(c.optimizer, max_lr=_peaks(c), total_steps=50)


@fault("cosine floor as an absolute lr", "scheduler", r"CosineAnnealingLR")
def _(c: Case) -> None:
    """eta_min is one number for all groups."""
    _peaks(c)
    c.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(c.optimizer, T_max=50, eta_min=1e-4)


@fault("warmup on some groups only", "scheduler", r"LambdaLR")
def _(c: Case) -> None:
    """A list of lambdas of which some are constant."""
    some = [
        (lambda step: 1.0) if i else (lambda step: min(1.0, (step + 1) / 10))
        for i in range(len(c.optimizer.param_groups))
    ]
    c.scheduler = torch.optim.lr_scheduler.LambdaLR(c.optimizer, some)
