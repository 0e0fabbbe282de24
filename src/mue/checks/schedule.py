"""A schedule walked through its whole run: which rates it gives at every step, and what else it touches. Then it is put back.

What makes a schedule right is one thing only: at every step all rates are the same multiple of their planned peaks, and the highest
multiple is 1. How a scheduler says so (a factor on ``initial_lr``, a list of peaks, a start from which it rises) does not matter.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mue.checks.context import Context

STEPS = 2000  # where neither scheduler nor plan says how long it is
# A step of torch's schedulers takes 10 to 23 µs with ten groups, so that the longest walk is two seconds.
LONGEST = 100_000
# As torch's schedulers (cosine, OneCycle, polynomial) and the functions of transformers call their length.
_LENGTH = ("T_max", "total_steps", "total_iters")
_KEYWORD = "num_training_steps"
_INSIDE = ("scheduler", "schedulers", "_schedulers")  # what wraps others: accelerate; torchtitan; torch's sequences
# Of the peak: at less nothing is trained, and ReduceLROnPlateau stops where its next step would be below an absolute epsilon.
NOTHING = 1e-5
FIXED = ("betas", "weight_decay", "eps", "momentum")


@dataclass(frozen=True)
class Offence:
    """The first step at which a schedule did what it must not: ``groups`` had another ``key`` than the rest, or than before."""

    step: int
    key: str
    groups: list[dict[str, Any]]
    before: Any
    after: Any


@dataclass
class Walk:
    """What was seen of a schedule.

    Attributes:
        factors: what the rates were of their planned peaks, step by step (the middle one, where they differ).
        peaks: id of a group → its highest rate.
        begun: it was not at its first step, so that its peak may lie behind it.
        length: of the run, as the scheduler states it; None where it does not.
        offence: where the walk ended because something was wrong. error: what the user's scheduler raised, if it did.
        idle: it is a function that returns something and sets no rate.
        elsewhere: it moves the rates of another optimizer, and none of these.
    """

    factors: list[float] = field(default_factory=list)
    peaks: dict[int, float] = field(default_factory=dict)
    begun: bool = False
    length: int | None = None
    offence: Offence | None = None
    error: Exception | None = None
    idle: bool = False
    elsewhere: bool = False

    @property
    def clean(self) -> bool:
        """Whether the whole run was seen, and all rates kept their ratios in it."""
        return (
            self.offence is None
            and not self.idle
            and not self.elsewhere
            and bool(self.factors)
            and (self.error is None or self.ended)
        )

    @property
    def ended(self) -> bool:
        """Whether it cannot be stepped on because its length is reached (OneCycleLR), which is no slip in its call."""
        return isinstance(self.error, ValueError) and len(self.factors) > 1


def planned_peak(ctx: Context, group: dict[str, Any]) -> float:
    """The planned peak of a group: that of its first parameter, or, where that is no parameter of the plan, what it has."""
    held = ctx.expected.get(id(group["params"][0]))
    return float(held["lr"] if held is not None else group["lr"])


def stated_peak(group: dict[str, Any]) -> float:
    """The highest rate that a group itself tells of: OneCycleLR's ``max_lr``, then what other schedulers multiply, then its rate."""
    return float(next(group[key] for key in ("max_lr", "initial_lr", "lr") if key in group))


def peak_rate(ctx: Context, group: dict[str, Any]) -> float:
    """The highest rate with which a group will be stepped: what it states, or what its scheduler was seen to make of it."""
    seen = walk(ctx)
    if seen is None or not seen.clean:
        return stated_peak(group)
    return max(stated_peak(group), seen.peaks.get(id(group), 0.0))


def walk(ctx: Context) -> Walk | None:
    """The given scheduler's whole run, once for all checks that ask; None where there is no scheduler or no optimizer."""
    if ctx.scheduler is None or not ctx.optimizers:
        return None
    if "walk" not in ctx.extra:
        ctx.extra["walk"] = _walked(ctx)
    found: Walk = ctx.extra["walk"]
    return found


def _walked(ctx: Context) -> Walk:
    groups = [g for o in ctx.optimizers for g in o.param_groups if g["params"]]
    seen = Walk(begun=any((getattr(s, "last_epoch", 0) or 0) > 0 for s in leaves(ctx.scheduler)))
    seen.length = _length(ctx.scheduler)
    planned = ctx.plan.training.steps if ctx.plan.training else STEPS
    with _put_back(ctx.scheduler, groups), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _steps(ctx, groups, min(max(planned, seen.length or 0), LONGEST), seen)
        except Exception as error:  # the scheduler is the user's: what it raises is a finding
            seen.error = error
    seen.elsewhere = len(set(seen.factors)) == 1 and _of_another(ctx.scheduler, groups)
    return seen


