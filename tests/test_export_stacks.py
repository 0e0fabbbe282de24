"""Exports fed to the real packages: torchtitan, Megatron-Core and OLMo-core build their own models and optimizers from them.

Run by `make stacks` (and by `make test`) in an environment with the packages; elsewhere skipped, with that reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mue
from mue.export import export
from mue.export.scale import averaged_shared
from mue.fold import fold
from mue.fold.plan import folded_values
from mue.layouts.skeleton import Skeleton, read, skeleton
from mue.plan import Plan
from mue.roles import canonical
from mue.settings import settings
from stack_models import megatron, megatron_model, need, olmo_fused_model, olmo_model, titan_config

pytestmark = pytest.mark.stacks

SIZES: dict[str, Any] = {"head_dim": 16, "kv_heads": 2, "vocab": 80}
EXPERTS = mue.Block(layers=2, experts=8, active=2, expert=32, shared_experts=1, shared=48, router="softmax")
TARGETS = {
    "dense": mue.Dense(64, 96, 2, **SIZES),
    "dense, then experts": mue.Mixed(64, (mue.Block(layers=1, ffn=96), EXPERTS), **SIZES),
    "experts": mue.MoE.parse("8e3a", width=64, expert=32, layers=2, **SIZES),
    "tied": mue.MoE.parse("8e2a", width=64, expert=32, layers=2, tied=True, **SIZES),
}
ALL = pytest.mark.parametrize("kind", TARGETS)
Values = dict[str, tuple[float, float, float]]


@cache
def plan(kind: str) -> Plan:
    """From a base of other width, depth, expansion and, per third of the depth, another lr: every value differs."""
    target = TARGETS[kind]
    base = mue.Dense(32, 48, 6, head_dim=16, vocab=80, tied=target.tied)
    roles = {"head": {"lr_times": 1.5}, "last_third": {"attention_o": {"lr_times": 2.0}}}
    tuned = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02, eps=1e-9, floor=0.1, clip=1.0, roles=roles)
    return mue.transfer(base, target, tuned)


def run(text: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    return namespace


def planned(folded: Plan, model: Skeleton, extra: dict[str, float] | None = None) -> Values:
    """(lr, weight decay, eps) by name, straight from the plan's settings."""
    found = {}
    for s in settings(folded, model):
        v = folded_values(folded, s.placed.role, s.values, (extra or {}).get(s.placed.layout.pattern, 1.0))
        assert v.lr is not None and v.weight_decay is not None and v.eps is not None
        found[s.placed.name] = (v.lr, v.weight_decay, v.eps)
    return found


