"""`mue.check` on a stock DiT of ``diffusers``: a right one raises no alarm, and each seeded fault is named by the check meant for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="stock diffusion transformers need the diffusers extra")

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

import mue
from mue.checks import Report

torch.set_num_threads(1)


def velocity_loss(model: nn.Module, batch: Any) -> Tensor:
    """DiT learns a variance in its other channels, which is left out."""
    drawn: Tensor = model(**batch).sample
    return (drawn[:, :4] - batch["hidden_states"]).square().mean()


@dataclass
class Case:
    model: Any
    plan: mue.Plan
    optimizer: torch.optim.Optimizer

    def check(self) -> Report:
        draw = torch.Generator().manual_seed(1)
        batch = {
            "hidden_states": torch.randn(4, 4, 8, 8, generator=draw),
            "timestep": torch.randint(1000, (4,), generator=draw),
            "class_labels": torch.randint(10, (4,), generator=draw),
        }
        return mue.checks.check(self.model, self.plan, batch, self.optimizer, loss=velocity_loss, raises=False)


def case() -> Case:
    """Twice the width of its base and another expansion, so that no multiplier of the plan is 1."""
    common: dict[str, Any] = {"attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10}
    base, model = (DiTTransformer2DModel(num_attention_heads=heads, **common) for heads in (2, 4))
    tuned = mue.HParams(lr=4e-3, weight_decay=0.02, init_std=0.1)
    narrow = mue.Dense(width=32, ffn=64, layers=1, head_dim=16, gated=False, image=mue.Dense.of(base).image)
    plan = mue.fold.fold(mue.transfer(narrow, mue.Dense.of(model), tuned))
    plan.init_(model)
    return Case(model, plan, torch.optim.AdamW(plan.param_groups(model)))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_right_model_raises_no_alarm(steps: int) -> None:
    """At init, where every branch is 0 behind its gate, and after three steps, where none is."""
    c = case()
    for _ in range(steps):
        c.optimizer.zero_grad()
        inputs = {
            "hidden_states": torch.randn(4, 4, 8, 8),
            "timestep": torch.arange(4),
            "class_labels": torch.arange(4),
        }
        velocity_loss(c.model, inputs).backward()
        c.optimizer.step()
    report = c.check()
    wrong = [f for f in (*report.failures, *report.unmeasured, *report.warnings) if not (steps and f.check == "init")]
    assert not wrong, report
    passed = {f.check for f in report.findings if f.status == "pass"}
    assert passed >= {"coverage", "groups", "multipliers", "modulation", "attention scale", "samples", "moved"}, report


FAULTS: dict[str, tuple[Callable[[Case], None], str, str]] = {}


def fault(check: str, where: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def keep(apply: Callable[[Case], None]) -> Callable[[Case], None]:
        FAULTS[apply.__name__] = apply, check, where
        return apply

    return keep


@fault("groups", r"norm1\.linear|attn1")
def one_group_for_all(c: Case) -> None:
    c.optimizer = torch.optim.AdamW(c.model.parameters(), lr=4e-3, weight_decay=0.02)


@fault("init", r"to_out\.0\.weight")
def drawn_by_the_library(c: Case) -> None:
    for linear in (m for m in c.model.modules() if isinstance(m, nn.Linear)):
        linear.reset_parameters()


@fault("multipliers", r"blocks 1 feed-forward|blocks\.1\.ff")
def a_branch_is_doubled(c: Case) -> None:
    c.model.transformer_blocks[1].ff.register_forward_hook(lambda module, args, out: 2 * out)


@fault("multipliers", r"pos_embed\.proj\.weight")
def patches_are_doubled(c: Case) -> None:
    c.model.pos_embed.proj.register_forward_hook(lambda module, args, out: 2 * out)


@fault("attention scale", r"blocks\.0\.attn1")
def heads_of_another_size(c: Case) -> None:
    c.model.transformer_blocks[0].attn1.heads = 2


@fault("modulation", r"blocks 0 attention")
def no_gate(c: Case) -> None:
    c.model.transformer_blocks[0].norm1.register_forward_hook(
        lambda module, args, out: (out[0], torch.ones(out[1].shape), *out[2:])
    )


@fault("modulation", r"blocks\.0\.norm1\.linear")
def one_vector_twice(c: Case) -> None:
    """The gate of the attention is used for the feed-forward, too."""
    c.model.transformer_blocks[0].norm1.register_forward_hook(lambda module, args, out: (*out[:4], out[1]))


@fault("samples", r"blocks 1 attention")
def statistics_of_the_batch(c: Case) -> None:
    c.model.transformer_blocks[1].attn1.register_forward_hook(lambda module, args, out: out - out.mean(0, keepdim=True))


@fault("moved", r"blocks\.1\.ff\.net\.2\.weight")
def a_frozen_matrix(c: Case) -> None:
    c.model.transformer_blocks[1].ff.net[2].weight.requires_grad_(False)


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_named(name: str) -> None:
    apply, check, where = FAULTS[name]
    c = case()
    apply(c)
    report = c.check()
    assert any(f.check == check and re.search(where, f.where) for f in report.failures), report
