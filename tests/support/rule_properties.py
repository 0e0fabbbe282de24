"""What every transfer rule must satisfy, as plain functions: given a rule's name and numbers, they raise AssertionError.

The property tests call them on random shapes, the negative controls on a rule that was broken on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

import mue
from mue.rules.roles import ROLES
from mue.rules.table import ZERO
from mue.shapes import Transformer
from support.sde import by_sde

CLOSE = 1e-12  # relative: the roundings of some hundred operations in double, and far below any factor's error
FIELDS = ("init_std", "lr", "weight_decay", "eps")
TUNED = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01, betas=(0.9, 0.95), eps=1e-10)


@dataclass(frozen=True)
class Case:
    """A shape and the run it is trained with."""

    shape: Transformer
    training: mue.Training


def plan(rule: str, base: Any, target: Case, tuned: mue.HParams = TUNED, **options: Any) -> mue.Plan:
    """base → target; ``base`` is a :class:`Case` or a plan. A rule for one optimizer gets that optimizer."""
    if mue.get_rule(rule).optimizer not in ("adam", "any"):
        tuned = tuned.replace(optimizer=mue.get_rule(rule).optimizer)
    if isinstance(base, mue.Plan):
        return mue.transfer(base, target.shape, training=target.training, rule=rule, **options)
    return mue.transfer(
        base.shape,
        target.shape,
        tuned,
        base_training=base.training,
        training=target.training,
        rule=rule,
        **options,
    )


def same(one: mue.Plan, other: mue.Plan, tolerance: float = CLOSE, skip: tuple[str, ...] = ()) -> None:
    """Equal values in every role, multiplier and beta, to ``tolerance`` relative (0: bit for bit)."""

    def close(what: str, x: float | None, y: float | None) -> None:
        if x is None or y is None:
            assert x is y, f"{what}: {x} and {y}"
        else:
            assert x == y or abs(x - y) <= tolerance * max(abs(x), abs(y)), f"{what}: {x} and {y}"

    for role in one.roles:
        for field in FIELDS:
            close(
                f"{role}.{field}",
                getattr(one.roles[role].values, field),
                getattr(other.roles[role].values, field),
            )
    for name in ("output_multiplier", "route_scale", "residual_multiplier", "head_multiplier", "attention_scale"):
        if name not in skip:
            close(name, getattr(one, name), getattr(other, name))
    for x, y in zip(one.betas, other.betas, strict=True):
        close("1-beta", 1 - x, 1 - y)


# ---- the properties ------------------------------------------------------------------------------------------------


def identity(rule: str, case: Case) -> None:
    """1: a change of nothing has every factor exactly 1, A = A*; R is the target's own."""
    p = plan(rule, case, case)
    for role, row in p.rule.rows.items():
        for field in FIELDS if ROLES[role].trained else ():
            factor = getattr(p.roles[role].factor, field)
            set_to_zero = getattr(row, field) == ZERO  # drawn at zero, or not decayed: nothing to scale
            assert factor == (0.0 if set_to_zero else 1.0), f"{role}.{field} × {factor}"
    assert p.output_multiplier == case.shape.output_multiplier
    assert p.residual_multiplier == p.head_multiplier == 1
    assert p.betas == TUNED.betas
    block = case.shape.blocks[0]
    assert p.route_scale == (block.active if p.rule.routed and block.experts else 1)
    assert all(v in (None, 1.0) for v in p.drift.values())


def composition(rule: str, a: Case, b: Case, c: Case) -> None:
    """2: A → B → C is A → C, A and R absolute; A → B → A is A."""
    ab = plan(rule, a, b)
    same(plan(rule, ab, c), plan(rule, a, c))
    same(plan(rule, ab, a), plan(rule, a, a))


def capacity(rule: str, base: Case, small: Case, large: Case) -> None:
    """3: N alone changes nothing but the experts' σ0, by √(N'/N)."""
    x, y = plan(rule, base, small), plan(rule, base, large)
    same(x, y, 0.0)
    ratio = large.shape.blocks[0].experts / small.shape.blocks[0].experts
    shift = y.drift["sigma0_experts"] / x.drift["sigma0_experts"]  # type: ignore[operator]
    assert math.isclose(shift, math.sqrt(ratio), rel_tol=1e-12)
    assert x.drift["sigma0_other"] == y.drift["sigma0_other"]


