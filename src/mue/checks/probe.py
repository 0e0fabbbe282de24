"""What the given optimizers do along designed gradients, whatever class they are: three short runs on the real parameters, undone.

The first run has gradients of zero: what moves then is weight decay, or copies of the weights that are not the model's. The second
makes two steps along gradients of :mod:`mue.checks.designed`. Nothing is read from a class, a group or a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mue.checks.context import Context
from mue.checks.designed import NORM, Design, design
from mue.checks.report import FAIL, SKIP, Finding
from mue.checks.schedule import peak_rate
from mue.checks.training_step import LOW, kept_weights, undone
from mue.layouts.layout import ParamInfo
from mue.rules.optimizers import BOTH
from mue.rules.roles import ROLES
from mue.shapes.update_scales import UPDATE_SCALES

SCALES = {one.torch: one.factor for one in UPDATE_SCALES.values()}
Gradients = Callable[["Probe"], Tensor]
Look = Callable[[Context, list["Probe"]], Iterator[Finding]]


@dataclass
class Probe:
    """One tensor, what is planned for it, and how it moved.

    Attributes:
        info: the parameter. group: its planned optimizer group. design: its gradients; None for a vector.
        lr, decay: the rate, and what a step is to take off a weight, as its own group says at the peak. Whether that is planned is
            another check's (groups); the planned ones where its optimizer shows no group with it.
        weight: norm of the weights. still: norm of the first change under gradients of zero, freed of what shrinks the weights;
            ``again``: of the second. shrunk: part of the weights that the first one took off.
        rms: size of an element's planned step. core, core2: (E, P, R, R), two steps in the design's directions, weight decay
            taken out, as multiples of the rate. vector: of a vector, cosine between its first step and its gradient.
        exact: its weights, or the masters that its optimizer keeps of them, hold a step; those of few bits round it.
        adamw: cosine between the first step and AdamW's. moved: norm of that step.
    """

    info: ParamInfo
    group: dict[str, Any]
    design: Design | None
    lr: float
    decay: float
    weight: float = 0.0
    still: float = 0.0
    again: float = 0.0
    shrunk: float = 0.0
    rms: float = 0.0
    core: Tensor | None = None
    core2: Tensor | None = None
    vector: float = 0.0
    exact: bool = True
    adamw: float = 0.0
    moved: float = 0.0

    @property
    def planned(self) -> str:
        """``"muon"`` or ``"adamw"``."""
        return str(self.group.get("algorithm", "adamw"))

    @property
    def copied(self) -> bool:
        """Whether the first step put other numbers in the weights' place, and the second found them there.

        Nothing but decay moves a weight without a gradient. A step of momentum that was left in a state, or an iteration that
        makes something of zero, does so in the second step as well.
        """
        size = self.rms * math.sqrt(self.info.parameter.numel())
        return self.still > 0.5 * size and self.again < 0.1 * self.still

    @property
    def unsteady(self) -> bool:
        """Whether it moves without a gradient, step by step: what decays it cannot be told."""
        return self.still > 0.05 * self.rms * math.sqrt(self.info.parameter.numel()) and not self.copied

    @property
    def scales(self) -> list[float]:
        """By fused part: what the planned convention multiplies an orthogonal step by."""
        assert self.design is not None
        factor = SCALES[self.group["adjust_lr_fn"]]
        return [factor(rows, self.design.right.shape[0]) for rows in self.design.how[2]]


def probes(ctx: Context) -> list[Probe] | str:
    """Every trained tensor's moves, once for all checks that ask; or why there are none."""
    if "probes" not in ctx.extra:
        ctx.extra["probes"] = _why_not(ctx) or _made(ctx)
    found: list[Probe] | str = ctx.extra["probes"]
    return found


def probed(name: str) -> Callable[[Look], Callable[[Context], Iterator[Finding]]]:
    """A decorator that gives a check the probes, and its findings what is the same of all such checks.

    It is left out with the reason where there are no probes; what is no failure says how many tensors it did not look at.
    """

    def around(look: Look) -> Callable[[Context], Iterator[Finding]]:
        @wraps(look)
        def run(ctx: Context) -> Iterator[Finding]:
            found = probes(ctx)
            if isinstance(found, str):
                yield Finding(name, SKIP, measured=found)
                return
            rounded = ctx.extra["rounded"]
            more = f"; {rounded} in low precision not looked at" if rounded else ""
            for one in look(ctx, found):
                yield one if one.status == FAIL else replace(one, measured=one.measured + more)

        return run

    return around


