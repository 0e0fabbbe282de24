"""What docs/why/index.md claims of a rule, on random shapes, each with a rule that breaks it on purpose."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mue
from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.roles import ROLES
from mue.rules.table import Row, Rule
from support import rule_properties as properties
from support.rule_properties import Case, cases, plan, trainings
from support.sde import SDE

OURS = ["complete-mue", "complete-mue-paper"]
BASELINES = ["hidden-ratio-only", "standard"]
quick = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
RUN = mue.Training(batch=1 << 16, steps=4_000)
LONG = mue.Training(batch=1 << 17, steps=9_000)
DENSE = Case(mue.Dense(width=128, ffn=256, layers=4), RUN)
WIDE = Case(mue.MoE.parse("64e8a1s", width=512, expert=128, layers=8), LONG)
OTHER = Case(mue.MoE.parse("16e2a", width=256, expert=512, layers=6), mue.Training(batch=1 << 15, steps=8_000))


# ---- every rule that claims the axes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(mue.RULES))
@quick
@given(data=st.data())
def test_identity(rule: str, data: st.DataObject) -> None:
    properties.identity(rule, data.draw(cases(rule, 1))[0])


@pytest.mark.parametrize("rule", list(mue.RULES))
@quick
@given(data=st.data())
def test_composition_and_inverse(rule: str, data: st.DataObject) -> None:
    properties.composition(rule, *data.draw(cases(rule, 3)))


@pytest.mark.parametrize("rule", list(mue.RULES))
@quick
@given(data=st.data())
def test_model_and_run_commute(rule: str, data: st.DataObject) -> None:
    properties.commutes(rule, *data.draw(cases(rule, 2)))


# ---- experts ---------------------------------------------------------------------------------------------------------


def moe(width: int, layers: int, training: mue.Training, **numbers: Any) -> Case:
    return Case(mue.MoE(width=16 * width, layers=layers, head_dim=16, **numbers), training)


sizes = {
    "width": st.integers(1, 12),
    "layers": st.integers(1, 12),
    "h": st.integers(1, 300),
    "a": st.integers(1, 8),
    "training": trainings(),
}


@pytest.mark.parametrize("rule", [*OURS, "malasnicki", "hidden-ratio-only", "standard"])
@quick
@given(**sizes, N=st.integers(8, 64), more=st.integers(1, 9))
def test_capacity(
    rule: str, width: int, layers: int, h: int, a: int, training: mue.Training, N: int, more: int
) -> None:
    small, large = (moe(width, layers, training, expert=h, experts=n, active=a) for n in (N, N * more))
    properties.capacity(rule, DENSE if rule in OURS else small, small, large)


@pytest.mark.parametrize("rule", OURS)
@quick
@given(**sizes, k=st.integers(2, 6), N=st.integers(8, 32))
def test_granularity(
    rule: str, width: int, layers: int, h: int, a: int, training: mue.Training, k: int, N: int
) -> None:
    coarse = moe(width, layers, training, expert=h * k, experts=N, active=a)
    fine = moe(width, layers, training, expert=h, experts=N * k, active=a * k)
    properties.granularity(rule, DENSE, coarse, fine, k)


@pytest.mark.parametrize("rule", [*OURS, *BASELINES])
@quick
@given(**sizes, N=st.integers(8, 32))
def test_two_bridges(rule: str, width: int, layers: int, h: int, a: int, training: mue.Training, N: int) -> None:
    """4: dense → every expert active → sparse is dense → sparse; widening N and sparsifying again cancels."""
    full = moe(width, layers, training, expert=h, experts=N, active=N)
    sparse = moe(width, layers, training, expert=h, experts=N, active=a)
    direct = plan(rule, DENSE, sparse)
    properties.same(plan(rule, plan(rule, DENSE, full), sparse), direct)
    wider = moe(width, layers, training, expert=h, experts=3 * N, active=3 * N)
    back = moe(width, layers, training, expert=h, experts=3 * N, active=a)
    properties.same(plan(rule, plan(rule, plan(rule, DENSE, full), wider), back), direct)
    if a < N and rule in OURS:  # control: without the second bridge the multiplier is another one
        with pytest.raises(AssertionError):
            properties.same(plan(rule, DENSE, full), direct)


@pytest.mark.parametrize("rule", [*OURS, *BASELINES])
@quick
@given(**sizes, n_s=st.integers(1, 4))
def test_degenerate_moe_is_dense(
    rule: str, width: int, layers: int, h: int, a: int, training: mue.Training, n_s: int
) -> None:
    dense = Case(mue.Dense(width=16 * width, ffn=h * n_s, layers=layers, head_dim=16), training)
    properties.degenerate(rule, DENSE, dense, moe(width, layers, training, expert=h * n_s, experts=1, active=1))
    properties.degenerate(rule, DENSE, dense, moe(width, layers, training, expert=h, shared_experts=n_s))


@pytest.mark.parametrize("rule", OURS)
@quick
@given(**sizes, n_s=st.integers(1, 4), groups=st.integers(2, 4))
def test_shared_width_and_groups(
    rule: str, width: int, layers: int, h: int, a: int, training: mue.Training, n_s: int, groups: int
) -> None:
    """n_s shared experts of width h_s are one of n_s·h_s, and groups change nothing at all."""
    numbers: dict[str, Any] = {"expert": h, "experts": 8 * groups, "active": a * groups}
    many = moe(width, layers, training, **numbers, shared_experts=n_s, shared=h)
    one = moe(width, layers, training, **numbers, shared_experts=1, shared=h * n_s)
    properties.same(plan(rule, DENSE, many), plan(rule, DENSE, one), 0.0)
    grouped = moe(width, layers, training, **numbers, groups=groups)
    properties.same(plan(rule, DENSE, grouped), plan(rule, DENSE, moe(width, layers, training, **numbers)), 0.0)


@pytest.mark.parametrize("rule", OURS)
@quick
@given(data=st.data(), scale=st.integers(2, 4))
def test_how_width_is_counted_cancels(rule: str, data: st.DataObject, scale: int) -> None:
    """Counting gate and up both, in base and target, changes nothing (here: every width times a constant)."""
    base, target = data.draw(cases(rule, 2))
    properties.same(plan(rule, counted(base, scale), counted(target, scale)), plan(rule, base, target))
    with pytest.raises(AssertionError):  # in one of the two only, it does
        properties.same(plan(rule, counted(base, scale), target), plan(rule, base, target))


def counted(case: Case, scale: int) -> Case:
    shape = case.shape
    if isinstance(shape, mue.Dense):
        return Case(replace(shape, ffn=shape.ffn * scale), case.training)
    assert isinstance(shape, mue.MoE)
    wide = None if shape.shared is None else shape.shared * scale
    return Case(replace(shape, expert=shape.expert * scale, shared=wide), case.training)


@pytest.mark.parametrize("rule", OURS)
@quick
@given(data=st.data(), star=st.floats(0.05, 20))
def test_init_scale_is_constant(rule: str, data: st.DataObject, star: float) -> None:
    base, target = data.draw(cases(rule, 2))
    properties.init_scale(rule, base, target)
    properties.init_scale(rule, Case(replace(base.shape, output_multiplier=star), base.training), target)


# ---- batch, duration, weight decay -----------------------------------------------------------------------------------

TIMED = ["complete-mue", "complete-mue-paper", "complete-d-p"]


@pytest.mark.parametrize("rule", TIMED)
@quick
@given(data=st.data(), training=trainings())
def test_batch_and_duration(rule: str, data: st.DataObject, training: mue.Training) -> None:
    base = data.draw(cases(rule, 1))[0]
    properties.sde(rule, base, Case(base.shape, training))


@pytest.mark.parametrize(
    ("batch", "steps", "lr", "one_minus_beta", "sigma"),
    [
        (4, Fraction(1, 4), 2.0, 4.0, 1.0),  # the same tokens in larger batches: exact
        (4, 1, 1.0, 1.0, 0.5),  # the same steps
        (1, 4, 0.5, 0.25, 0.5),  # the same batch for longer
    ],
)
@pytest.mark.parametrize("rule", OURS)
def test_the_three_scenarios(
    rule: str, batch: int, steps: Fraction, lr: float, one_minus_beta: float, sigma: float
) -> None:
    training = mue.Training(RUN.batch * batch, int(RUN.steps * steps))
    p = plan(rule, DENSE, Case(DENSE.shape, training), **SDE)
    up = p.roles["ffn_up"].factor
    assert (up.lr, up.weight_decay, up.eps, up.init_std) == pytest.approx((lr, lr, 1 / lr, 1), rel=1e-12)
    assert 1 - p.betas[0] == pytest.approx(0.1 * one_minus_beta, rel=1e-12)
    assert p.drift["sigma0_other"] == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize(
    ("batch", "steps", "lr", "sigma"),
    [(4, Fraction(1, 4), 4**0.35, 1.0), (4, 1, 4**0.35, 0.5), (1, 4, 1.0, 0.5)],
)
def test_the_three_scenarios_by_what_was_measured(batch: int, steps: Fraction, lr: float, sigma: float) -> None:
    """The recommended rule's defaults: rates × ρ_B^0.35 whatever the tokens, eps against it, weight decay and betas as tuned."""
    p = plan("complete-mue", DENSE, Case(DENSE.shape, mue.Training(RUN.batch * batch, int(RUN.steps * steps))))
    for role in (r for r in ROLES if ROLES[r].trained and r in p.rule.rows):
        f = p.roles[role].factor
        assert (f.lr, f.weight_decay, f.eps, f.init_std) == pytest.approx((lr, 1, 1 / lr, 1), rel=1e-12), role
    assert p.betas == properties.TUNED.betas
    assert p.drift["sigma0_other"] == pytest.approx(sigma, rel=1e-12)
    published = plan("complete-mue-paper", DENSE, Case(DENSE.shape, mue.Training(RUN.batch, RUN.steps * 4)))
    assert published.roles["head"].factor.lr == 0.5 and published.betas != p.betas  # the authors' table is as it was


