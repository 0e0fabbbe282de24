"""Rules against something that is not this package: PyPI's mup, printed tables, and relations derived on paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mue
from mue.fold import fold
from mue.rules.roles import of_kind
from support.fold_model import Decoder, tokens
from support.sde import SDE

TUNED = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02, eps=1e-9)
few = settings(max_examples=15, deadline=None)


# ---- mup, the package ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "ffn"), [(24, 48), (16, 96), (40, 24)])
def test_mup_is_the_package_mup(width: int, ffn: int) -> None:
    """A real model built both ways: MuAdamW's lr and weight decay, the drawn weights, and the logits, to 1e-12."""
    from mup import MuAdamW, MuReadout, set_base_shapes
    from mup import init as mup_init

    sizes: dict[str, Any] = {"layers": 2, "head_dim": 4, "vocab": 11, "sequence": 8}
    base, target = mue.Dense(width=8, ffn=16, **sizes), mue.Dense(width=width, ffn=ffn, **sizes)
    plan = mue.transfer(base, target, TUNED, rule="mup")

    def theirs(shape: mue.Dense) -> Decoder:
        model = Decoder(shape, mue.Multipliers())
        model.head = MuReadout(shape.width, shape.vocab, bias=False)
        return model

    delta = mue.Dense(width=12, ffn=20, **sizes)
    model = theirs(target)
    set_base_shapes(model, theirs(base), delta=theirs(delta))
    model.double()
    ours = Decoder(target, plan.multipliers).double()
    for one, two in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        assert one[0] == two[0]
        if one[1].dim() < 2:
            two[1].data.copy_(one[1].data)
            continue
        role = next(row.role for row in ours.layout() if row.regex.fullmatch(one[0]))
        torch.manual_seed(7)
        mup_init.normal_(one[1], std=TUNED.init_std)
        torch.manual_seed(7)
        with torch.no_grad():
            two[1].normal_(0, plan.roles[role].values.init_std or 0)
        torch.testing.assert_close(one[1], two[1], rtol=1e-12, atol=0)

    names = {p: n for n, p in model.named_parameters()}
    groups = MuAdamW(model.parameters(), lr=TUNED.lr, weight_decay=TUNED.weight_decay, eps=TUNED.eps).param_groups
    expected = {names[p]: g for g in groups for p in g["params"]}
    mine = {p: n for n, p in ours.named_parameters()}
    checked = 0
    for group in plan.param_groups(ours):
        for p in group["params"]:
            g = expected[mine[p]]
            assert group["lr"] == pytest.approx(g["lr"], rel=1e-12), mine[p]
            assert group["eps"] == g["eps"]
            if p.dim() == 2:  # mup decays gains and biases as well; here neither is decayed
                assert group["weight_decay"] == pytest.approx(g["weight_decay"], rel=1e-12), mine[p]
                checked += 1
    assert checked == 2 + 2 * 7
    torch.testing.assert_close(model(tokens()), ours(tokens()), rtol=1e-12, atol=1e-15)
    assert plan.roles["attention_q"].factor.lr != 1 and plan.head_multiplier != 1  # the change of width is a change


# ---- printed tables, written down a second time ----------------------------------------------------------------------

Cells = tuple[float | None, float, float | None, float]  # init std, lr, weight decay (None: not decayed), eps


@few
@given(m_N=st.integers(1, 16), m_L=st.integers(1, 12), alpha=st.sampled_from([0.5, 0.75, 1.0]))
def test_completep_is_its_printed_table(m_N: int, m_L: int, alpha: float) -> None:
    """2505.01618 Table 1 with N_base = 256 and L_base = 2."""
    base, target = mue.Dense(width=256, ffn=1024, layers=2), mue.Dense(width=256 * m_N, ffn=1024 * m_N, layers=2 * m_L)
    p = mue.transfer(base, target, TUNED, rule="completep", depth_exponent=alpha)
    hidden: Cells = (m_N**-0.5, m_N**-1 * m_L ** (alpha - 1), m_N, m_N**-1 * m_L**-alpha)
    gain: Cells = (None, m_L ** (alpha - 1), None, m_N**-1 * m_L**-alpha)
    flat: Cells = (1, 1, 1, 1)
    table = {role: hidden for role in p.rule.rows if role in of_kind("attention", "ffn")}
    table |= {"embedding": flat, "head": flat, "final_norm": (None, 1, None, 1)}
    table |= dict.fromkeys(("norm", "qk_norm", "bias"), gain)
    same_cells(p, table)
    assert set(table) == set(p.rule.rows)
    assert p.residual_multiplier == pytest.approx(m_L**-alpha) and p.head_multiplier == pytest.approx(1 / m_N)