def _why_not(ctx: Context) -> str:
    if not ctx.optimizers:
        return "no optimizer was given"
    if ctx.plan.tuned.optimizer not in BOTH:
        return f"not known for {ctx.plan.tuned.optimizer}"
    if any(hasattr(p.parameter, "placements") for p in ctx.placed):
        return "sharded parameters: check the model before it is sharded"
    return ""


def _made(ctx: Context) -> list[Probe] | str:
    trained = [p for p in ctx.placed if ROLES[p.role].trained and p.parameter.requires_grad]
    total = sum(p.parameter.numel() for p in trained)
    held = {id(q): g for o in ctx.optimizers for g in o.param_groups for q in g["params"]}
    every = [_planned(ctx, p, held.get(id(p.parameter)), total) for p in trained]
    _still(ctx, every)
    # A factorisation makes a step of nothing, too; AdamW does not. Of a vector of ones momentum may look as decay does.
    beside = [one for one in every if one.planned == "adamw" and one.design is not None]
    if sum(one.unsteady for one in beside) > len(beside) / 2:
        return "it moves without a gradient: by a state that it has already, or a decay that joins the gradient"
    found = [one for one in every if one.exact]
    ctx.extra["rounded"] = len(every) - len(found)
    if not found:
        return "weights in low precision alone: a step of known size is rounded in them"
    _designed(ctx, found, total)
    return found


def _planned(ctx: Context, p: ParamInfo, held: dict[str, Any] | None, total: int) -> Probe:
    """A probe that has not been stepped."""
    group = ctx.expected[id(p.parameter)]
    lr = float(group["lr"]) if held is None else peak_rate(ctx, held)
    decay = group["weight_decay"] if held is None else held.get("weight_decay", group["weight_decay"])
    one = Probe(p, group, design(ctx.plan, p, total), lr, lr * float(decay), rms=lr)
    if one.planned == "muon" and one.design is not None:  # an orthogonal O×I matrix has elements of 1/√max(O, I)
        fan_in, sizes = one.design.right.shape[0], zip(one.scales, one.design.how[2], strict=True)
        one.rms = lr * max(scale / math.sqrt(max(rows, fan_in)) for scale, rows in sizes)
    return one


def _still(ctx: Context, every: Sequence[Probe]) -> None:
    """Two steps with gradients of zero."""
    with undone(ctx, ctx.optimizers):
        start = [one.info.parameter.detach().clone() for one in every]
        first = stepped_once(ctx, every, lambda one: torch.zeros_like(one.info.parameter))
        for one, w, now in zip(every, start, first, strict=True):
            change, square = _wide(now) - _wide(w), _square(w)
            one.weight = math.sqrt(square)
            p = one.info.parameter
            one.exact = p.dtype not in LOW or kept_weights(p, ctx.optimizers).data_ptr() != p.data_ptr()
            one.shrunk = -float((change * w).sum()) / square if square else 0.0
            one.still = float((change + one.shrunk * w).norm())
        second = stepped_once(ctx, every, lambda one: torch.zeros_like(one.info.parameter))
        for one, w, now in zip(every, first, second, strict=True):
            change, square = _wide(now) - _wide(w), _square(w)
            shrunk = -float((change * w).sum()) / square if square else 0.0
            one.again = float((change + shrunk * w).norm())
            if not math.isfinite(one.still + one.again):  # it divides by the norm of a gradient
                one.still = one.again = math.inf
            if one.copied:
                one.shrunk = shrunk
            if one.unsteady:
                one.shrunk = one.decay