def granularity(rule: str, base: Case, coarse: Case, fine: Case, k: int) -> None:
    """5: (h, a, N) → (h/k, ka, kN) keeps A, every value and σ0, and multiplies R by k."""
    x, y = plan(rule, base, coarse), plan(rule, base, fine)
    same(x, y, skip=("route_scale",))
    assert y.route_scale == k * x.route_scale  # type: ignore[operator]
    assert math.isclose(x.drift["sigma0_experts"], y.drift["sigma0_experts"], rel_tol=1e-12)  # type: ignore[arg-type]


def degenerate(rule: str, base: Case, dense: Case, moe: Case) -> None:
    """6: one expert of width H (or shared experts of width H together) is the dense feed-forward."""
    x, y = plan(rule, base, dense), plan(rule, base, moe)
    kind = "expert" if moe.shape.blocks[0].experts else "shared"
    for part in ("up", "gate", "down"):
        for field in FIELDS:
            one = getattr(x.roles[f"ffn_{part}"].values, field)
            assert math.isclose(one, getattr(y.roles[f"{kind}_{part}"].values, field), rel_tol=CLOSE)
    assert math.isclose(x.output_multiplier, y.output_multiplier, rel_tol=CLOSE)  # type: ignore[arg-type]
    assert x.route_scale == y.route_scale == 1


def sde(rule: str, base: Case, target: Case, *, exponent: float = 0.5) -> None:
    """7: the invariants of batch and duration, and the one thing that moves.

    With another duration exponent than 1/2 the two invariants of the horizon are lost and the other three stay.
    """
    assert base.shape == target.shape
    p = plan(rule, base, target, **by_sde(rule) | ({} if exponent == 0.5 else {"duration_exponent": exponent}))
    B = target.training.batch / base.training.batch
    D = target.training.tokens / base.training.tokens
    T = target.training.steps / base.training.steps
    for role in p.roles:
        if not ROLES[role].trained or role not in p.rule.rows:
            continue
        f = p.roles[role].factor
        lr, wd, eps = f.lr, f.weight_decay, f.eps
        assert lr and wd and eps
        assert math.isclose(lr * eps, 1, rel_tol=CLOSE), f"{role}: η·ε × {lr * eps}"
        decayed = not ROLES[role].vector
        if decayed:
            assert math.isclose(wd / lr, 1, rel_tol=CLOSE), f"{role}: λ/η × {wd / lr}"
        for beta, star in zip(p.betas, TUNED.betas, strict=True):
            assert math.isclose((1 - beta) / (1 - star), lr**2, rel_tol=1e-9)
        horizon = D ** (1 - 2 * exponent)
        assert math.isclose(T * lr**2, horizon, rel_tol=CLOSE), f"{role}: T·η² × {T * lr**2}"
        if decayed:
            assert math.isclose(lr * wd * T, horizon, rel_tol=CLOSE), f"{role}: η·λ·T × {lr * wd * T}"
        assert math.isclose(lr, math.sqrt(B) * D**-exponent, rel_tol=CLOSE)
    assert math.isclose(p.drift["sigma0_other"], D**-0.5, rel_tol=CLOSE)  # type: ignore[arg-type]


def commutes(rule: str, base: Case, target: Case) -> None:
    """8: first the model and then the run, the other way round, or both at once."""
    model_first = plan(rule, plan(rule, base, Case(target.shape, base.training)), target)
    run_first = plan(rule, plan(rule, base, Case(base.shape, target.training)), target)
    same(model_first, run_first)
    same(model_first, plan(rule, base, target))


