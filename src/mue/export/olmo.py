"""A plan as OLMo-core's optimizer config: one OptimGroupOverride for each distinct setting, and an init by name."""

from __future__ import annotations

from mue.export.python import INIT, clipping, commonest, head, matching, table
from mue.export.rows import rows
from mue.export.scale import averaged_shared, query_scale
from mue.export.skeleton import Skeleton
from mue.plan.plan import PlanData
from mue.shapes.block import Block

_CODE = '''

def optim(**more):
    """The optimizer's config; ``more`` are its other fields."""
    merged = {}
    for pattern, lr, weight_decay, eps, *_ in ROWS:
        merged.setdefault((lr, weight_decay, eps), []).append(pattern)
    lr, weight_decay, eps = DEFAULT
    return {CONFIG}(
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        betas=BETAS,
        group_overrides=[
            OptimGroupOverride(params=patterns, opts={"lr": lr, "weight_decay": weight_decay, "eps": eps})
            for (lr, weight_decay, eps), patterns in merged.items()
        ],
        **more,
    )


def check(model):
    """What would break the plan in silence: norms elsewhere in the block, routers whose weights do not sum as planned."""
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("FSDP")
        pre_norm = getattr(module, "use_pre_norm", PRE_NORM)
        if kind.endswith("TransformerBlock") and (kind not in BLOCKS or pre_norm != PRE_NORM):
            raise ValueError(f"{name}: {kind}, use_pre_norm={pre_norm}; planned {BLOCKS}, use_pre_norm={PRE_NORM}")
        if hasattr(module, "normalize_expert_weights") and "shared" not in name:
            found = {key: getattr(module, key, None) or None for key in ROUTERS[0]}
            if found not in ROUTERS:
                raise ValueError(f"{name} has {found}, planned {ROUTERS}")
'''
_KEYS = ("gating_function", "normalize_expert_weights", "restore_weight_scale", "expert_weight_scale")
_USE = """    config.optim = optim()                   # TransformerTrainModuleConfig(optim=..., ...)
    init_(train_module.model)                # after the train module is built, before the first step"""
_USE_V2 = """    config.optim = optim()                   # OLMoDDPTrainModuleConfig(optim=..., ...)
    for part in train_module.model_parts:    # after the train module is built, before the first step
        init_(part)
    train_module.optim._copy_model_params_to_main_params()  # its master copies were made before"""


def olmo_file(plan: PlanData, model: Skeleton) -> str:
    """The file's text.

    Raises:
        ValueError: what OLMo-core has no setting for and cannot be folded.
    """
    v2 = any(row.pattern.startswith("blocks.*.routed_experts.") for row in model.layout())
    query, said = query_scale(plan, model)
    shared, averaged = averaged_shared(plan, model)
    found = rows(plan, model, query | shared)
    roles = {row.role: shared[row.pattern] for row in model.layout() if row.pattern in shared}
    cannot = [
        "init by role (InitMethod knows one std for all inner matrices, cut at three of it): init_ draws every tensor anew",
        *said,
        *averaged,
        "activation checkpointing of chosen modules renames their parameters: OLMo-core then stops at a pattern without match"
        + (" (or, in OLMoDDPOptimizer, only logs it)" if v2 else ""),
        clipping(plan, "max_grad_norm", roles),
    ]
    config = "OLMoDDPOptimizerConfig" if v2 else "AdamWConfig"
    imports = (
        "re",
        "from fnmatch import fnmatchcase",
        "",
        "torch",
        f"from olmo_core.optim import {config}, OptimGroupOverride",
    )
    text = head(plan, f"ai2-olmo-core 3.0, model {model.what}", _USE_V2 if v2 else _USE, cannot, imports)
    text += table(plan, found, lambda row: [("*" if v2 else "") + glob for glob in row.globs])  # behind DDP's "module."
    text += f"DEFAULT = {commonest(found).setting!r}\n{_blocks(model)}{_routers(plan)}"
    init = INIT.replace("torch.manual_seed(seed)", "torch.manual_seed(seed)\n    check(model)")
    return (
        text + matching("fnmatchcase(_name(name), row[0])", every_row=False) + _CODE.replace("{CONFIG}", config) + init
    )


def _blocks(model: Skeleton) -> str:
    last = any(row.after for row in model.layout())
    kinds = (
        ("ReorderedNormTransformerBlock", "MoEReorderedNormTransformerBlock")
        if last
        else ("TransformerBlock", "MoETransformerBlock")
    )
    return f"BLOCKS, PRE_NORM = {(*kinds, 'OLMoDDPTransformerBlock')!r}, {not last}\n"


def _routers(plan: PlanData) -> str:
    routers = [_router(block) for block in plan.target.blocks if block.experts]
    lines = "".join(f"    {router!r},\n" for router in {repr(r): r for r in routers}.values())
    return f"ROUTERS = [  # every router is one of these\n{lines}]\n"


def _router(block: Block) -> dict[str, object]:
    planned = (block.router, 1.0 if block.normalize else None, None, None)
    return {"top_k": block.active, **dict(zip(_KEYS, planned, strict=True))}