PRODUCT = [
    "complete-mue",
    "complete-d-p",
    "completep",
    "mup",
    "u-mup",
    "jiang",
    "mssp-fixed-experts",
    "mssp-bottleneck",
    "mssp-all-scaling",
]


@pytest.mark.parametrize("rule", PRODUCT)
@quick
@given(data=st.data())
def test_constant_product(rule: str, data: st.DataObject) -> None:
    properties.constant_product(rule, *data.draw(cases(rule, 2)))


def test_the_published_table_has_no_constant_product() -> None:
    """The documented difference: there lr·wd of a hidden matrix falls with the width."""
    v = plan("complete-mue-paper", DENSE, Case(WIDE.shape, RUN)).roles["expert_up"].values
    assert v.lr * v.weight_decay == pytest.approx(1e-3 * 0.1 / 4)  # type: ignore[operator]


# ---- what a rule does not preserve, with an example ------------------------------------------------------------------

MOE = Case(mue.MoE.parse("16e4a", width=128, expert=64, layers=4), RUN)
FINE = Case(mue.MoE.parse("32e8a", width=128, expert=32, layers=4), RUN)
LARGE = Case(mue.MoE.parse("32e4a", width=128, expert=64, layers=4), RUN)
WIDER = Case(mue.Dense(width=256, ffn=512, layers=4), RUN)
LONGER = Case(DENSE.shape, LONG)
CLAIMS: dict[str, list[str]] = {
    "capacity": [*OURS, "malasnicki", "hidden-ratio-only", "standard"],
    "granularity": OURS,
    "sde": TIMED,
    "constant product": [*PRODUCT, "standard"],
}
# (property, rule) → an example on which it fails, and the reason. Rules that refuse the change need none.
COUNTEREXAMPLES: dict[tuple[str, str], tuple[Callable[[str], None], str]] = {
    ("granularity", "jiang"): (
        lambda r: properties.granularity(r, MOE, MOE, FINE, 2),
        "std and rate of the down projection go as 1/h, and R stays 1: the folded form of what Complete-muE does with R",
    ),
    ("granularity", "mssp-all-scaling"): (
        lambda r: properties.granularity(r, MOE, MOE, FINE, 2),
        "its tables know M and N_e apart",
    ),
    ("granularity", "hidden-ratio-only"): (
        lambda r: properties.granularity(r, MOE, MOE, FINE, 2),
        "no route scale: the mean over more, smaller experts shrinks by 1/k",
    ),
    ("granularity", "standard"): (
        lambda r: properties.granularity(r, MOE, MOE, FINE, 2),
        "no route scale: the mean over more, smaller experts shrinks by 1/k",
    ),
    ("sde", "hidden-ratio-only"): (lambda r: properties.sde(r, DENSE, LONGER), "it has no batch and no duration"),
    ("sde", "standard"): (lambda r: properties.sde(r, DENSE, LONGER), "it has no batch and no duration"),
    ("sde", "hyperp"): (lambda r: properties.sde(r, DENSE, LONGER), "measured exponents, weight decay 0"),
    ("constant product", "complete-mue-paper"): (
        lambda r: properties.constant_product(r, DENSE, WIDE),
        "weight decay is left out of the width rule",
    ),
    ("constant product", "hidden-ratio-only"): (
        lambda r: properties.constant_product(r, DENSE, WIDER),
        "weight decay is not compensated, though wd_mult exists",
    ),
    ("constant product", "malasnicki"): (
        lambda r: properties.constant_product(r, DENSE, WIDER),
        "no weight decay is given, so it stays as tuned",
    ),
    ("constant product", "hyperp"): (lambda r: properties.constant_product(r, DENSE, LONGER), "weight decay is 0"),
}
REFUSED_AXIS: dict[str, set[str]] = {
    "capacity": {"sparsity", "experts", "moe"},
    "granularity": {"granularity", "moe", "experts", "active", "sparsity", "expert width"},
    "sde": {"batch"},
    "constant product": set(),
}


