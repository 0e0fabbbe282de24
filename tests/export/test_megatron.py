"""The file fed to Megatron-Core: its own model, optimizer builder and scheduler, on a world of one process. Run by `make stacks`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mue
from mue.export import export
from mue.export.megatron import MEGATRON
from mue.fold import fold
from support.stack_models import megatron, megatron_model
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
from support.stood_in_optimizers import polar, stand_in

pytestmark = pytest.mark.stacks


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


def test_transformer_engines_names_are_those_megatron_translates_to() -> None:
    """Its layers cannot be built without a GPU; Megatron's local layers say under which names they keep their norms."""
    megatron()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    translated = get_gpt_layer_local_spec(qk_layernorm=True).submodules.sharded_state_dict_keys_map
    target = TARGETS["dense"]
    names = {name for name, _ in MEGATRON.named(target, "local").named_parameters()}
    for old, new in translated.items():
        names = {re.sub(rf"(?<=\d\.){re.escape(old)}", new, name) for name in names}
    assert names == {name for name, _ in MEGATRON.named(target, "te").named_parameters()}


@ALL
def test_megatron_builds_our_groups(kind: str) -> None:
    megatron()
    code = run(export(plan(kind), "megatron", "local"))
    made = megatron_model(TARGETS[kind], code["TRANSFORMER"])
    table = MEGATRON.named(TARGETS[kind], "local")
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
    wanted = starts(fold(plan(kind), "model"), MEGATRON.named(TARGETS[kind], "local"))
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
    assert built(made, groups, folded.betas) == planned(folded, MEGATRON.named(TARGETS["dense"], "local"))


def test_megatron_sees_what_is_wrong() -> None:
    megatron()
    kind = "experts"
    text = export(plan(kind), "megatron", "local")
    eps = fold(plan(kind), "model").role("expert_down", 0).values.eps
    code = run(text.replace(repr(eps), repr(1.001 * eps)))
    made = megatron_model(TARGETS[kind], code["TRANSFORMER"])
    groups = scheduled(code, megatron_optimizer(code, made))
    table = MEGATRON.named(TARGETS[kind], "local")
    assert built(made, groups, plan(kind).betas) != planned(fold(plan(kind), "model"), table)
    with pytest.raises(ValueError, match="matches 0 rows of this plan"):
        run(export(plan(kind), "megatron", "te"))["init_"](made)


UNGATED = mue.Mixed(
    64,
    (
        mue.Block(layers=1, ffn=96),
        mue.Block(layers=1, experts=4, active=2, expert=32, shared_experts=1, shared=48, router="softmax"),
    ),
    gated=False,
    **SIZES,
)


def muon_plan(**tuned: Any) -> mue.Plan:
    # as many queries to a key as in the target, so that q, k and v keep one rate in any convention
    base = mue.Dense(32, 48, 4, gated=False, **{**SIZES, "kv_heads": 1})
    return mue.transfer(base, UNGATED, MUON.replace(**tuned))


@pytest.mark.parametrize("scale", ["spectral", "keller", "match-rms"])
def test_megatron_moves_matrices_as_planned(scale: str) -> None:
    """Its own chain of Muon and AdamW has the plan's groups, and one step is the plan's, matrix by matrix."""
    stand_in()
    megatron()
    from megatron.core.distributed import DistributedDataParallelConfig

    made_plan = muon_plan(update_scale=scale)
    code = run(export(made_plan, "megatron", "local"))
    made = megatron_model(UNGATED, code["TRANSFORMER"])
    made.ddp_config = DistributedDataParallelConfig()
    chain = on_cpu(lambda: code["muon_optimizer"]([made]))
    folded, table = fold(made_plan, "model"), MEGATRON.named(UNGATED, "local")
    scheduled(code, chain)
    inside = [one.optimizer for one in chain.chained_optimizers]
    muon = [g for o in inside for g in o.param_groups if type(o).__name__ == "TensorParallelMuon"]
    adamw = [g for o in inside for g in o.param_groups if isinstance(o, torch.optim.AdamW)]
    wanted = planned_muon(folded, table, scale)
    assert built_muon(made, muon, adamw) == wanted
    assert not any("router" in name or "embedding" in name for name, values in wanted.items() if len(values) == 2)
    assert all(g["momentum_beta"] == 0.9 for g in muon) and all(tuple(g["betas"]) == folded.betas for g in adamw)
    # one step from rest goes along the gradient: its polar factor by the scale, of q, k and v (groups of heads) each
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    for p in made.parameters():
        p.grad = torch.randn_like(p)
    for one in inside:
        one.step()
    factors = {
        "spectral": lambda o, i: (o / i) ** 0.5,
        "keller": lambda o, i: max(1, o / i) ** 0.5,
        "match-rms": lambda o, i: 0.2 * max(o, i) ** 0.5,
    }
    for name, (lr, wd, *eps) in wanted.items():
        if eps:
            continue
        p = made.get_parameter(name)
        rows = torch.arange(len(p))
        turn = rows % 64  # two heads of queries, one of keys, one of values, of 16 each, for both groups
        parts = [turn < 32, (turn >= 32) & (turn < 48), turn >= 48] if "linear_qkv" in name else [rows >= 0]
        for part in parts:
            out, fan_in = p.grad[part].shape
            step = polar(p.grad[part].double()) * factors[scale](out, fan_in)
            expected = before[name][part].double() * (1 - lr * wd) - lr * step
            assert torch.allclose(p[part].double(), expected, atol=2e-6), name


def test_megatrons_muon_takes_routers_unless_they_are_marked() -> None:
    """The control of the mark in the file; a plan whose routers are Muon's marks none."""
    stand_in()
    megatron()
    text = export(muon_plan(), "megatron", "local")
    code = run(text.replace("parameter.is_embedding_or_output_parameter = True", "pass"))
    made = megatron_model(UNGATED, code["TRANSFORMER"])
    from megatron.core.distributed import DistributedDataParallelConfig

    made.ddp_config = DistributedDataParallelConfig()
    chain = on_cpu(lambda: code["muon_optimizer"]([made]))
    held = {id(p) for g in chain.chained_optimizers[0].optimizer.param_groups for p in g["params"]}
    router = "decoder.layers.1.mlp.router.weight"
    assert id(made.get_parameter(router)) in held
    moves = run(export(muon_plan(muon_moves=("attention", "ffn", "expert", "shared", "router")), "megatron", "local"))[
        "MUON"
    ]
    assert any(re.fullmatch(pattern, router) for pattern in moves)
    assert not any(re.fullmatch(pattern, router) for pattern in run(text)["MUON"])