def _designed(ctx: Context, every: Sequence[Probe], total: int) -> None:
    """Two steps along the designed gradients."""

    def first(one: Probe) -> Tensor:
        return one.design.gradient(one.design.first, one.info.parameter) if one.design else _vector(one, total)

    def averaged(one: Probe) -> Tensor:
        assert one.design is not None
        return one.design.gradient(one.design.second(float(one.group["momentum"])), one.info.parameter)

    muon = [one for one in every if one.planned == "muon" and one.design is not None]
    rest = {id(one): one for one in every if one.planned == "adamw" or one.design is None}
    left = sum(_square(first(one)) for one in every) - sum(_square(averaged(one)) for one in muon)
    # Both gradients of one norm: a clip in the optimizer's step takes the same off both, and their average is what it was.
    factor = -math.sqrt(max(left, 0.0) / max(sum(_square(first(one)) for one in rest.values()), 1e-30))

    def second(one: Probe) -> Tensor:
        return factor * first(one) if id(one) in rest else averaged(one)

    with undone(ctx, ctx.optimizers):
        start = [one.info.parameter.detach().clone() for one in every]
        now = stepped_once(ctx, every, first)
        for one, w, after in zip(every, start, now, strict=True):
            _first(one, w, after, first(one))
        then = stepped_once(ctx, every, second)
        for one, w, after in zip(every, now, then, strict=True):
            if one.design is not None:
                one.core2 = _core(one, _wide(w), _wide(after))


def _first(one: Probe, w: Tensor, after: Tensor, gradient: Tensor) -> None:
    step = _wide(after) - _wide(w) * (1 - one.shrunk)
    one.moved = float(step.norm())
    g = _wide(gradient)
    eps = one.group["eps"]
    adamw = -g / (g.abs() + (eps if isinstance(eps, float) else eps[0]))
    one.adamw = float((step * adamw).sum()) / max(one.moved * float(adamw.norm()), 1e-30)
    if one.design is None:
        one.vector = -float((step * g).sum()) / max(one.moved * float(g.norm()), 1e-30)
    else:
        one.core = _core(one, _wide(w), _wide(after))


def _core(one: Probe, before: Tensor, after: Tensor) -> Tensor:
    assert one.design is not None
    return -one.design.core_EPRR(after - before * (1 - one.shrunk)) / one.lr


def stepped_once(ctx: Context, every: Sequence[Probe], gradient: Gradients) -> list[Tensor]:
    """The weights after one step of all optimizers along given gradients."""
    for p in ctx.model.parameters():
        p.grad = None
    for one in every:
        one.info.parameter.grad = gradient(one)
    for optimizer in ctx.optimizers:
        optimizer.step()
    return [kept_weights(one.info.parameter, ctx.optimizers).detach().clone() for one in every]


def resized(ctx: Context, name: str) -> tuple[float, float]:
    """Whether something behind the orthogonal update decides how long a step is: two more runs, for a tensor by its name.

    Returns:
        The length of its first direction where every matrix has that direction alone, in units of the planned step; and its length
        at half the rates, against half of that at the full ones.
    """
    found = probes(ctx)
    assert not isinstance(found, str)
    one = next(p for p in found if p.info.name == name)

    def only_first(p: Probe) -> Tensor:
        if p.design is None:
            return torch.zeros_like(p.info.parameter)
        levels = p.design.first.clone()
        levels[..., 1:] = 0
        return p.design.gradient(levels, p.info.parameter)

    lengths = []
    for rate in (1.0, 0.5):
        with undone(ctx, ctx.optimizers):
            for group in (g for o in ctx.optimizers for g in o.param_groups if g["params"]):
                group["lr"] *= rate
            before = _wide(one.info.parameter.detach().clone())
            after = stepped_once(ctx, found, only_first)[found.index(one)]
            core = _core(one, before * (1 - rate * one.shrunk) / (1 - one.shrunk), _wide(after))
            assert one.design is not None
            lengths.append(float(core[0, 0, 0, 0] * one.design.first[0, 0, 0].sign()) / one.scales[0])
    return lengths[0], 2 * lengths[1] / lengths[0]


def _vector(one: Probe, total: int) -> Tensor:
    p = one.info.parameter
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    # none near zero, where AdamW's eps would count
    return (NORM / math.sqrt(total) * (noise + noise.sign())).to(p.device, p.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _square(x: Tensor) -> float:
    return float((_wide(x) ** 2).sum())