@pytest.mark.parametrize("prop", list(CLAIMS))
@pytest.mark.parametrize("rule", list(mue.RULES))
def test_every_rule_claims_refuses_or_fails_with_an_example(rule: str, prop: str) -> None:
    example = COUNTEREXAMPLES.get((prop, rule))
    if example is not None:
        assert rule not in CLAIMS[prop]
        with pytest.raises(AssertionError):
            example[0](rule)
        return
    refuses = mue.get_rule(rule).refuses
    if rule not in CLAIMS[prop]:
        assert REFUSED_AXIS[prop] & set(refuses), f"{rule}: {prop} is neither claimed nor refused"


PAIRS: dict[str, list[tuple[Case, Case]]] = {
    "width": [(DENSE, WIDER)],
    "depth": [(c, Case(replace(c.shape, layers=9), RUN)) for c in (DENSE, MOE)],
    "expansion": [(DENSE, Case(mue.Dense(width=128, ffn=512, layers=4), RUN))],
    "moe": [(DENSE, MOE)],
    "dense to moe": [(DENSE, MOE)],
    "experts": [(MOE, LARGE)],
    "active": [(MOE, Case(mue.MoE.parse("16e8a", width=128, expert=64, layers=4), RUN))],
    "sparsity": [(MOE, LARGE)],
    "expert width": [(MOE, Case(mue.MoE.parse("16e4a", width=128, expert=32, layers=4), RUN))],
    "granularity": [(MOE, Case(mue.MoE.parse("16e4a", width=128, expert=32, layers=4), RUN))],
    "gates": [(MOE, Case(replace(MOE.shape, gates="measured", gate_moments=(0.9, 0.5)), RUN))],
    "batch": [(c, Case(c.shape, mue.Training(RUN.batch * 2, RUN.steps))) for c in (DENSE, MOE)],
    "duration": [(c, Case(c.shape, mue.Training(RUN.batch, RUN.steps * 2))) for c in (DENSE, MOE)],
    "tied": [(c, Case(replace(c.shape, tied=True), RUN)) for c in (DENSE, MOE)],
}
REFUSALS = [(rule, axis) for rule in mue.RULES for axis in mue.get_rule(rule).refuses]


