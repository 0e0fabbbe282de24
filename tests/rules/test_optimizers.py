"""Rules for other optimizers, derived from AdamW's: what each becomes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.optimizers import for_optimizer
from mue.rules.roles import ROLES
from mue.shapes import OPTIMIZERS
from support import rule_properties as properties
from support.optimizer_plans import DENSE, LONG, RUN, SPARSE, WIDE, at, few
from support.rule_properties import TUNED, Case, plan
from support.sde import SDE

ROUTED = mue.MoE.parse("64e8a", width=512, expert=128, layers=8)


def test_like_adam() -> None:
    """nadamw and lion take AdamW's factors; independent decay is the product; each is marked inferred."""
    for target in (WIDE, SPARSE):
        adamw = at("adamw", target)
        for optimizer in ("nadamw", "lion", "adamw-independent"):
            p = at(optimizer, target)
            for role, planned in p.roles.items():
                if not ROLES[role].trained:
                    continue
                one, two = adamw.roles[role].factor, planned.factor
                assert (one.init_std, one.lr) == (two.init_std, two.lr)
                decay = one.weight_decay * (one.lr if optimizer == "adamw-independent" else 1)  # type: ignore[operator]
                assert ROLES[role].vector or two.weight_decay == pytest.approx(decay)
                assert planned.status == "inferred" and optimizer in planned.source
    runs: dict[str, Any] = {"base_training": RUN, "training": LONG}
    independent = mue.transfer(DENSE, SPARSE, TUNED.replace(optimizer="adamw-independent"), **runs, **SDE)
    s2 = 4 / 9  # constant product is s², by the SDE rule
    assert independent.roles["expert_up"].factor.weight_decay == pytest.approx(s2)
    assert independent.roles["head"].factor.weight_decay == pytest.approx(s2)


def test_sgd_is_the_sgd_of_mup() -> None:
    """2203.03466 Table 8, at fixed depth and H/d: hidden rates constant, vector-like ones × width; lr·wd stays."""
    p = at("sgd", mue.Dense(width=512, ffn=1024, layers=4))
    for role in ("attention_q", "attention_o", "ffn_up", "ffn_down"):
        assert p.roles[role].factor.lr == pytest.approx(1), role
    for role in ("embedding", "head", "norm", "final_norm"):
        assert p.roles[role].factor.lr == pytest.approx(4), role
    for role in ("embedding", "head", "ffn_down"):
        f = p.roles[role].factor
        assert f.lr * f.weight_decay == pytest.approx(1)  # type: ignore[operator]
    with pytest.raises(ValueError, match="under another batch is not derived"):
        mue.transfer(DENSE, DENSE, TUNED.replace(optimizer="sgd"), base_training=RUN, training=LONG)


@pytest.mark.parametrize("optimizer", ["sgd", "adam-l2"])
def test_where_the_gradient_of_an_expert_matters_a_share_is_refused(optimizer: str) -> None:
    with pytest.raises(ValueError, match="an expert's gradient falls with its share"):
        at(optimizer, SPARSE)
    at(optimizer, mue.MoE.parse("4e4a", width=512, expert=128, layers=8))  # every expert sees every token


def test_muon_follows_section_7() -> None:
    """Spectral Muon: no width factor; folded, an expert's down projection needs no a, N or h factor."""
    from mue.fold import fold

    one, two = (fold(at("muon", t)) for t in (ROUTED, mue.MoE.parse("32e2a", width=1024, expert=512, layers=8)))
    for role in ("attention_q", "attention_o", "expert_up", "expert_down"):
        lr = one.roles[role].values.lr
        residual = 0.5 if role in ("attention_o", "expert_down") else 1  # ρ_L^-1, folded
        assert lr == pytest.approx(TUNED.lr * residual) and two.roles[role].values.lr == pytest.approx(lr), role
    assert at("muon", ROUTED).roles["expert_down"].factor.lr == pytest.approx(1 / 8)  # ρ_e/a, ρ_e = 1
    assert one.roles["expert_up"].values.init_std == fold(at("adamw", ROUTED)).roles["expert_up"].values.init_std
    with pytest.raises(ValueError, match="'complete-mue-paper' under 'muon' is not derived"):
        at("muon", rule="complete-mue-paper")