def same_cells(p: mue.Plan, table: dict[str, Cells]) -> None:
    """The plan's factors are these."""
    for role, (std, lr, wd, eps) in table.items():
        f = p.roles[role].factor
        if std is not None:
            assert f.init_std == pytest.approx(std, rel=1e-12), role
        assert f.lr == pytest.approx(lr, rel=1e-12), role
        if wd is not None:
            assert f.weight_decay == pytest.approx(wd, rel=1e-12), role
        assert f.eps == pytest.approx(eps, rel=1e-12), role


@few
@given(m_N=st.integers(1, 16), m_L=st.integers(1, 12), alpha=st.sampled_from([0.5, 1.0]), longer=st.integers(1, 9))
def test_complete_d_p_is_its_table(m_N: int, m_L: int, alpha: float, longer: int) -> None:
    base, target = mue.Dense(width=128, ffn=512, layers=2), mue.Dense(width=128 * m_N, ffn=512 * m_N, layers=2 * m_L)
    runs: dict[str, Any] = {
        "base_training": mue.Training(1 << 16, 4000),
        "training": mue.Training(1 << 18, 1000 * longer + 400),
    }
    p = mue.transfer(base, target, TUNED, rule="complete-d-p", depth_exponent=alpha, **runs)
    s = (4000 / (1000 * longer + 400)) ** 0.5
    hidden: Cells = (m_N**-0.5, m_N**-1 * m_L ** (alpha - 1) * s, m_N * s, m_N**-1 * m_L**-alpha / s)
    table: dict[str, Cells] = {role: hidden for role in p.rule.rows if role in of_kind("attention", "ffn")}
    table["embedding"] = (1, s, s, 1 / m_N / s)
    table["norm"] = table["bias"] = (None, m_L ** (alpha - 1) * s, None, m_N**-1 * m_L**-alpha / s)
    table["qk_norm"] = (None, m_L ** (alpha - 1) * s, None, m_L**-alpha / s)
    table["final_norm"] = (None, s, None, 1 / s)
    table["head"] = (1 / m_N, s / m_N, m_N * s, 1 / s)
    same_cells(p, table)
    assert set(table) == set(p.rule.rows) and p.head_multiplier == 1
    assert 1 - p.betas[0] == pytest.approx(0.1 * s**2)


def moe(width: int, expert: int, experts: int, active: int, layers: int = 4) -> mue.MoE:
    return mue.MoE(width=16 * width, head_dim=16, expert=expert, experts=experts, active=active, layers=layers)


growth = st.integers(1, 8)


@few
@given(n=growth, m=growth, M=growth, L=growth)
def test_jiang_is_its_table(n: int, m: int, M: int, L: int) -> None:
    """2601.20205, in absolute exponents of n = d and m = h, taken against the reference."""
    p = mue.transfer(moe(1, 3, 8, 2), moe(n, 3 * m, 8 * M, 2 * M, 4 * L), TUNED, rule="jiang")
    attention: Cells = (n**-0.5, 1 / n, n, 1 / (n * L))
    up: Cells = (n**-0.5, 1 / n, n, 1 / (m * L))
    table: dict[str, Cells] = {f"attention_{x}": attention for x in "qkvo"}
    table |= {"expert_up": up, "expert_gate": up, "expert_down": (n**0.5 / m, 1 / m, m, n / (m**2 * L))}
    table |= {"router": (1 / n, 1 / n, n, 1), "embedding": (1, 1, 1, 1 / n), "head": (1, 1, 1, 1 / n)}
    table |= {"norm": (None, 1, None, 1), "bias": (None, 1, None, 1 / L)}
    same_cells(p, table)
    assert p.residual_multiplier == pytest.approx(1 / L) and p.head_multiplier == pytest.approx(1 / n)
    assert p.route_scale == p.output_multiplier == 1