@pytest.mark.parametrize(("rule", "axis"), REFUSALS)
def test_an_axis_without_an_answer_is_refused_with_its_reason(rule: str, axis: str) -> None:
    dense = "ffn_down" in mue.get_rule(rule).rows
    base, target = next(
        pair for pair in PAIRS[axis] if dense or axis == "dense to moe" or pair[0].shape.blocks[0].is_moe
    )
    if dense or axis != "dense to moe":
        plan(rule, base, base)
    with pytest.raises(ValueError, match=re.escape(mue.get_rule(rule).refuses[axis])) as error:
        plan(rule, base, target)
    assert f"rule '{rule}' cannot plan" in str(error.value)


@pytest.mark.parametrize("rule", ["malasnicki", "jiang", "mssp-bottleneck"])
def test_a_role_without_a_row_is_refused(rule: str) -> None:
    shared = Case(mue.MoE.parse("16e4a1s", width=128, expert=64, layers=4), RUN)
    with pytest.raises(ValueError, match="says nothing about shared up"):
        plan(rule, MOE, shared)


def test_cells_the_source_does_not_give_are_marked_and_left_alone() -> None:
    p = plan("malasnicki", MOE, Case(mue.MoE.parse("16e4a", width=256, expert=128, layers=4), RUN))
    up = p.roles["expert_up"]
    assert up.formula["weight_decay"] == up.formula["eps"] == "?" and up.factor.weight_decay == 1
    assert any("gives no weight decay for" in note and "expert_up" in note for note in p.notes)
    tables = [str(q).split("\n\n")[1] for q in (p, plan("complete-mue", DENSE, WIDE))]
    assert "?" in tables[0] and "?" not in tables[1]


