"""The file fed to Megatron-Core: its own model, optimizer builder and scheduler, on a world of one process. Run by `make stacks`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mue.export import export
from mue.export.megatron import MEGATRON
from mue.fold import fold
from support.stack_models import megatron, megatron_model
from support.stack_values import ALL, TARGETS, assert_drawn, built, plan, planned, run, same_parameters, starts

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