def _steps(ctx: Context, groups: list[dict[str, Any]], steps: int, seen: Walk) -> None:
    peaks = [planned_peak(ctx, g) for g in groups]
    fixed = [{k: g.get(k) for k in FIXED} for g in groups]
    step_once, sets = _stepper(ctx.scheduler)
    returned = None
    for step in range(steps):
        if sets:  # a function of the step sets the rates of that step; a scheduler has set them before
            returned = step_once(step)
        rates = [float(g["lr"]) for g in groups]
        factors = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
        middle = sorted(factors)[len(factors) // 2]
        seen.factors.append(middle)
        for group, rate in zip(groups, rates, strict=True):
            seen.peaks[id(group)] = max(rate, seen.peaks.get(id(group), 0.0))
        # against the middle one, so that a single wrong group is named and not all the others
        if max(factors) - min(factors) > max(1e-5 * abs(middle), NOTHING):
            off = [g for g, f in zip(groups, factors, strict=True) if abs(f - middle) > 1e-5 * max(abs(f), abs(middle))]
            seen.offence = Offence(step, "lr", off, middle, factors) if off else None
        for group, before in zip(groups, fixed, strict=True):
            key = next((k for k, v in before.items() if group.get(k) != v), None)
            if key is not None and seen.offence is None:
                seen.offence = Offence(step, key, [group], before[key], group.get(key))
        if seen.offence is not None:
            return
        if not sets and step + 1 < steps:
            step_once(step)
    seen.idle = sets and returned is not None and len(set(seen.factors)) == 1


def _of_another(scheduler: Any, groups: Sequence[dict[str, Any]]) -> bool:
    """Whether the optimizer that a scheduler holds has none of these groups."""
    held = [getattr(s, "optimizer", None) for s in leaves(scheduler)]
    theirs = [id(g) for o in held for g in getattr(o, "param_groups", ())]
    return bool(theirs) and not {id(g) for g in groups} & set(theirs)


def _stepper(given: Any) -> tuple[Callable[[int], Any], bool]:
    """What makes the next step, and whether it is a function of the step, as hand-written loops have."""
    if isinstance(given, list | tuple):
        each = [_stepper(one) for one in given]
        return lambda step: [make(step) for make, _ in each][-1], any(sets for _, sets in each)
    if not hasattr(given, "step"):
        return given, True
    if feeds_on_loss(given):
        return lambda step: given.step(1.0), False  # a metric that never improves: it reduces as often as it can
    if hasattr(given, "step_update"):  # timm's count steps and epochs themselves, and only one of the two acts
        return lambda step: (given.step(step + 1), given.step_update(step + 1)), False
    if _asks_for_step(given.step):
        return lambda step: given.step(step + 1), False
    return lambda step: given.step(), False


def _asks_for_step(step: Callable[..., Any]) -> bool:
    """Whether ``step`` cannot be called without the number of the step."""
    try:
        inspect.signature(step).bind()
    except TypeError:
        return True
    except ValueError:  # some built-in functions tell nobody what they take
        return False
    return False


def writes_peaks(scheduler: Any) -> bool:
    """Whether a scheduler has rates of its own (OneCycleLR, CyclicLR), so that those of the groups it found do not count."""
    return any(hasattr(s, "max_lrs") or hasattr(s, "_schedule_phases") for s in leaves(scheduler))


def feeds_on_loss(scheduler: Any) -> bool:
    """Whether the schedule follows the loss, so that nobody knows it before."""
    return any(type(s).__name__ == "ReduceLROnPlateau" for s in leaves(scheduler))


def leaves(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those that it wraps or has in a sequence."""
    if isinstance(scheduler, list | tuple):
        for one in scheduler:
            yield from leaves(one)
        return
    yield scheduler
    for name in _INSIDE:
        inside = vars(scheduler).get(name) if hasattr(scheduler, "__dict__") else None
        if inside is not None:
            yield from leaves(inside)


def _length(scheduler: Any) -> int | None:
    """How many steps a scheduler says its run has; None where it says nothing."""
    if isinstance(scheduler, list | tuple):
        return max((n for one in scheduler if (n := _length(one)) is not None), default=None)
    inside = [vars(scheduler)[name] for name in _INSIDE if name in getattr(scheduler, "__dict__", {})]
    milestones = getattr(scheduler, "_milestones", None)
    if milestones and inside:  # one after another: the last one's own steps come after the last milestone
        last = _length(inside[0][-1])
        return None if last is None else int(milestones[-1]) + last
    own: list[Any] = [getattr(scheduler, name, None) for name in _LENGTH]
    own += [getattr(f, "keywords", {}).get(_KEYWORD) for f in getattr(scheduler, "lr_lambdas", ())]
    own += [_length(one) for one in inside]
    return max((int(n) for n in own if isinstance(n, int) and n > 0), default=None)


@contextmanager
def _put_back(scheduler: Any, groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Groups and schedulers as they were, also tensors that an optimizer holds on to (capturable ones)."""
    saved = [{k: copy.deepcopy(v) for k, v in g.items() if k not in ("params", "lr")} for g in groups]
    rates = [(g["lr"], g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"]) for g in groups]
    # each on its own, for a container's state may be less than theirs (torchtitan's is the number of the step)
    every = list(leaves(scheduler))
    states = [_state(s) for s in every]
    try:
        yield
    finally:
        for group, before, (rate, value) in zip(groups, saved, rates, strict=True):
            for key in group.keys() - before.keys() - {"params", "lr"}:
                del group[key]
            if isinstance(rate, Tensor):
                rate.copy_(value)
            group.update(before, lr=rate)
        for one, state in zip(every, states, strict=True):
            if _has_state(one):
                one.load_state_dict(state)
            else:
                getattr(one, "__dict__", {}).update(state)


def _has_state(scheduler: Any) -> bool:
    return hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")


def _state(scheduler: Any) -> dict[str, Any]:
    """What a scheduler remembers of its steps: as it says, or, of a class that says nothing, the numbers in it."""
    if _has_state(scheduler):
        return copy.deepcopy(scheduler.state_dict())
    kept = {
        k: v for k, v in getattr(scheduler, "__dict__", {}).items() if isinstance(v, int | float | str | list | None)
    }
    # a list may be of the optimizer's groups, which are put back on their own
    return {k: list(v) if isinstance(v, list) else v for k, v in kept.items()}