@pytest.mark.parametrize("rule", OURS)
@quick
@given(steps=st.integers(1, 200), batch=st.integers(1, 1 << 20))
def test_beta_domain(rule: str, steps: int, batch: int) -> None:
    """9: too few steps for β2 is refused by name, whatever the batch; one step more than it says needed works."""
    target = Case(DENSE.shape, mue.Training(batch, steps))
    tuned = properties.TUNED.replace(betas=(0.99, 0.95))
    if 0.05 * RUN.steps / steps < 1:
        plan(rule, DENSE, target, tuned, **SDE)
        return
    with pytest.raises(ValueError, match=r"beta2 = 0\.95 .*at least 201 steps"):
        plan(rule, DENSE, target, tuned, **SDE)
    plan(rule, DENSE, Case(DENSE.shape, mue.Training(batch, 201)), tuned, **SDE)


# ---- controls: a rule broken on purpose must fail the property that forbids it ----------------------------------------

N, d, e, L, s2 = (ratio(f"ρ_{x}") for x in ("N", "d", "e", "L", "D"))


def broken(change: Callable[[Rule], Rule]) -> Callable[..., Rule]:
    return lambda: change(mue.get_rule("complete-mue", **SDE))


def rows(rule: Rule, factor: Monomial, field: str, roles: tuple[str, ...] = ()) -> Rule:
    new: dict[str, Row] = dict(rule.rows)
    for role in roles or rule.rows:
        new[role] = replace(new[role], **{field: getattr(new[role], field) * factor})
    return replace(rule, rows=new)


