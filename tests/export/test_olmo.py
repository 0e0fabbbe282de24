"""The file fed to OLMo-core: its own models and optimizer configs, both its MoE and its fused one. Run by `make stacks`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mue
from mue.export import export
from mue.export.olmo import OLMO, averaged_shared
from mue.fold import fold
from support.stack_models import megatron, need, olmo_fused_model, olmo_model
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
from support.stood_in_optimizers import DionMuon, stand_in

pytestmark = pytest.mark.stacks


MOES = pytest.mark.parametrize(("moe", "name"), [("default", "moe"), ("dropless", "moe_dropless")])


@ALL
@MOES
def test_olmo_builds_our_groups_and_starts(kind: str, moe: str, name: str) -> None:
    made = olmo_model(TARGETS[kind], moe=moe)
    table = OLMO.named(TARGETS[kind], name)
    same_parameters(made, table)
    folded = fold(plan(kind))
    extra, _ = averaged_shared(folded, table)
    assert bool(extra) == (kind == "dense, then experts")
    code = run(export(plan(kind), "olmo-core", name))
    optimizer = code["optim"]().build(made)
    wanted = planned(folded, table, extra)
    assert built(made, optimizer.param_groups, folded.betas) == wanted
    assert len(optimizer.param_groups) == len({*wanted.values()})
    assert all(g["initial_lr"] == g["lr"] for g in optimizer.param_groups)  # what its schedulers multiply
    code["init_"](made)
    assert_drawn(made, starts(folded, table, extra))
    assert sorted(run(export(plan(kind), "olmo-core", made))["ROWS"]) == sorted(code["ROWS"])


def test_olmo_weighs_shared_experts_as_we_say() -> None:
    """Its own forward: k/(k+1) of the routed sum and 1/(k+1) of the shared output, which the down projections make good."""
    made = olmo_model(TARGETS["dense, then experts"], moe="dropless").eval()
    layer: Any = made.get_submodule("blocks.1.feed_forward_moe")
    x, routed, seen = torch.randn(1, 3, 64), torch.randn(1, 3, 64), []
    layer.experts.forward = lambda x, weights, *_: seen.append(weights) or routed  # its kernels need a GPU
    assert torch.allclose(layer(x), 2 / 3 * routed + 1 / 3 * layer.shared_mlp(x), atol=1e-6)
    assert torch.allclose(seen[0].sum(-1), torch.ones(1, 3))


def test_olmo_blocks_with_norms_last() -> None:
    """The norm cancels what stands before it: the residual multiplier goes into its gain."""
    target = TARGETS["experts"]
    made = olmo_model(target, moe="dropless", post_norm=True)
    folded = fold(plan("experts"))
    table = OLMO.read(target, made)
    code = run(export(plan("experts"), "olmo-core", made))
    assert built(made, code["optim"]().build(made).param_groups, folded.betas) == planned(folded, table)
    code["init_"](made)
    gain = made.get_parameter("blocks.0.attention_norm.weight")
    assert torch.allclose(gain, torch.full_like(gain, plan("experts").residual_multiplier))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_olmo_fused_builds_our_groups_and_starts(pre_norm: bool) -> None:
    """The whole of OLMoDDPOptimizer, on a world of one process; it keeps master copies."""
    target = mue.MoE.parse("8e2a1s", width=64, expert=32, shared=48, layers=2, router="softmax", **SIZES)
    base = mue.Dense(32, 48, 6, head_dim=16, vocab=80)
    made_plan = mue.transfer(base, target, mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02, eps=1e-9))
    made = olmo_fused_model(target, pre_norm=pre_norm)
    table = OLMO.named(target, "moe_fused_v2")
    same_parameters(made, table)
    megatron()  # one process group for all
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("pp", "dp"))
    trainer = SimpleNamespace(
        dp_group=mesh["dp"].get_group(),
        ep_dp_group=None,
        world_mesh={"dense": mesh, "moe": None},
        device=mesh.device_type,
    )
    code = run(export(made_plan, "olmo-core", made))
    optimizer = code["optim"]().build([made], trainer, strict=False)
    groups = [{**g, "params": list(g["named_params"].values())} for g in optimizer.param_groups]
    folded = fold(made_plan)
    table = OLMO.read(target, made)
    assert built(made, groups, folded.betas) == planned(folded, table)
    code["init_"](made)
    assert_drawn(made, starts(folded, table))
    optimizer._copy_model_params_to_main_params()
    optimizer._check_model_param_main_param_the_same()
    other = olmo_fused_model(target, pre_norm=not pre_norm)
    with pytest.raises(ValueError, match="OLMoDDPTransformerBlock, use_pre_norm="):
        code["init_"](other)


def test_olmo_sees_what_is_wrong() -> None:
    need("olmo_core.optim")
    from olmo_core.exceptions import OLMoConfigurationError

    kind = "experts"
    text = export(plan(kind), "olmo-core")
    wd = fold(plan(kind)).role("expert_down", 0).values.weight_decay
    made = olmo_model(TARGETS[kind])
    optimizer = run(text.replace(repr(wd), repr(1.001 * wd)))["optim"]().build(made)
    table = OLMO.named(TARGETS[kind])
    assert built(made, optimizer.param_groups, plan(kind).betas) != planned(fold(plan(kind)), table)
    with pytest.raises(OLMoConfigurationError, match="does not match any parameters"):
        run(text)["optim"]().build(olmo_model(TARGETS["dense"]))
    with pytest.raises(ValueError, match="MoEReorderedNormTransformerBlock, use_pre_norm="):
        run(text)["init_"](olmo_model(TARGETS[kind], post_norm=True))
    with pytest.raises(ValueError, match="'normalize_expert_weights': None"):
        run(text)["init_"](olmo_model(TARGETS[kind], normalize_expert_weights=None))


DENSE = mue.Dense(64, 96, 4, **SIZES)


@pytest.mark.parametrize("scale", ["spectral", "keller", "match-rms"])
def test_olmo_builds_muons_groups(scale: str) -> None:
    """Through its own MuonConfig, which has one rate for all matrices; dion, which it builds, is stood in for."""
    stand_in()
    made_plan = mue.transfer(mue.Dense(32, 40, 6, **SIZES), DENSE, MUON.replace(update_scale=scale))
    made, table, folded = olmo_model(DENSE), OLMO.named(DENSE, "moe"), fold(made_plan)
    code = run(export(made_plan, "olmo-core"))
    optimizer = code["optim"]().build(made)
    assert type(optimizer) is DionMuon
    muon, adamw = ([g for g in optimizer.param_groups if g["algorithm"] == name] for name in ("muon", "adamw"))
    restated = "match-rms" if scale == "match-rms" else "spectral"
    wanted = planned_muon(folded, table, restated)
    assert built_muon(made, muon, adamw, "epsilon") == wanted and len({*wanted.values()}) > 4
    adjust = {"match-rms": "rms_norm", "spectral": "spectral_norm"}[restated]
    assert {(g["mu"], g["nesterov"], g["adjust_lr"]) for g in muon} == {(0.9, True, adjust)}
    assert {(g["beta1"], g["beta2"]) for g in adamw} == {folded.betas}
    assert all(g["initial_lr"] == g["lr"] for g in optimizer.param_groups)
    code["init_"](made)
    assert_drawn(made, starts(folded, table))


def test_olmo_alone_has_one_rate_for_all_matrices() -> None:
    """What the file's subclass is for: its own config takes no groups, and decays no embedding."""
    need("olmo_core.optim")
    stand_in()
    from olmo_core.optim import MuonConfig, OptimGroupOverride

    with pytest.raises(RuntimeError, match="not supported"):
        MuonConfig(group_overrides=[OptimGroupOverride(["*"], {"lr": 1.0})]).build(olmo_model(DENSE))
    plain = MuonConfig(lr=0.02).build(olmo_model(DENSE))
    assert {g["lr"] for g in plain.param_groups} == {0.02} and 0.0 in {g["weight_decay"] for g in plain.param_groups}
