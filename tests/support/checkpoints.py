"""A small training run in one form, saved and gone on with in the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from typer.testing import CliRunner

import mue
from mue.cli import app
from mue.convert.forms import Conversion, conversion
from mue.fold import coefficients
from mue.lab.models.language import LanguageModel

SIZES: dict[str, Any] = {"head_dim": 4, "vocab": 11, "sequence": 16}
BASE = mue.Dense(width=4, ffn=8, layers=3, **SIZES)
MOE = mue.MoE.parse("4e2a1s", width=12, expert=5, layers=1, shared=5, **SIZES)  # no multiplier is a power of two
TUNED = mue.HParams(lr=4e-3, weight_decay=0.5, init_std=0.3, eps=1e-3)
HALVES = (mue.Dense(width=4, ffn=4, layers=1, **SIZES), mue.MoE.parse("8e2a", width=8, expert=8, layers=2, **SIZES))
K = 12  # the step at which a run is saved


def planned(base: mue.Dense = BASE, target: mue.shapes.Transformer = MOE, **changes: Any) -> mue.Plan:
    return mue.transfer(base, target, TUNED.replace(**changes))


def how(plan: mue.Plan, form: str, route: str = "weights") -> Conversion:
    """The conversion of the lab's model to a form of its plan."""
    with torch.device("meta"):
        return conversion(plan, form, LanguageModel(plan.target, plan.multipliers), route)


class Run:
    """A training run of the lab's model in one form, with a schedule; ``to`` saves and ``load`` goes on."""

    def __init__(self, plan: mue.Plan, seed: int | None = 0) -> None:
        self.plan = plan
        self.model = LanguageModel(plan.target, plan.multipliers, balance="none")
        if seed is not None:
            plan.init_(self.model, seed)
        self.optimizer = torch.optim.AdamW(plan.param_groups(self.model), amsgrad=True)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / 40)

    def train(self, start: int, steps: int) -> None:
        for step in range(start, start + steps):
            x = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            logits = self.model(x[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
            self.optimizer.step()
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        return {
            "plan": self.plan.hash,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": K,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def distance(one: Run, two: Run) -> float:
    """Largest relative difference of effective weights."""
    found = []
    c = [coefficients(r.plan, r.model) for r in (one, two)]
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        a, b = p.detach() / c[0][p], q.detach() / c[1][q]
        found.append(float((a - b).abs().max() / a.abs().max()))
    return max(found)


def run(arguments: list[str], folder: Path) -> Any:
    """The command line in this process; names of files are those of ``folder``."""
    paths = {a: str(folder / a) for a in arguments if "." in a or a in ("in", "out")}
    return CliRunner().invoke(app, [paths.get(a, a) for a in arguments])


def weights(plan: mue.Plan) -> dict[str, Tensor]:
    """The tensors of a planned model, as safetensors takes them."""
    model = LanguageModel(plan.target, plan.multipliers)
    return {n: t.contiguous() for n, t in model.state_dict().items()}