def constant_product(rule: str, base: Case, target: Case) -> None:
    """11: by the SDE rule lr·wd of every decayed matrix is the base's times s², whatever the width, depth (α = 1), experts."""
    p = plan(rule, base, target, **by_sde(rule))
    s2 = base.training.steps / target.training.steps
    for role in p.rule.rows:
        if not ROLES[role].drawn:
            continue
        v = p.roles[role].values
        assert math.isclose(v.lr * v.weight_decay, TUNED.lr * TUNED.weight_decay * s2, rel_tol=CLOSE), role  # type: ignore[operator]


def init_scale(rule: str, base: Case, target: Case) -> None:
    """Conventions 12: A·σ_down²·d is what it was."""
    p = plan(rule, base, target)
    for part in ("ffn_down", "expert_down", "shared_down"):
        std = p.roles[part].values.init_std
        now = p.output_multiplier * std**2 * target.shape.width  # type: ignore[operator]
        then = base.shape.output_multiplier * TUNED.init_std**2 * base.shape.width
        assert math.isclose(now, then, rel_tol=CLOSE), f"{part}: A·σ²·d {then} → {now}"


# ---- random shapes ---------------------------------------------------------------------------------------------------


@st.composite
def trainings(draw: st.DrawFn) -> mue.Training:
    """Runs whose lengths stay within a factor of 6, so that betas of 0.9 and 0.95 can follow."""
    return mue.Training(batch=draw(st.integers(1, 1 << 22)), steps=draw(st.integers(2_000, 12_000)))


@st.composite
def cases(draw: st.DrawFn, rule: str, count: int) -> list[Case]:
    """``count`` shapes with runs such that the rule can go from any to any: they differ only where it has an answer."""
    the_rule = mue.get_rule(rule)
    fixed = set(the_rule.refuses)
    shared_known = "shared_down" in the_rule.rows
    width0, layers0 = draw(st.integers(1, 16)), draw(st.integers(1, 24))
    share = draw(st.sampled_from([(1, 1), (1, 2), (1, 8), (3, 4)]))
    moe0, per_width, h0 = draw(st.booleans()), draw(st.integers(1, 4)), draw(st.integers(1, 600))
    N0, a0 = share[1] * draw(st.integers(1, 8)), 0
    a0 = N0 * share[0] // share[1]
    training0 = draw(trainings())
    tied = "tied" not in fixed and draw(st.booleans())
    out = []
    for _ in range(count):
        width = 16 * (width0 if "width" in fixed else draw(st.integers(1, 16)))
        common: dict[str, Any] = {
            "width": width,
            "layers": layers0 if "depth" in fixed else draw(st.integers(1, 24)),
            "head_dim": 16,
            "tied": tied,
        }
        moe = "moe" not in fixed and (moe0 if "dense to moe" in fixed else draw(st.booleans()))
        moe = moe or "ffn_down" not in the_rule.rows
        if not moe:
            ffn = per_width * width if "expansion" in fixed else draw(st.integers(1, 2000))
            ffn = h0 if "expert width" in fixed else per_width * width if "granularity" in fixed else ffn
            shape: Transformer = mue.Dense(ffn=ffn, **common)
        else:
            scale = draw(st.integers(1, 8))
            N, a = share[1] * scale, share[0] * scale
            if "experts" in fixed or "active" in fixed:
                N = N0 if "experts" in fixed else draw(st.integers(a0, a0 + 64))
                a = a0 if "active" in fixed else draw(st.integers(1, N))
            elif "sparsity" not in fixed:
                N = draw(st.integers(1, 64))
                a = draw(st.integers(1, N))
            h = draw(st.integers(1, 600))
            h = h0 if "expert width" in fixed else per_width * width if "granularity" in fixed else h
            shared = draw(st.integers(0, 2)) if shared_known else 0
            shape = mue.MoE(
                expert=h,
                experts=N,
                active=a,
                shared_experts=shared,
                shared=draw(st.integers(1, 600)) if shared and draw(st.booleans()) else None,
                **common,
            )
        other = draw(trainings())
        batch = training0.batch if "batch" in fixed else other.batch
        steps = training0.steps if "duration" in fixed else other.steps
        out.append(Case(shape, mue.Training(batch, steps)))
    return out
