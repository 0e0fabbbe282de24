"""The recipe fed to torchtitan: its configs build models and optimizers from it. Run by `make stacks`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mue
from mue.export import export
from mue.export.torchtitan import TORCHTITAN
from mue.fold import fold
from support.stack_models import need, titan_config, titan_latent_config
from support.stack_values import ALL, TARGETS, assert_drawn, built, plan, planned, run, same_parameters, starts

pytestmark = pytest.mark.stacks

HPARAMS = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02, eps=1e-9)


def titan(kind: str, text: str | None = None, **model: Any) -> tuple[nn.Module, Any]:
    """(its model, its optimizer) as the exported recipe makes a Trainer.Config."""
    config = titan_config(TARGETS[kind], **model)
    run(text or export(plan(kind), "torchtitan"))["apply"](config)
    made = config.model_spec.model.build()
    config.optimizer.implementation = "for-loop"
    return made, config.optimizer.build(model_parts=[made])


@ALL
def test_torchtitan_builds_our_groups(kind: str) -> None:
    made, optimizer = titan(kind)
    table = TORCHTITAN.named(TARGETS[kind])
    same_parameters(made, table)
    folded = fold(plan(kind), "model")
    groups = [g for one in optimizer for g in one.param_groups]
    assert built(made, groups, folded.betas) == planned(folded, table)
    assert len(groups) == len({*planned(folded, table).values()})


@ALL
def test_torchtitan_draws_our_starts(kind: str) -> None:
    made, _ = titan(kind)
    made.init_states()
    assert_drawn(made, starts(fold(plan(kind), "model"), TORCHTITAN.named(TARGETS[kind])))


def test_torchtitan_scales_its_routers() -> None:
    made, _ = titan("dense, then experts")
    made.init_states()
    router = made.get_submodule("layers.1.moe.router")
    weights, _, _ = router(torch.randn(2, 4, 64))
    assert torch.allclose(weights.sum(-1), torch.tensor(2.0))  # R = a


def test_torchtitan_under_checkpointing_and_unfused() -> None:
    need("torchtitan.distributed.activation_checkpoint")
    from torchtitan.distributed.activation_checkpoint import FullAC

    kind = "dense, then experts"
    config = titan_config(TARGETS[kind], fuse_qkv=False, qk_norm=False)
    made = config.model_spec.model.build()
    run(export(plan(kind), "torchtitan", made))["apply"](config)
    made = config.model_spec.model.build()
    folded = fold(plan(kind), "model")
    wanted = planned(folded, TORCHTITAN.read(TARGETS[kind], made))
    assert any(".wq." in name for name in wanted) and not any("q_norm" in name for name in wanted)
    FullAC.Config().build().apply(made)
    assert any("_checkpoint_wrapped_module" in name for name, _ in made.named_parameters())
    config.optimizer.implementation = "for-loop"
    groups = [g for one in config.optimizer.build(model_parts=[made]) for g in one.param_groups]
    assert built(made, groups, folded.betas) == wanted
    made.init_states()
    assert_drawn(made, starts(folded, TORCHTITAN.read(TARGETS[kind], made)))


def test_torchtitan_latent_attention_has_fan_ins_of_its_own() -> None:
    """DeepSeek-V3: the projections out of a latent are drawn and moved by its rank, not by the width."""
    moe = mue.Block(layers=1, experts=8, active=2, expert=32, shared_experts=1)
    target = mue.Mixed(64, (mue.Block(layers=1, ffn=96), moe), head_dim=16, vocab=80)
    made_plan = mue.transfer(mue.Dense(32, 48, 6, head_dim=16, vocab=80), target, HPARAMS)
    config = titan_latent_config(target, q_rank=24, kv_rank=16)
    code = run(export(made_plan, "torchtitan", config.model_spec.model.build()))
    made = code["apply"](config).model_spec.model.build()
    config.optimizer.implementation = "for-loop"
    folded, table = fold(made_plan, "model"), TORCHTITAN.read(target, made)
    groups = [g for one in config.optimizer.build(model_parts=[made]) for g in one.param_groups]
    assert built(made, groups, folded.betas) == planned(folded, table)
    wanted = starts(folded, table)
    made.init_states()
    assert_drawn(made, wanted)
    into, out = (wanted[f"layers.1.attention.{name}.weight"][0] or 0.0 for name in ("wkv_a", "wkv_b"))
    assert out == pytest.approx(into * (64 / 16) ** 0.5)


def test_torchtitan_sees_what_is_wrong() -> None:
    kind = "experts"
    text = export(plan(kind), "torchtitan")
    lr = fold(plan(kind), "model").role("expert_down", 0).values.lr
    made, optimizer = titan(kind, text.replace(repr(lr), repr(1.001 * lr)))
    groups = [g for one in optimizer for g in one.param_groups]
    assert built(made, groups, plan(kind).betas) != planned(fold(plan(kind), "model"), TORCHTITAN.named(TARGETS[kind]))
    with pytest.raises(ValueError, match="matched no parameters"):
        titan(kind, text, qk_norm=False)
    with pytest.raises(ValueError, match="this plan is for"):
        run(text)["apply"](titan_config(TARGETS["tied"]))
