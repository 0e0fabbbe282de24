"""Faults of the forward pass inside the branches: the attention's scale, gate and up."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.wiring.case import MULTIPLIERS, Case
from support.wiring.fault import around, blocks, both, fault, named, times, unless

# ---- attention -------------------------------------------------------------------------------------------------------------------

Q = named("attention_q", "qk_norm")
SCALED = unless(not_scaled="its code has no number for the attention scale that could be changed")


def _scaled(c: Case) -> list[tuple[Any, str]]:
    modules = [b.attention for b in blocks(c)] if c.ours else list(c.inner.modules())
    return [(m, key) for m in modules for key in ("scaling", "scale") if isinstance(getattr(m, key, None), float)]


@fault(
    "attention scale left at 1/sqrt(head_dim)",
    "attention scale",
    Q,
    both(SCALED, unless(not_rescaled="the plan's attention scale is 1/√head_dim")),
    MULTIPLIERS,
)
def _(c: Case) -> None:
    """The stock scale in place of the planned one."""
    for module, key in _scaled(c):
        setattr(module, key, c.plan.target.head_dim**-0.5)


@fault("attention scale 1/head_dim", "attention scale, init, coverage", Q, SCALED)
def _(c: Case) -> None:
    """Another convention than the plan's."""
    for module, key in _scaled(c):
        setattr(module, key, getattr(module, key) ** 2 if getattr(module, key) != 1 else 0.0625)


@fault(
    "attention scale applied twice",
    "attention scale",
    Q,
    unless(not_own_queries="q, k and v are one tensor, and nothing normalises q after it"),
)
def _(c: Case) -> None:
    """The queries carry the scale that the softmax applies."""
    norms = [p for p in c.of("qk_norm") if p.name.rsplit(".", 2)[-2].startswith("q")]
    final = [p for p in c.of("attention_q") if "q_a_proj" not in p.name]
    for p in norms or final:
        times(c.module(p), 0.25)


# ---- gate and up -----------------------------------------------------------------------------------------------------------------


@fault(
    "swapped gate and up", "multipliers", named("ffn_gate", "shared_gate", "expert_gate"), unless(not_gated="no gates")
)
def _(c: Case) -> None:
    """The activation is on the up projection."""
    if c.ours:
        for b in blocks(c):
            if b.moe is not None:
                around(b.moe, _swapped)
            else:
                b.ffn.forward = types.MethodType(
                    lambda self, x: self.down(F.silu(self.up(x)) * self.gate(x)) * self.output_multiplier, b.ffn
                )
        return
    for p in c.of("ffn_gate", "shared_gate", "expert_gate"):
        module = c.module(p)
        if len(p.layout.parts) == 2 and p.name.endswith(".weight"):
            around(module, lambda old, x: torch.cat(old(x).chunk(2, -1)[::-1], -1))
        elif len(p.layout.parts) == 2:
            _swap_halves(
                module,
                p.name.rpartition(".")[2],
                p.layout.axes.index("out" if "out" in p.layout.axes else "expert*out"),
            )
        elif p.name.endswith(".weight"):
            up = next(
                c.module(u)
                for u in c.of(p.role.replace("gate", "up"))
                if u.layer == p.layer and u.parameter.shape == p.parameter.shape
            )
            up.forward, module.forward = module.forward, up.forward
        else:
            up_name = next(u.name.rpartition(".")[2] for u in c.of("expert_up") if u.layer == p.layer)
            # DBRX hands its tensors from one module to another: around the outer one
            _swap_tensors(c.experts()[p.layer], module, p.name.rpartition(".")[2], up_name)


def _swapped(old: Any, x: Tensor) -> Any:
    b = old.__self__
    pairs = ("experts_gate", "experts_up"), ("shared_gate", "shared_up")
    for one, other in pairs:
        b._parameters[one], b._parameters[other] = b._parameters[other], b._parameters[one]
    try:
        return old(x)
    finally:
        for one, other in pairs:
            b._parameters[one], b._parameters[other] = b._parameters[other], b._parameters[one]


def _swap_halves(module: nn.Module, key: str, axis: int) -> None:
    """While the module runs, its fused tensor has gate and up in the other order."""

    def change(old: Any, *args: Any, **kwargs: Any) -> Any:
        kept = module._parameters.pop(key)
        assert kept is not None
        gate, up = kept.chunk(2, axis)
        module.__dict__[key] = torch.cat([up, gate], axis)
        try:
            return old(*args, **kwargs)
        finally:
            del module.__dict__[key]
            module._parameters[key] = kept

    around(module, change)


def _swap_tensors(called: nn.Module, holder: nn.Module, one: str, other: str) -> None:
    """While ``called`` runs, two tensors of ``holder`` have each other's names."""

    def change(old: Any, *args: Any, **kwargs: Any) -> Any:
        p = holder._parameters
        p[one], p[other] = p[other], p[one]
        try:
            return old(*args, **kwargs)
        finally:
            p[one], p[other] = p[other], p[one]

    around(called, change)
