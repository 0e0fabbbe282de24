"""Small exact optimizers of the fold table that torch lacks (or has not in float64): for their update, not for speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Rule(Optimizer):
    """Base: calls :meth:`move` on every parameter with its group and state."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p.grad, group, self.state[p])

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise NotImplementedError


def adam_ratio(
    g: Tensor, group: dict[str, Any], state: dict[str, Any], names: tuple[str, str] = ("exp_avg", "exp_avg_sq")
) -> Tensor:
    """Adam's direction (1412.6980), moments and count in ``state``."""
    m, v = (state.setdefault(name, torch.zeros_like(g)) for name in names)
    b1, b2 = group["betas"]
    state["count"] = t = state.get("count", 0) + 1
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])


class IndependentAdamW(Rule):
    """AdamW as its paper has it (1711.05101): the decay follows the schedule and not the learning rate."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        phase = group["lr"] / group.get("initial_lr", group["lr"])
        p.mul_(1 - group["weight_decay"] * phase).sub_(group["lr"] * adam_ratio(g, group, state))


class Lion(Rule):
    """2302.06675: the sign of one average of gradients, another one kept."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        m, (b1, b2) = state.setdefault("exp_avg", torch.zeros_like(p)), group["betas"]
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * (b1 * m + (1 - b1) * g).sign())
        m.lerp_(g, 1 - b2)


class SignSGD(Rule):
    """1802.04434, with decoupled decay."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * g.sign())


class DecoupledSGD(Rule):
    """SGD with momentum and a decay that stays out of it (1711.05101, algorithm 1)."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        m = state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(group["betas"][0]).add_(g)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m)


class ExactMuon(Rule):
    """Momentum, then the polar factor by SVD; matrices with the last two axes, AdamW for groups that say so."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if group.get("algorithm", "muon") == "adamw" or p.dim() < 2:
            p.sub_(group["lr"] * adam_ratio(g, group, state))
            return
        m = state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(group["betas"][0]).add_(g)
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        kept = (s > 1e-9 * s[..., :1]).to(s.dtype)  # directions no token has moved have no polar factor
        p.sub_(group["lr"] * (p.shape[-2] / p.shape[-1]) ** 0.5 * (u * kept[..., None, :] @ vh))


class Shampoo(Rule):
    """L^-1/4 G R^-1/4 with damping in both factors (1802.09568); a sign for vectors. The decay is decoupled."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if p.dim() < 2:
            p.sub_(group["lr"] * g.sign())
            return
        left, right = g @ g.mT, g.mT @ g
        left, right = (state.setdefault(k, torch.zeros_like(x)).add_(x) for k, x in (("left", left), ("right", right)))
        p.sub_(group["lr"] * quarter(left, group["eps"]) @ g @ quarter(right, group["eps"]))


def quarter(x: Tensor, damping: float) -> Tensor:
    """(x + damping)^-1/4 of symmetric matrices."""
    w, q = torch.linalg.eigh(x + damping * torch.eye(x.shape[-1], dtype=x.dtype))
    return q @ torch.diag_embed(w**-0.25) @ q.mT


class Soap(Rule):
    """AdamW in the eigenbasis of the first gradient's factors (2409.11321); its refresh would change nothing here."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if p.dim() < 2:
            p.sub_(group["lr"] * adam_ratio(g, group, state))
            return
        if "basis" not in state:
            state["basis"] = tuple(signed(torch.linalg.eigh(x)[1]) for x in (g @ g.mT, g.mT @ g))
        ql, qr = state["basis"]
        p.sub_(group["lr"] * ql @ adam_ratio(ql.mT @ g @ qr, group, state) @ qr.mT)


def signed(q: Tensor) -> Tensor:
    """Eigenvectors with the sign of their largest entry, so that rounding cannot flip one."""
    pick = q.gather(-2, q.abs().argmax(-2, keepdim=True))
    return q * pick.sign()


class Lamb(Rule):
    """1904.00962, its φ the identity."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        u = adam_ratio(g, group, state) + group["weight_decay"] * p
        p.sub_(group["lr"] * trust(p, u) * u)


class Lars(Rule):
    """1708.03888: momentum of steps that are scaled to the weight's norm."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        u = g + group["weight_decay"] * p
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(0.9)
        p.sub_(buffer.add_(group["lr"] * trust(p, u) * u))


def trust(p: Tensor, u: Tensor) -> Tensor:
    """‖W‖/‖u‖ without any clamp; 0 at a weight of zeros (a bias that has not moved stays)."""
    return p.norm() / u.norm().clamp_min(1e-300)


class Hyperball(Rule):
    """AdamH: a step of lr·‖W‖ along Adam's direction, and back on the sphere the weight started on; vectors as Adam."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        u = adam_ratio(g, group, state)
        radius = state.setdefault("radius", p.norm())
        moved = p - group["lr"] * radius * u / u.norm().clamp_min(1e-300)
        p.copy_(radius * moved / moved.norm().clamp_min(1e-300))