def built(model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Values:
    """The same, read from an optimizer."""
    names = {id(p): canonical(n) for n, p in model.named_parameters()}
    assert all(tuple(g["betas"]) == betas for g in groups)
    assert len({(g["lr"], g["weight_decay"], g["eps"]) for g in groups}) == len(groups)
    found = {names[id(p)]: (g["lr"], g["weight_decay"], g["eps"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups)
    return found


def starts(
    folded: Plan, model: Skeleton, extra: dict[str, float] | None = None
) -> dict[str, tuple[float | None, float | None]]:
    """(std, constant) by name."""
    scale = extra or {}
    return {
        s.placed.name: (
            None if s.values.init_std is None else s.values.init_std * scale.get(s.placed.layout.pattern, 1.0),
            s.constant,
        )
        for s in settings(folded, model)
    }


def assert_drawn(model: nn.Module, wanted: dict[str, tuple[float | None, float | None]]) -> None:
    """Every tensor has its planned std (five standard errors) or constant."""
    for raw, parameter in model.named_parameters():
        std, constant = wanted[canonical(raw)]
        x: Tensor = parameter.detach()
        if std is None:
            assert constant is not None
            assert torch.allclose(x, torch.full_like(x, constant)), raw
        else:
            assert float(x.std()) == pytest.approx(std, rel=5 / (2 * x.numel()) ** 0.5), raw
            assert abs(float(x.mean())) < 5 * std / x.numel() ** 0.5, raw


def same_parameters(made: nn.Module, table: Skeleton) -> None:
    """A stack's own model has exactly the names and shapes that the table gives the planned shape."""
    here = {n: tuple(p.shape) for n, p in made.named_parameters()}
    assert here == {n: tuple(p.shape) for n, p in table.named_parameters()}


# ---- torchtitan --------------------------------------------------------------------------------------------------


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
    table = skeleton("torchtitan", TARGETS[kind])
    same_parameters(made, table)
    folded = fold(plan(kind), "model")
    groups = [g for one in optimizer for g in one.param_groups]
    assert built(made, groups, folded.betas) == planned(folded, table)
    assert len(groups) == len({*planned(folded, table).values()})


@ALL
def test_torchtitan_draws_our_starts(kind: str) -> None:
    made, _ = titan(kind)
    made.init_states()
    assert_drawn(made, starts(fold(plan(kind), "model"), skeleton("torchtitan", TARGETS[kind])))


def test_torchtitan_scales_its_routers() -> None:
    made, _ = titan("dense, then experts")
    made.init_states()
    router = made.get_submodule("layers.1.moe.router")
    weights, _, _ = router(torch.randn(2, 4, 64))
    assert torch.allclose(weights.sum(-1), torch.tensor(2.0))  # R = a
    assert torch.allclose(fold(plan("experts"), "model").blocks[0].route_scale * torch.ones(1), torch.tensor(3.0))


def test_torchtitan_under_checkpointing_and_unfused() -> None:
    need("torchtitan.distributed.activation_checkpoint")
    from torchtitan.distributed.activation_checkpoint import FullAC

    kind = "dense, then experts"
    config = titan_config(TARGETS[kind], fuse_qkv=False, qk_norm=False)
    made = config.model_spec.model.build()
    run(export(plan(kind), "torchtitan", made))["apply"](config)
    made = config.model_spec.model.build()
    folded = fold(plan(kind), "model")
    wanted = planned(folded, read("torchtitan", TARGETS[kind], made))
    assert any(".wq." in name for name in wanted) and not any("q_norm" in name for name in wanted)
    FullAC.Config().build().apply(made)
    assert any("_checkpoint_wrapped_module" in name for name, _ in made.named_parameters())
    config.optimizer.implementation = "for-loop"
    groups = [g for one in config.optimizer.build(model_parts=[made]) for g in one.param_groups]
    assert built(made, groups, folded.betas) == wanted
    made.init_states()
    assert_drawn(made, starts(folded, read("torchtitan", TARGETS[kind], made)))


def test_torchtitan_sees_what_is_wrong() -> None:
    kind = "experts"
    text = export(plan(kind), "torchtitan")
    lr = fold(plan(kind), "model").role("expert_down", 0).values.lr
    made, optimizer = titan(kind, text.replace(repr(lr), repr(1.001 * lr)))
    groups = [g for one in optimizer for g in one.param_groups]
    assert built(made, groups, plan(kind).betas) != planned(
        fold(plan(kind), "model"), skeleton("torchtitan", TARGETS[kind])
    )
    with pytest.raises(ValueError, match="matched no parameters"):
        titan(kind, text, qk_norm=False)
    with pytest.raises(ValueError, match="this plan is for"):
        run(text)["apply"](titan_config(TARGETS["tied"]))


# ---- Megatron-Core -----------------------------------------------------------------------------------------------


def on_cpu(make: Callable[[], Any]) -> Any:
    """Megatron puts one scalar, the loss scale, on the GPU; here it stays on the CPU."""
    tensor = torch.tensor

    def here(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        return tensor(data, *args, **{k: v for k, v in kwargs.items() if (k, v) != ("device", "cuda")})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", here)
        return make()


def megatron_optimizer(code: dict[str, Any], made: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    made.ddp_config = DistributedDataParallelConfig()
    config = OptimizerConfig(**code["OPTIMIZER"])
    return on_cpu(lambda: get_megatron_optimizer(config, [made], code["config_overrides"]()))


def scheduled(code: dict[str, Any], optimizer: Any, style: str = "constant", step: int = 0) -> list[dict[str, Any]]:
    """Its groups as its own scheduler leaves them."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = OptimizerParamScheduler(
        optimizer,
        **code["SCHEDULER"],
        lr_warmup_steps=0,
        lr_decay_steps=100,
        lr_decay_style=style,
        wd_incr_steps=100,
        wd_incr_style="constant",
    )
    scheduler.step(step)
    return list(optimizer.param_groups)


def test_megatron_imports() -> None:
    megatron()


@ALL
def test_megatron_builds_our_groups(kind: str) -> None:
    megatron()
    code = run(export(plan(kind), "megatron", "local"))
    made = megatron_model(TARGETS[kind], code["TRANSFORMER"])
    table = skeleton("megatron", TARGETS[kind], "local")
    same_parameters(made, table)
    folded = fold(plan(kind), "model")
    optimizer = megatron_optimizer(code, made)
    wanted = planned(folded, table)
    groups = scheduled(code, optimizer)
    assert built(made, groups, folded.betas) == wanted
    assert len(groups) == len({*wanted.values()})
    end = built(made, scheduled(code, optimizer, "cosine", 100), folded.betas)
    assert {n: v[0] for n, v in end.items()} == pytest.approx({n: 0.1 * v[0] for n, v in wanted.items()})


@ALL
def test_megatron_draws_our_starts(kind: str) -> None:
    megatron()
    code = run(export(plan(kind), "megatron", "local"))
    made = megatron_model(TARGETS[kind], code["TRANSFORMER"])
    wanted = starts(fold(plan(kind), "model"), skeleton("megatron", TARGETS[kind], "local"))
    with pytest.raises(AssertionError):
        assert_drawn(made, wanted)  # the three init methods alone cannot
    code["init_"](made)
    assert_drawn(made, wanted)


def test_megatron_scales_its_routers() -> None:
    megatron()
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    code = run(export(plan("experts"), "megatron"))["TRANSFORMER"]
    probabilities, _ = topk_routing_with_score_function(
        torch.randn(5, code["num_moe_experts"]),
        code["moe_router_topk"],
        use_pre_softmax=code["moe_router_pre_softmax"],
        scaling_factor=code["moe_router_topk_scaling_factor"],
        score_function=code["moe_router_score_function"],
    )
    assert torch.allclose(probabilities.sum(-1), torch.tensor(3.0))


def test_megatron_finds_its_groups_again() -> None:
    """Groups that differ in eps alone would be mixed up on resuming, were they not numbered."""
    megatron()
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    kind = "dense, then experts"
    text = export(plan(kind), "megatron", "local")

    def eps_after_resume(text: str) -> tuple[list[float], list[float]]:
        code = run(text)
        optimizer = megatron_optimizer(code, megatron_model(TARGETS[kind], code["TRANSFORMER"]))
        saved = [dict(g) for g in optimizer.param_groups]
        loaded = MegatronOptimizer._filter_and_reorder_param_groups(optimizer.param_groups, saved)
        return [g.get("eps", 0.0) for g in optimizer.param_groups], [g.get("eps", 0.0) for g in loaded]

    before, after = eps_after_resume(text)
    assert before == after
    before, after = eps_after_resume(text.replace("is_decoupled_lr=number", "is_decoupled_lr=True"))
    assert before != after


def test_megatron_takes_its_standard_overrides_beside_ours() -> None:
    megatron()
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    code = run(export(plan("dense"), "megatron", "local"))
    made = megatron_model(TARGETS["dense"], code["TRANSFORMER"])
    folded, ours = fold(plan("dense"), "model"), code["config_overrides"]
    code["config_overrides"] = lambda: ours() | get_standard_config_overrides(OptimizerConfig(**code["OPTIMIZER"]))
    groups = scheduled(code, megatron_optimizer(code, made))
    assert built(made, groups, folded.betas) == planned(folded, skeleton("megatron", TARGETS["dense"], "local"))


def test_megatron_sees_what_is_wrong() -> None:
    megatron()
    kind = "experts"
    text = export(plan(kind), "megatron", "local")
    eps = fold(plan(kind), "model").role("expert_down", 0).values.eps
    code = run(text.replace(repr(eps), repr(1.001 * eps)))
    made = megatron_model(TARGETS[kind], code["TRANSFORMER"])
    groups = scheduled(code, megatron_optimizer(code, made))
    table = skeleton("megatron", TARGETS[kind], "local")
    assert built(made, groups, plan(kind).betas) != planned(fold(plan(kind), "model"), table)
    with pytest.raises(ValueError, match="matches 0 rows of this plan"):
        run(export(plan(kind), "megatron", "te"))["init_"](made)


# ---- OLMo-core ---------------------------------------------------------------------------------------------------

MOES = pytest.mark.parametrize(("moe", "name"), [("default", "moe"), ("dropless", "moe_dropless")])


@ALL
@MOES
def test_olmo_builds_our_groups_and_starts(kind: str, moe: str, name: str) -> None:
    made = olmo_model(TARGETS[kind], moe=moe)
    table = skeleton("olmo-core", TARGETS[kind], name)
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
    table = read("olmo-core", target, made)
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
    table = skeleton("olmo-core", target, "moe_fused_v2")
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
    table = read("olmo-core", target, made)
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
    table = skeleton("olmo-core", TARGETS[kind])
    assert built(made, optimizer.param_groups, plan(kind).betas) != planned(fold(plan(kind)), table)
    with pytest.raises(OLMoConfigurationError, match="does not match any parameters"):
        run(text)["optim"]().build(olmo_model(TARGETS["dense"]))
    with pytest.raises(ValueError, match="MoEReorderedNormTransformerBlock, use_pre_norm="):
        run(text)["init_"](olmo_model(TARGETS[kind], post_norm=True))
    with pytest.raises(ValueError, match="'normalize_expert_weights': None"):
        run(text)["init_"](olmo_model(TARGETS[kind], normalize_expert_weights=None))