Regime = Callable[[float, float, float], dict[str, Cells]]
MSSP: dict[str, tuple[bool, bool, Regime]] = {  # (experts grow, width of an expert grows, table(N, N_e, M))
    "mssp-fixed-experts": (
        False,
        True,
        lambda N, h, M: {
            "router": (0, 1 / N, N, 1),
            "expert_up": (N**-0.5, 1 / N, N, 1 / N),
            "expert_down": (h**-0.5, 1 / h, h, 1 / N),
        },
    ),
    "mssp-bottleneck": (
        True,
        False,
        lambda N, h, M: {
            "router": (N**-0.5, 1 / N, N, 1 / M),
            "expert_up": (N**-0.5, 1 / N, N, 1 / M),
            "expert_down": ((M / h) ** 0.5, 1 / h, h, 1 / (N * M)),
        },
    ),
    "mssp-all-scaling": (
        True,
        True,
        lambda N, h, M: {
            "router": (N**-0.5, 1 / N, N, 1 / M),
            "expert_up": (N**-0.5, 1 / N, N, 1 / (N * M)),
            "expert_down": (h**-0.5, 1 / h, h, 1 / (N * M)),
        },
    ),
}


@pytest.mark.parametrize("rule", list(MSSP))
@few
@given(N=growth, h=growth, M=growth)
def test_mssp_is_its_tables(rule: str, N: int, h: int, M: int) -> None:
    experts_grow, expert_grows, table = MSSP[rule]
    M, h = M if experts_grow else 1, h if expert_grows else 1
    p = mue.transfer(moe(1, 3, 8, 2), moe(N, 3 * h, 8 * M, 2 * M), TUNED, rule=rule)
    cells = table(N, h, M) | {f"attention_{x}": (N**-0.5, 1 / N, N, 1 / N) for x in "qkvo"}
    cells |= {"embedding": (1, 1, 1, 1 / N), "head": (0, 1 / N, N, 1), "norm": (None, 1, None, 1 / N)}
    same_cells(p, cells)
    inits = {role: p.roles[role].init for role in ("router", "expert_up", "expert_down", "head", "attention_q")}
    assert inits == {
        "router": "zero" if rule == "mssp-fixed-experts" else "normal",
        "expert_up": "shared" if rule == "mssp-all-scaling" else "normal",
        "expert_down": "shared" if rule == "mssp-all-scaling" else "normal",
        "head": "zero",
        "attention_q": "normal",
    }


def test_zero_and_shared_draws_reach_the_model() -> None:
    sizes: dict[str, Any] = {"head_dim": 4, "vocab": 11, "sequence": 8, "layers": 2}
    base, target = mue.MoE.parse("4e2a", width=8, expert=4, **sizes), mue.MoE.parse("4e2a", width=16, expert=8, **sizes)
    for rule, shared in (("mssp-all-scaling", True), ("mssp-fixed-experts", False)):
        plan = mue.transfer(base, target, TUNED, rule=rule)
        model = Decoder(target, plan.multipliers)
        plan.init_(model)
        down = model.layers[0].experts.down  # type: ignore[union-attr]
        assert all(torch.equal(e, down[0]) for e in down) is shared
        assert down.std() > 0 and not torch.equal(down, model.layers[1].experts.down)  # type: ignore[union-attr]
        assert not model.head.weight.any()
        assert bool(model.layers[0].experts.router.weight.any()) is shared  # type: ignore[union-attr]


# ---- relations derived on paper --------------------------------------------------------------------------------------


@few
@given(width=growth, ffn=growth, layers=st.just(4))
def test_folded_dense_complete_mue_is_fan_in_mup(width: int, ffn: int, layers: int) -> None:
    """13: std H^-1/2 and lr 1/H, and every other weight as the rule mup has it (eps aside: the package leaves it)."""
    base = mue.Dense(width=64, ffn=128, layers=layers)
    target = mue.Dense(width=64 * width, ffn=32 * ffn, layers=layers)
    ours, theirs = (fold(mue.transfer(base, target, TUNED, rule=rule)) for rule in ("complete-mue", "mup"))
    assert ours.roles["ffn_down"].factor.init_std == pytest.approx((128 / (32 * ffn)) ** 0.5)
    for role in theirs.rule.rows:
        for name in ("init_std", "lr", "weight_decay"):
            x, y = getattr(ours.roles[role].values, name), getattr(theirs.roles[role].values, name)
            assert x == (None if y is None else pytest.approx(y, rel=1e-12)), (role, name)


