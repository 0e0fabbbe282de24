"""Low-precision weights: a decay that rounding takes away is a fault, unless the optimizer keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import mue
from mue.checks import Report
from mue.checks.report import PASS, UNMEASURED
from mue.lab.models.language import LanguageModel

PLAN = mue.transfer(
    *(mue.Dense(d, d, 2, head_dim=16) for d in (32, 64)),
    mue.HParams(lr=1e-2, weight_decay=0.01, init_std=0.05, eps=1e-5),
)


class Masters(Optimizer):
    """AdamW on float32 weights of its own, called anything but masters; ``put`` writes them into the parameter."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(
                        exact=p.float(), first=torch.zeros_like(p).float(), second=torch.zeros_like(p).float(), n=0
                    )
                s["n"] += 1
                w, g, (b1, b2) = self.exact(p, s), p.grad.float(), group["betas"]
                s["first"].lerp_(g, 1 - b1)
                s["second"].lerp_(g * g, 1 - b2)
                step = s["first"] / (1 - b1 ** s["n"]) / ((s["second"] / (1 - b2 ** s["n"])).sqrt() + group["eps"])
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * step)
                p.copy_(self.put(w))

    def exact(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        return state["exact"]  # type: ignore[no-any-return]

    def put(self, weight: Tensor) -> Tensor:
        return weight


class Stochastic(Masters):
    """AdamW that rounds at random, up as often as is right on average, and keeps nothing."""

    def exact(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        state["exact"] = None
        return p.float()

    def put(self, weight: Tensor) -> Tensor:
        bits = weight.view(torch.int32) + torch.randint(1 << 16, weight.shape, dtype=torch.int32)
        return (bits & -(1 << 16)).view(torch.float32)


def checked(
    make: Callable[[Any], Optimizer] | None, dtype: torch.dtype = torch.bfloat16, begun: bool = False
) -> Report:
    model = LanguageModel(PLAN.target, PLAN.multipliers).to(dtype)
    PLAN.init_(model)
    tokens = torch.randint(256, (2, 64))
    optimizer = None if make is None else make(PLAN.param_groups(model))
    if begun:
        assert optimizer is not None
        model(tokens, tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return mue.check(model, PLAN, (tokens, tokens), optimizer, only=["moved"], raises=False)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_decay_below_half_a_step_of_the_weights_fails(dtype: torch.dtype, fused: bool, begun: bool) -> None:
    report = checked(lambda g: torch.optim.AdamW(g, fused=fused), dtype, begun)
    (found,) = [f for f in report.failures if "shrunk" in f.measured]
    assert "attention.q.weight" in found.where and "norm" not in found.where, found
    assert found.measured.startswith("shrunk by 0: half a step of") and "float32" in found.mend
    # and it is true: after fifty steps of decay alone nothing has shrunk
    w = torch.randn(64, 64).to(dtype).requires_grad_()
    w.grad = torch.zeros_like(w)
    start, decayed = w.detach().clone(), torch.optim.AdamW([w], lr=1e-2, weight_decay=0.01, eps=1e-5, fused=fused)
    for _ in range(50):
        decayed.step()
    assert torch.equal(w, start)


@pytest.mark.parametrize(
    ("make", "begun"), [(Masters, False), (Masters, True), (Stochastic, False), (torch.optim.AdamW, False)]
)
def test_a_decay_that_is_kept_passes(make: Any, begun: bool) -> None:
    """In float32 weights, in masters whatever they are called, or on average."""
    report = checked(make, torch.float32 if make is torch.optim.AdamW else torch.bfloat16, begun)
    assert [f.status for f in report.findings] == [PASS], report


def test_what_cannot_be_seen_is_no_pass() -> None:
    def around(groups: Any) -> Any:
        inside = torch.optim.AdamW([{**g, "params": [p.detach().float() for p in g["params"]]} for g in groups])
        return type(
            "Engine", (), {"optimizer": inside, "param_groups": inside.param_groups, "state": {}, "step": inside.step}
        )()

    for report in (checked(None), checked(Stochastic, begun=True)):
        (found,) = [f for f in report.findings if "weight decay" in f.expected]
        assert found.status == UNMEASURED and "attention.q.weight" in found.where
    assert any("Engine" in f.measured for f in checked(around).findings)
