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
from support.stack_models import megatron, need, titan_config, titan_latent_config
from support.stack_values import (
    ALL,
    MUON,
    SIZES,
    TARGETS,
    assert_drawn,
    built,
    built_muon,
    plan,
    planned,
    planned_muon,
    run,
    same_parameters,
    starts,
)
from support.stood_in_optimizers import polar

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


ROUTED = mue.Mixed(
    64,
    (mue.Block(layers=1, ffn=96), mue.Block(layers=1, experts=4, active=1, expert=96, router="softmax")),
    **SIZES,
)


def muon_plan(**tuned: Any) -> mue.Plan:
    # every matrix in the base's proportions, so that one rate stays one in any convention
    return mue.transfer(mue.Dense(32, 48, 2, **{**SIZES, "kv_heads": 1}), ROUTED, MUON.replace(**tuned))


def on_a_mesh(made: nn.Module) -> None:
    """Every parameter as FSDP leaves it: a DTensor of a mesh with a named axis, here of one process."""
    megatron()  # one process group for all
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",))
    for module in made.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))


@pytest.mark.parametrize("scale", ["spectral", "match-rms"])
def test_torchtitans_dist_muon_takes_the_plans_group(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own DistMuon, but for the demand that the device is a GPU: groups, layouts and buckets are read, and its rows are matrices."""
    need("torchtitan.distributed.flex_shard")
    from torchtitan.distributed.flex_shard import dist_muon

    validate = dist_muon.DistMuon._validate_parameter_storage

    def on_cpu(optimizer: Any) -> torch.device:
        with pytest.raises(ValueError, match="one CUDA device"):
            validate(optimizer)
        return torch.device("cpu")

    monkeypatch.setattr(dist_muon.DistMuon, "_validate_parameter_storage", on_cpu)
    monkeypatch.setattr(dist_muon, "_BucketedRedistributionRuntime", _Nothing)
    made_plan = muon_plan(update_scale=scale)
    config = titan_config(ROUTED, fuse_qkv=False)
    run(export(made_plan, "torchtitan", "qwen3_unfused"))["apply"](config)
    made = config.model_spec.model.build()
    table, folded = TORCHTITAN.named(ROUTED, "qwen3_unfused"), fold(made_plan)
    same_parameters(made, table)
    on_a_mesh(made)
    config.optimizer.implementation = "for-loop"
    optimizers = {type(o).__name__: o for o in config.optimizer.build(model_parts=[made])}
    muon, adamw = optimizers["DistMuon"], optimizers["AdamW"]
    found, wanted = built_muon(made, muon.param_groups, adamw.param_groups), planned_muon(folded, table, scale)
    assert found.keys() == wanted.keys()
    assert all(
        found[name] == pytest.approx(wanted[name], rel=1e-12) for name in found
    )  # one rate, for all that differ in rounding
    (group,) = muon.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    shapes = {layout.fqn: tuple(layout.global_compute_shape) for layout in muon._parameter_compute_layouts}
    assert shapes["layers.1.moe.routed_experts.inner_experts.w1_EFD"] == (4, 96, 64)  # a batch of matrices to it
    assert shapes["layers.0.attention.qkv_linear.wk.weight"] == (32, 64) and len(shapes) == 2 * 4 + 3 + 3
    # what it does with such a batch, and by which scale, is the plan's
    step = dist_muon._apply_muon_update
    x = torch.randn(4, 96, 64)
    weight, direction = torch.randn(4, 96, 64), torch.stack([polar(m) for m in x])
    moved = weight.clone()
    step(
        moved,
        direction.clone(),
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        adjust_lr_fn=group["adjust_lr_fn"],
        compute_matrix_shape=x.shape,
    )
    factor = {"spectral": (96 / 64) ** 0.5, "match-rms": 0.2 * 96**0.5}[scale]
    expected = weight * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * factor * direction
    assert torch.allclose(moved, expected, atol=1e-6)


class _Nothing:
    """In the place of what moves shards between ranks, which needs streams of a GPU."""

    def __init__(self, *_: Any) -> None:
        """Nothing to keep."""

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def reserve_buffers(self, *_: Any, **__: Any) -> None:
        """Nothing to reserve."""


def test_torchtitans_dist_muon_takes_one_group() -> None:
    """Why a plan of several rates is refused."""
    need("torchtitan.distributed.flex_shard")
    from torchtitan.distributed.flex_shard import build_dist_muon

    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "param_names": [str(i)], "lr": 0.1 + i} for i in range(2)]
    with pytest.raises(ValueError, match="exactly one parameter group"):
        build_dist_muon(groups, compute_sharding_by_fqn={}, bucket_configs=())