def folded_down(rule: str, base: mue.MoE, target: mue.MoE) -> tuple[float, float]:
    """Factors (std, lr) on the folded routed down projection, target against the base's own folded form."""
    here, there = (
        fold(mue.transfer(base, shape, TUNED, rule=rule)).roles["expert_down"].values for shape in (target, base)
    )
    assert here.init_std and there.init_std and here.lr and there.lr
    return here.init_std / there.init_std, here.lr / there.lr


@few
@given(n=growth, h=growth, M=growth)
def test_same_rate_as_jiang_and_init_apart_by_the_root_of_the_expansion(n: int, h: int, M: int) -> None:
    """2601.20205: equal lr; std differs by √(H_act/d), so the two coincide where H_act = d."""
    base, target = moe(2, 8, 8, 2), moe(2 * n, 8 * h, 8 * M, 2 * M)
    (std, lr), (std_j, lr_j) = (folded_down(rule, base, target) for rule in ("complete-mue", "jiang"))
    assert lr == pytest.approx(lr_j, rel=1e-12)
    assert std / std_j == pytest.approx((h * M / n) ** 0.5, rel=1e-12)


@few
@given(k=st.integers(2, 8))
def test_complete_mue_is_mssp_in_the_bottleneck_regime_and_not_in_the_others(k: int) -> None:
    """2605.14200: exponents of k of the folded routed down projection, regime by regime."""
    base = moe(2, 8, 8, 2)
    regimes = {
        "mssp-fixed-experts": (moe(2 * k, 8 * k, 8, 2), (-0.5, -1), (-0.5, -1)),
        "mssp-bottleneck": (moe(2 * k, 8, 8 * k, 2 * k), (0.5, 0), (0.5, 0)),
        "mssp-all-scaling": (moe(2 * k, 8 * k, 8 * k, 2 * k), (0, -1), (-0.5, -1)),
    }
    for rule, (target, ours, theirs) in regimes.items():
        assert folded_down("complete-mue", base, target) == pytest.approx((k ** ours[0], k ** ours[1]), rel=1e-12)
        assert folded_down(rule, base, target) == pytest.approx((k ** theirs[0], k ** theirs[1]), rel=1e-12)
        jiang = folded_down("jiang", base, target)
        assert jiang == pytest.approx({"mssp-bottleneck": (k**0.5, 1)}.get(rule, (k**-0.5, 1 / k)), rel=1e-12)
    fine = moe(2, 8, 8 * k, 2 * k)  # granularity from experts k times as wide
    wide = moe(2, 8 * k, 8, 2)
    assert folded_down("complete-mue", wide, fine) == pytest.approx((k, k), rel=1e-12)


@few
@given(m_N=growth, m_L=growth, alpha=st.sampled_from([0.5, 1.0]))
def test_folded_dense_complete_mue_is_complete_d_p(m_N: int, m_L: int, alpha: float) -> None:
    """At the base's H/d; but for the final norm's eps, where Complete(d)P has the one of its folded head."""
    base, target = mue.Dense(width=64, ffn=128, layers=2), mue.Dense(width=64 * m_N, ffn=128 * m_N, layers=2 * m_L)
    runs: dict[str, Any] = {"base_training": mue.Training(1 << 16, 4000), "training": mue.Training(1 << 17, 9000)}
    ours, theirs = (
        fold(mue.transfer(base, target, TUNED, rule=rule, depth_exponent=alpha, **runs, **SDE))
        for rule in ("complete-mue", "complete-d-p")
    )
    for role in theirs.rule.rows:
        for name, value in theirs.roles[role].values.items():
            if (role, name) == ("final_norm", "eps"):
                continue
            assert getattr(ours.roles[role].values, name) == (
                None if value is None else pytest.approx(value, rel=1e-12)
            )
    assert ours.betas == theirs.betas
