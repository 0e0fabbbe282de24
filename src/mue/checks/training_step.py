"""One training step of the given optimizers, undone afterwards: what it did to every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mue.checks.context import Context
from mue.checks.optimizers import algorithm, state_of
from mue.checks.schedule import peak_rate
from mue.layouts.layout import ParamInfo
from mue.model.apply import groups_of
from mue.rules.roles import ROLES

LOW = (torch.bfloat16, torch.float16)
AGAIN = (
    -0.3
)  # what the gradients of a second step are of the first ones: with the same ones AdamW steps as a sign would


@dataclass
class TensorStep:
    """What one step did to one tensor: weights before, gradient, change (of its master weights, where there are some).

    ``second`` is the change of one step more with :data:`AGAIN` times the gradients, made where the optimizer's class is not known.
    """

    info: ParamInfo
    before: Tensor
    gradient: Tensor | None
    change: Tensor
    second: Tensor | None = None


def stepped(ctx: Context) -> list[Optimizer]:
    """The optimizers that were given, or the planned one where it can be built here."""
    if ctx.optimizers or ctx.plan.tuned.optimizer != "adamw":
        return list(ctx.optimizers)
    if "optimizer" not in ctx.extra:
        ctx.extra["optimizer"] = torch.optim.AdamW(groups_of(ctx.plan, ctx.model))
    return [ctx.extra["optimizer"]]


def training_steps(ctx: Context) -> list[TensorStep]:
    """One step of every optimizer in training mode at peak rates, once for all checks that ask; everything is put back."""
    if "steps" not in ctx.extra:
        ctx.extra["steps"] = _made(ctx, stepped(ctx))
    found: list[TensorStep] = ctx.extra["steps"]
    return found


def _made(ctx: Context, optimizers: Sequence[Optimizer]) -> list[TensorStep]:
    with undone(ctx, optimizers):
        before = {id(p.parameter): p.parameter.detach().clone() for p in ctx.placed}
        zero_start = starts_at_zero(ctx)
        gradients: dict[int, Tensor] = {}
        for _ in range(3 if zero_start else 1):  # behind a matrix of zeros the first gradient is zero
            for p in ctx.placed:
                p.parameter.grad = None
            ctx.loss_of_batch().backward()  # type: ignore[no-untyped-call]
            for p in ctx.placed:
                if p.parameter.grad is not None:
                    gradient, earlier = p.parameter.grad.detach(), gradients.get(id(p.parameter))
                    # of any of the steps: by the last one an expert's tokens may have gone elsewhere
                    gradients[id(p.parameter)] = gradient.clone() if earlier is None else earlier.abs() + gradient.abs()
            for optimizer in optimizers:
                optimizer.step()
        steps = [
            TensorStep(
                p,
                before[id(p.parameter)],
                gradients.get(id(p.parameter)),
                kept_weights(p.parameter, optimizers) - before[id(p.parameter)],
            )
            for p in ctx.placed
            if ROLES[p.role].trained
        ]
        if any(algorithm(o, g) is None for o in optimizers for g in o.param_groups):
            for s in steps:
                s.info.parameter.grad = None if s.gradient is None else AGAIN * s.gradient
            for optimizer in optimizers:
                optimizer.step()
            for s in steps:
                s.second = kept_weights(s.info.parameter, optimizers) - s.before - s.change
        return steps


def starts_at_zero(ctx: Context) -> bool:
    """Whether the plan starts a matrix at zero: the first gradient of what lies before it is then zero."""
    return any(s.values.init_std == 0 for s in ctx.tensor_plans if ROLES[s.info.role].drawn)


def kept_weights(parameter: Tensor, optimizers: Sequence[Optimizer]) -> Tensor:
    """A low-precision parameter as its optimizer keeps it: float32 master weights in its state, or what it compensates.

    A master is known by its numbers: rounded, they are the parameter. Kahan's compensation is what was rounded off, and
    the state that holds it is called so (torchdistx, optimi).
    """
    here = parameter.detach()
    if here.dtype not in LOW:
        return here
    state: dict[Any, Any] = next((state_of(o)[parameter] for o in optimizers if parameter in state_of(o)), {})
    like = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == here.shape}
    for value in like.values():
        if (
            value.dtype in (torch.float32, torch.float64)
            and float((value.to(here.dtype) == here).float().mean()) > 0.99
        ):
            return value
    for key, value in like.items():
        if "comp" in str(key):
            return here.float() + value.float()
    return here


def held_beside(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """What optimizers keep outside of their states, such as float32 masters: tensors in attributes, lists and mappings of theirs."""
    seen: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    found: list[Tensor] = []

    def walk(one: Any, depth: int) -> None:
        if id(one) in seen or depth < 0:
            return
        seen[id(one)] = one
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, Mapping):
            for inside in one.values():
                walk(inside, depth - 1)
        elif isinstance(one, list | tuple):
            for inside in one:
                walk(inside, depth - 1)

    for optimizer in optimizers:
        for inside in (optimizer, *(getattr(optimizer, name, None) for name in ("optimizer", "optim"))):
            for key, value in getattr(inside, "__dict__", {}).items():
                if key != "state":
                    walk(value, 4)
    return found


@contextmanager
def undone(ctx: Context, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Weights, buffers, gradients, modes and optimizer state as they were before; rates at their peak meanwhile."""
    kept = [*ctx.model.parameters(), *ctx.model.buffers(), *held_beside(ctx.model, optimizers)]
    tensors = [(t, t.detach().clone()) for t in kept]
    gradients = [(p, p.grad) for p in ctx.model.parameters()]
    modes = {m: m.training for m in ctx.model.modules()}
    states = [
        {p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for p, s in state_of(o).items()}
        for o in optimizers
    ]
    groups: list[dict[str, Any]] = [g for o in optimizers for g in o.param_groups if g["params"]]
    rates = [g["lr"] for g in groups]
    for g in groups:
        peak = peak_rate(ctx, g)
        g["lr"] = g["lr"].new_tensor(peak) if isinstance(g["lr"], Tensor) else peak
    ctx.model.train()
    try:
        yield
    finally:
        for g, rate in zip(groups, rates, strict=True):
            g["lr"] = rate
        with torch.no_grad():
            for t, value in tensors:
                t.copy_(value)
        for p, gradient in gradients:
            p.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        for o, state in zip(optimizers, states, strict=True):
            if hasattr(o, "state"):
                o.state.clear()
                o.state.update(state)
