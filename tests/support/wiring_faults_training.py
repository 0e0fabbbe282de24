"""Faults of init, optimizer, scheduler, training step and plan."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import mue
from mue.lab.models.language import LanguageModel
from mue.plan.transfer import plan_of
from support.wiring_cases import BASE, OURS, TRAININGS, TUNED, Case
from support.wiring_faults import ALL, HF, MINE, MOE, H, M, Q, S, T, around, fault, regroup, routers, scale

# ---- init ------------------------------------------------------------------------------------------------------------------


@fault("wrong fan-in axis for fused experts", MOE, r"experts\S*down")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("expert_down"):
        p.parameter.mul_((p.fan_in / p.experts / p.fan_out) ** 0.5)


@fault("one expert of N left at default init", MOE, r"experts\S*down\S*\[expert 5\]")
@torch.no_grad()
def _(c: Case) -> None:
    p = c.of("expert_down")[-1]
    p.parameter[5].normal_(std=0.02)


@fault("experts missed by a name pattern", MOE, r"experts\S*(up|gate_up)")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.normal_(std=0.02)


@fault("gate half of the feed-forward at default init", ALL, r"gate")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("ffn_gate", "expert_gate"):
        half = (
            p.parameter
            if not p.layout.parts
            else p.parameter.chunk(2, p.layout.axes.index("out"))[p.layout.parts.index("expert_gate")]
        )
        half.normal_(std=0.02)


@fault("router at default init", MOE, r"router|gate\.weight")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("router"):
        nn.init.kaiming_uniform_(p.parameter, a=5**0.5)


@fault("depth-scaled init on top", ALL, r"(o|o_proj)\.weight")
def _(c: Case) -> None:
    scale(c.of("attention_o"), 0.5)  # 1/√(2L) at two layers, GPT-2's


@fault("all experts from one draw", MOE, r"\[expert 1\]")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.copy_(p.parameter[:1].clone().expand_as(p.parameter))


@fault("every layer from one seed", ALL, r"\.1\.")
@torch.no_grad()
def _(c: Case) -> None:
    many = c.of("attention_o")
    many[1].parameter.copy_(many[0].parameter)


@fault("gains at zero", ALL, r"norm")
@torch.no_grad()
def _(c: Case) -> None:
    for p in c.of("norm"):
        p.parameter.zero_()


@fault("head drawn again after plan.init_", (H, M, Q, S), r"head")
def _(c: Case) -> None:
    (c.model.head if c.ours else c.model.lm_head).reset_parameters()  # type: ignore[operator, union-attr]


@fault("embedding drawn with a width factor", ALL, r"embed")
def _(c: Case) -> None:
    scale(c.of("embedding"), 2**-0.5)  # r^-½: all targets are twice as wide as the base


@fault("down projections drawn without the expansion's root", ALL, r"down")
def _(c: Case) -> None:
    scale(c.of("ffn_down", "expert_down", "shared_down"), 0.73)  # 1/√ρ_e of the hybrid: 64/32 over (4·48 + 48)/64


@fault("unfolded init on a folded plan", HF, r"o_proj|down")
def _(c: Case) -> None:
    plan_of(c.plan.inputs)
    scale(c.of("attention_o"), 2.0)


# ---- groups ----------------------------------------------------------------------------------------------------------------


@fault("router at base lr", MOE, r"(router|gate)\S*: lr")
def _(c: Case) -> None:
    for g in c.apart("router"):
        g["lr"] = g["initial_lr"] = TUNED.lr


@fault("head lr scaled like a hidden matrix", (H, M, Q, S), r"head\S*: lr")
def _(c: Case) -> None:
    for g in c.apart("head"):
        g["lr"], g["initial_lr"] = g["lr"] / 2, g["initial_lr"] / 2


@fault("down lr of the unfolded plan", HF, r"down\S*.*: lr")
def _(c: Case) -> None:
    for g in c.apart("expert_down"):
        g["lr"], g["initial_lr"] = g["lr"] * 2, g["initial_lr"] * 2


@fault("weight decay on norms", ALL, r"norm.*: weight_decay")
def _(c: Case) -> None:
    for g in c.apart("norm", "qk_norm", "final_norm"):
        g["weight_decay"] = 0.1


@fault("no weight decay on stacked experts", MOE, r"experts.*: weight_decay")
def _(c: Case) -> None:
    for g in c.apart("expert_up", "expert_gate", "expert_down"):
        g["weight_decay"] = 0.0


@fault("one weight decay for all widths", ALL, r": weight_decay")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        if g["weight_decay"]:
            g["weight_decay"] = TUNED.weight_decay


@fault("eps unscaled", ALL, r": eps")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        g["eps"] = 1e-8


@fault("betas not rescaled for the duration", ALL, r": betas")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        g["betas"] = TUNED.betas


@fault("Adam for AdamW", ALL, r"torch\.optim\.Adam")
def _(c: Case) -> None:
    groups = [{k: v for k, v in g.items() if k != "decoupled_weight_decay"} for g in c.optimizer.param_groups]
    c.optimizer = torch.optim.Adam(groups)
    c.scheduler = None


@fault("stacked experts filtered out of the optimizer", MOE, r"experts")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        g["params"] = [p for p in g["params"] if p.dim() < 3]


@fault("one parameter in two groups", ALL, r"(o|o_proj)\.weight")
def _(c: Case) -> None:
    p = c.of("attention_o")[0]
    c.optimizer.param_groups.append({**c.group(p), "params": [p.parameter]})


@fault("optimizer of an older copy of the model", ALL, r"embed|blocks|layers")
def _(c: Case) -> None:
    c.model = copy.deepcopy(c.model)
    if c.clip is not None:
        c.clip = None


@fault("optimizer of a stale plan", ALL, r": (lr|weight_decay|eps)")
def _(c: Case) -> None:
    groups = c.plan.retuned(lr=TUNED.lr * 2).param_groups(c.model)
    regroup(c, groups)


@fault("default groups: one lr for everything", ALL, r": lr")
def _(c: Case) -> None:
    regroup(c, [{"params": list(c.model.parameters())}], lr=TUNED.lr, weight_decay=TUNED.weight_decay)


# ---- scheduler ---------------------------------------------------------------------------------------------------------------


@fault("scheduler that writes absolute lr", ALL, r"step")
def _(c: Case) -> None:
    def write(step: int) -> None:
        for g in c.optimizer.param_groups:
            g["lr"] = TUNED.lr * min(1.0, (step + 1) / 10)

    c.scheduler = write


@fault("OneCycleLR with one peak", ALL, r"OneCycleLR")
def _(c: Case) -> None:
    c.scheduler = torch.optim.lr_scheduler.OneCycleLR(
        c.optimizer, max_lr=TUNED.lr, total_steps=50, cycle_momentum=False
    )


@fault("scheduler that cycles momentum", ALL, r"OneCycleLR")
def _(c: Case) -> None:
    peaks = [g["initial_lr"] for g in c.optimizer.param_groups]
    c.scheduler = torch.optim.lr_scheduler.OneCycleLR(c.optimizer, max_lr=peaks, total_steps=50)


@fault("cosine floor as an absolute lr", ALL, r"CosineAnnealingLR")
def _(c: Case) -> None:
    for g in c.optimizer.param_groups:
        g["lr"] = g["initial_lr"]
    c.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(c.optimizer, T_max=50, eta_min=1e-4)


@fault("warmup on some groups only", ALL, r"LambdaLR")
def _(c: Case) -> None:
    lambdas = [
        (lambda step: 1.0) if i else (lambda step: min(1.0, (step + 1) / 10))
        for i in range(len(c.optimizer.param_groups))
    ]
    c.scheduler = torch.optim.lr_scheduler.LambdaLR(c.optimizer, lambdas)


# ---- training ----------------------------------------------------------------------------------------------------------------


@fault("frozen experts", MOE, r"experts")
def _(c: Case) -> None:
    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.requires_grad_(False)


@fault("experts computed from detached weights", MOE, r"experts")
def _(c: Case) -> None:
    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.register_hook(torch.zeros_like)


@fault("one expert of N never trained", MOE, r"experts\S*\[expert 0\]")
def _(c: Case) -> None:
    def hook(g: Tensor) -> Tensor:
        g = g.clone()
        g[0] = 0
        return g

    for p in c.of("expert_up", "expert_gate", "expert_down"):
        p.parameter.register_hook(hook)


@fault("router under no_grad", MOE, r"router|gate\.weight")
def _(c: Case) -> None:
    for r in routers(c):

        def forward(old: Any, x: Tensor) -> Any:
            with torch.no_grad():
                return old(x)

        around(r, forward)


@fault("bf16 parameters that never move", ALL, r"norm")
def _(c: Case) -> None:
    # A step of Adam is about lr: 2.5e-4 is less than half of bf16's spacing below 1 (2^-8), so that gains stay at 1.
    c.plan = c.plan.retuned(lr=TUNED.lr / 16)
    c.low()
    c.checkpoint = None
    regroup(c, c.plan.param_groups(c.model))


@fault("queries detached", ALL, r"(q|q_norm|q_proj|q_b_proj|q_a_proj)\.weight|q_a_layernorm")
def _(c: Case) -> None:
    for p in c.of("attention_q"):
        around(c.module(p), lambda old, *a: old(*a).detach())


@fault("router reads the stream before its norm", (H,), r"moe|router")
def _(c: Case) -> None:
    for b in c.model.blocks:  # type: ignore[union-attr]
        seen: list[Tensor] = []
        around(b.ffn_norm, lambda old, x, seen=seen: (seen.clear(), seen.append(x), old(x))[2])
        around(b.moe.router, lambda old, x, seen=seen: old(seen[0].reshape(x.shape)))  # type: ignore[union-attr]


@fault("loss summed over tokens instead of averaged", MINE, r"loss|clip")
def _(c: Case) -> None:
    def change(old: Any, *args: Any) -> Any:
        out = old(*args)
        if out.loss is not None:
            out.loss = out.loss * args[0].numel()
        return out

    around(c.model, change)


@fault("parameter stepped twice", ALL, r"embed|head|blocks|layers")
def _(c: Case) -> None:
    old = c.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        old()
        old()

    c.optimizer.step = step  # type: ignore[method-assign]


@fault("weight decay applied by hand as well", ALL, r"embed|head|blocks|layers")
def _(c: Case) -> None:
    old = c.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for p in c.model.parameters():
                p.mul_(1 - 1e-2)
        old()

    c.optimizer.step = step  # type: ignore[method-assign]


# ---- plan, tied, clipping, checkpoint --------------------------------------------------------------------------------------


@fault("tied head untied by a copy", (T,), r"head|tied")
def _(c: Case) -> None:
    c.model.head.weight = nn.Parameter(c.model.embedding.weight.detach().clone())  # type: ignore[union-attr]


@fault("head tied where the plan has it apart", (H, M, Q, S), r"head|tied|model is not")
def _(c: Case) -> None:
    if c.ours:
        c.model.head.weight = c.model.embedding.weight  # type: ignore[union-attr]
    else:
        c.model.lm_head.weight = c.model.model.embed_tokens.weight  # type: ignore[union-attr]


@fault("head starts as a copy of the embedding", (H, M, Q, S), r"head")
@torch.no_grad()
def _(c: Case) -> None:
    head, embedding = c.of("head")[0], c.of("embedding")[0]
    head.parameter.copy_(embedding.parameter)


@fault("stale plan: another granularity", ALL, r"down|up|gate|experts")
def _(c: Case) -> None:
    _replan(c, granular=True)


@fault("stale plan: another number of layers", ALL, r"layers|blocks")
def _(c: Case) -> None:
    _replan(c, granular=False)


def _replan(c: Case, granular: bool) -> None:
    """The plan of another target than the model; the optimizer stays."""
    target: Any = c.plan.target
    changed = []
    for b in target.blocks:
        if granular:
            changed.append(replace(b, ffn=b.ffn * 2) if b.ffn else replace(b, expert=b.expert * 2))
        else:
            changed.append(b)
    inputs = c.plan.inputs
    kinds = changed if granular else changed[:1]
    other = (
        mue.Mixed(
            width=target.width,
            blocks=tuple(kinds) if granular else (replace(kinds[0], layers=1),),
            head_dim=target.head_dim,
            heads=target.heads,
            kv_heads=target.kv_heads,
            sequence=target.sequence,
            vocab=target.vocab,
            tied=target.tied,
        )
        if hasattr(mue, "Mixed")
        else target
    )
    plan = mue.transfer(inputs.base, other, inputs.tuned, base_training=inputs.base_training, training=inputs.training)
    if c.plan.folding is not None:
        from mue.fold import fold

        plan = fold(plan, c.plan.folding.route)
    c.plan = plan
    c.checkpoint = {"plan": plan.hash}
    c.clip = None


@fault("stale plan: multipliers of another one", MINE, r"multiplier")
def _(c: Case) -> None:
    other = mue.transfer(BASE, mue.Dense(width=64, ffn=128, layers=2, head_dim=16), TUNED, **TRAININGS)  # type: ignore[arg-type]
    plan, target = c.plan, OURS[c.family]
    model = LanguageModel(target, replace(other.multipliers, residual=1.0))
    model.load_state_dict(c.model.state_dict())
    c.model = model
    c.plan = plan
    c.optimizer = torch.optim.AdamW(
        [{**g, "params": []} for g in c.optimizer.param_groups if False] or list(model.parameters())
    )
    c.scheduler = None


@fault("a parameter nobody planned", MINE, r"extra")
def _(c: Case) -> None:
    c.model.extra = nn.Parameter(torch.zeros(3))  # type: ignore[assignment]


@fault("checkpoint of another plan", ALL, r"checkpoint")
def _(c: Case) -> None:
    c.checkpoint = {"plan": c.plan.scaled(2.0).hash}


@fault("checkpoint without a plan", ALL, r"checkpoint")
def _(c: Case) -> None:
    c.checkpoint = {"step": 3}


@fault("folded gradients clipped by their plain norm", HF, r"clip")
def _(c: Case) -> None:
    c.clip = lambda: nn.utils.clip_grad_norm_(c.model.parameters(), 1.0)


@fault("clipped per tensor", HF, r"weight|proj")
def _(c: Case) -> None:
    def clip() -> None:
        for p in c.model.parameters():
            if p.grad is not None:
                nn.utils.clip_grad_norm_([p], 1.0)

    c.clip = clip


@fault("another clip threshold than the plan's", HF, r"clip")
def _(c: Case) -> None:
    from mue.fold import clip_grad_norm_, coefficients

    c.clip = lambda: clip_grad_norm_(c.model.parameters(), 0.25, coefficients=coefficients(c.plan, c.model))