DOWN = ("ffn_down", "expert_down", "shared_down")
CONTROLS: dict[str, tuple[Callable[[Rule], Rule], Callable[[str], None]]] = {
    "a factor that is not 1 at the base": (
        lambda r: rows(r, 2 * ONE, "lr"),
        lambda r: properties.identity(r, DENSE),
    ),
    "an output multiplier that forgets the base's": (
        lambda r: replace(r, output_multiplier=e**-1 * Fraction(1, 2)),
        lambda r: properties.composition(r, DENSE, OTHER, WIDE),
    ),
    "a rate that knows N": (
        lambda r: rows(r, N ** "1/4", "lr", DOWN),
        lambda r: properties.capacity(r, OTHER, WIDE, Case(replace(WIDE.shape, experts=128), WIDE.training)),
    ),
    "an init keyed on one expert's width": (
        lambda r: rows(r, ratio("ρ_H") ** "-1/2", "init_std", DOWN),
        lambda r: properties.granularity(
            r, DENSE, OTHER, Case(mue.MoE.parse("32e4a", width=256, expert=256, layers=6), OTHER.training), 2
        ),
    ),
    "no route scale": (
        lambda r: replace(r, routed=False),
        lambda r: properties.granularity(
            r, DENSE, OTHER, Case(mue.MoE.parse("32e4a", width=256, expert=256, layers=6), OTHER.training), 2
        ),
    ),
    "experts with a rate of their own": (
        lambda r: rows(r, e ** "1/2", "lr", ("expert_down",)),
        lambda r: properties.degenerate(
            r,
            DENSE,
            Case(mue.Dense(width=256, ffn=2048, layers=6), RUN),
            Case(mue.MoE.parse("1e1a", width=256, expert=2048, layers=6), RUN),
        ),
    ),
    "decay without the batch": (
        lambda r: rows(r, (ratio("ρ_B") / ratio("ρ_D")) ** "-1/2", "weight_decay"),
        lambda r: properties.sde(r, DENSE, Case(DENSE.shape, LONG)),
    ),
    "eps without the batch": (
        lambda r: rows(r, (ratio("ρ_B") / ratio("ρ_D")) ** "1/2", "eps"),
        lambda r: properties.sde(r, DENSE, Case(DENSE.shape, LONG)),
    ),
    "betas without the batch": (
        lambda r: replace(r, one_minus_beta=ONE),
        lambda r: properties.sde(r, DENSE, Case(DENSE.shape, LONG)),
    ),
    "decay without the width": (
        lambda r: rows(r, d**-1, "weight_decay"),
        lambda r: properties.constant_product(r, DENSE, WIDE),
    ),
    "no √e on the down init": (
        lambda r: rows(r, e ** "-1/2", "init_std", DOWN),
        lambda r: properties.init_scale(r, DENSE, WIDE),
    ),
    "no output multiplier": (
        lambda r: replace(r, output_multiplier=ONE),
        lambda r: properties.init_scale(r, DENSE, WIDE),
    ),
}


@pytest.mark.parametrize("name", list(CONTROLS))
def test_control(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, check = CONTROLS[name]
    check("complete-mue")  # the example itself is one that a right rule passes
    monkeypatch.setitem(mue.RULES._entries, "broken", (0.0, broken(change)))
    with pytest.raises(AssertionError):
        check("broken")


def test_control_of_commutation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that forgot its run would not commute: planning without the trainings is another plan."""
    with pytest.raises(AssertionError):
        properties.same(mue.transfer(DENSE.shape, WIDE.shape, properties.TUNED), plan("complete-mue", DENSE, WIDE))
    assert math.isclose(plan("complete-mue", DENSE, WIDE, **SDE).roles["head"].factor.lr or 0, (4 / 9) ** 0.5)