def test_beside_muon_adamw_has_its_own_row_and_rate() -> None:
    adamw = at("adamw", SPARSE)
    tuned = TUNED.replace(optimizer="muon", lr=0.02, adamw_lr=TUNED.lr, weight_decay=0.3, adamw_weight_decay=0.1)
    p = mue.transfer(DENSE, SPARSE, tuned)
    for role, planned in p.roles.items():
        if ROLES[role].hidden and role != "router":
            factor = planned.factor
            assert planned.values.lr == pytest.approx(0.02 * (factor.lr or 0)), role
            assert factor.lr * factor.weight_decay == pytest.approx(1), role  # type: ignore[operator]
        else:
            assert planned.values == adamw.roles[role].values and planned.marks == adamw.roles[role].marks, role
    assert p.scaled(2).roles["router"].values.lr == pytest.approx(2 * (adamw.roles["router"].values.lr or 0))
    moved = mue.transfer(DENSE, ROUTED, tuned.replace(muon_moves=("attention", "ffn", "expert", "router")))
    assert moved.roles["router"].values.lr == 0.02
    with pytest.raises(ValueError, match="moved by AdamW and routed ones by Muon"):
        mue.transfer(DENSE, SPARSE, moved.tuned)


@few
@given(data=st.data())
def test_a_branch_moves_alike_whatever_its_mixture(data: st.DataObject) -> None:
    """Of one token the polar factor is an outer product, so every expert moves the output by its rate times rms(φ), exactly.

    Their sum, with A, R and the gates, is the base's: routed, shared or dense. Rates of 1/(A·R) and 1/A, which are right for
    each kind alone, are the control: beside each other they give 1 + n_s times as much.
    """
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    h, shared = draw(8, 32, 200), draw(4, 64)
    a, n_s = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    target = mue.MoE.parse(
        f"8e{a}a{f'{n_s}s' if n_s else ''}",
        width=draw(64, 256),
        expert=h,
        layers=4,
        **({"shared": shared} if n_s else {}),
    )
    p = mue.transfer(DENSE, target, TUNED.replace(optimizer="muon"))
    A, R = p.output_multiplier, p.route_scale
    assert A is not None and R is not None
    routed, own = (p.roles[role].values.lr or 0.0 for role in ("expert_down", "shared_down"))
    assert A * (R * routed + n_s * own) == pytest.approx(TUNED.lr, rel=1e-12)
    control = A * (R * TUNED.lr / (A * R) + n_s * TUNED.lr / A)
    assert control == pytest.approx((1 + n_s) * TUNED.lr)


def test_batch_and_duration_under_muon() -> None:
    """AdamW's measured exponents are refused; the √ rule and the exponents of 2603.28743 are there."""
    muon = TUNED.replace(optimizer="muon", momentum=0.95)
    runs: dict[str, Any] = {"base_training": RUN, "training": LONG}
    with pytest.raises(
        ValueError, match=r"batch_exponent = 7/20 and .* were measured with AdamW alone: give others.*0\.32"
    ):
        mue.transfer(DENSE, WIDE, muon, **runs)
    sde = mue.transfer(DENSE, WIDE, muon, **runs, **SDE)
    assert sde.roles["ffn_up"].factor.lr == pytest.approx(2 / 3)  # √(ρ_B/ρ_D), steps 4,000 → 9,000
    assert 1 - sde.momentum == pytest.approx(0.05 * 4 / 9)
    own = mue.transfer(DENSE, WIDE, muon, **runs, batch_exponent=0.5, duration_exponent=0.32)
    assert own.roles["ffn_up"].factor.lr == pytest.approx(2**0.5 * 4.5**-0.32) and own.momentum == 0.95


def test_a_momentum_that_cannot_be_carried_is_refused_by_the_plan() -> None:
    """A run of 1/16 of the steps has 16 times 1-μ; β1 of 0.99 goes to 0.84, also as momentum (control)."""
    muon = TUNED.replace(optimizer="muon", betas=(0.99, 0.999))
    runs: dict[str, Any] = {"base_training": RUN, "training": mue.Training(RUN.batch, RUN.steps // 16)}
    with pytest.raises(ValueError, match=r"momentum = 0\.3 cannot be carried"):
        mue.transfer(DENSE, WIDE, muon.replace(momentum=0.3), **runs, **SDE)
    assert mue.transfer(DENSE, WIDE, muon, **runs, **SDE).momentum == pytest.approx(0.84)


def test_relative_updates_take_the_rate_over_the_init() -> None:
    """An effective Adam step is lr·rms(W): η/σ, checked against AdamW's own rows."""
    adamw = at("adamw", SPARSE)
    for optimizer, target in (("lamb", SPARSE), ("adafactor", SPARSE)):
        p = at(optimizer, target)
        for role in ("embedding", "attention_q", "expert_down", "router", "head", "norm"):
            a, b = adamw.roles[role].factor, p.roles[role].factor
            std = 1.0 if role == "norm" else a.init_std
            assert b.lr == pytest.approx(a.lr / std), role  # type: ignore[operator]
            if role != "norm":
                decay = a.weight_decay * (1 if optimizer == "lamb" else std)  # type: ignore[operator]
                assert b.weight_decay == pytest.approx(decay), role
            eps = a.eps if optimizer == "lamb" else a.eps**2  # type: ignore[operator]
            assert b.eps == pytest.approx(eps)
        assert any("relative to the weight" in note for note in p.notes)


REFUSED = [
    ("hyperball", "complete-mue", 'is not derived: use rule = "hyperp"'),
    ("adamw", "hyperp", "'hyperp' is written for hyperball"),
    ("sgd", "mup", "'mup' under 'sgd' is not derived"),
    ("adam-l2", "complete-mue-paper", "not derived"),
    ("muon", "mup", "not derived"),
    ("lamb", "hyperp", "written for hyperball"),
]


@pytest.mark.parametrize(("optimizer", "rule", "message"), REFUSED)
def test_what_is_not_derived_is_refused(optimizer: str, rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        at(optimizer, mue.Dense(width=512, ffn=1024, layers=4), rule=rule)


def test_a_relative_step_from_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="a weight without a known init"):
        for_optimizer(mue.get_rule("mssp-bottleneck"), "lamb")
    with pytest.raises(ValueError, match="'adamW' is not understood; did you mean 'adamw'"):
        for_optimizer(mue.get_rule("standard"), "adamW")


def test_what_a_source_does_not_give_stays_unknown_under_other_optimizers() -> None:
    row = for_optimizer(mue.get_rule("malasnicki"), "adamw-independent").rows["expert_up"]
    assert row.unknown == ("weight_decay", "eps") and row.weight_decay == ONE and row.lr != ONE


def test_independent_decay_is_said_once() -> None:
    habit = mue.Convention(weight_decay="independent")
    with pytest.raises(ValueError, match="has its own form: leave the convention out"):
        mue.transfer(DENSE, WIDE, TUNED.replace(optimizer="adamw-independent"), convention=habit)
    mue.transfer(DENSE, WIDE, TUNED, convention=habit)


@pytest.mark.parametrize("optimizer", [o for o in OPTIMIZERS if o != "hyperball"])
@few
@given(data=st.data())
def test_composition_holds_for_every_optimizer(optimizer: str, data: st.DataObject) -> None:
    """On dense shapes, which every optimizer has an answer for; and identity."""
    shapes = [
        mue.Dense(width=16 * data.draw(st.integers(1, 9)), ffn=data.draw(st.integers(1, 300)), layers=n, head_dim=16)
        for n in data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
    ]
    a, b, c = (Case(shape, RUN) for shape in shapes)
    tuned = TUNED.replace(optimizer=optimizer)
    ab = plan("complete-mue", a, b, tuned)
    properties.same(plan("complete-mue", ab, c), plan("complete-mue", a, c, tuned))
    here = plan("complete-mue", a, a, tuned)
    assert all(f in (1.0, None) for planned in here.roles.values() for _, f in planned.factor.items())


def test_a_fold_and_a_transfer_speak_of_the_same_optimizer() -> None:
    """A weight drawn c times as large and stepped as the fold says is the derivation's own consistency: σ → c·σ, γ → γ/c."""
    d = ratio("ρ_d")
    from mue.fold import FOLDS

    # The derived table as functions of (η, λ, γ, σ), and what a fold does to each of those under Adam: η·c, λ/c, γ/c, σ·c.
    derived: dict[str, tuple[Monomial, Monomial]] = {
        "lion": (d, d**-1),
        "adamw-independent": (d, d * d**-1),
        "adam-l2": (d, d**-1 * d**-1),
        "sgd": (d / d**-1, d**-1 * d**-1),
        "lamb": (d / d, d**-1),
        "adafactor": (d / d, d**-1 * d),
        "muon": (d, d**-1),
    }
    for optimizer, (lr, wd) in derived.items():
        row = FOLDS[optimizer]
        assert lr == d**row.lr and wd == d ** (row.weight_decay or 0), optimizer
