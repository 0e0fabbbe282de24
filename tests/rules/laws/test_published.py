"""Each law at points of its publication, worked out by hand from what is printed there."""

from __future__ import annotations

import math

import pytest

from mue.rules.laws.law import get_law, lr_law


def test_step_law() -> None:
    """log10: 0.2529 - 0.713·9 + 0.307·11 and -0.2366 + 0.571·11."""
    assert lr_law("step-law").of({"N": 1e9, "D": 1e11}) == pytest.approx(10**-2.78715, rel=1e-4)
    assert get_law("step-law").sets["batch"].of({"D": 1e11}) == pytest.approx(10**6.04443, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "constant", "d", "D", "sequence"),
    [
        ("marin", 1.63 * 13 / 3, -0.3678, -0.2813, 4096),
        ("marin-may", 18.31, -0.150, -0.395, 4096),
        ("marin-august", 34.35, -0.345, -0.346, 8192),
    ],
)
def test_marins_fits_count_sequences_and_state_the_step_of_the_hyperball(
    name: str, constant: float, d: float, D: float, sequence: int
) -> None:
    tokens, width, sequences = 1e10, 1024, 128
    step = constant * tokens**D * width**d * sequences**0.5
    ours = lr_law(name).of({"d": width, "D": tokens, "B": sequences * sequence})
    assert 13 / 3 * ours == pytest.approx(step, rel=1e-12)


def test_marin_may_gives_the_rates_of_the_run_it_was_used_for() -> None:
    """Issue #6044: 10.07 T tokens, d2560, 33.55 M tokens a step → MuonH 0.003733, Adam 0.000861."""
    found = lr_law("marin-may").of({"d": 2560, "D": 1.007e13, "B": 33.55e6})
    assert found == pytest.approx(0.000861, rel=1e-3) and 13 / 3 * found == pytest.approx(0.003733, rel=1e-3)


def test_marin_august_is_what_their_heuristic_holds() -> None:
    """MoeHeuristic: 0.087571 · D^-0.3461 · d^-0.3448 · √B, the same fit with a digit more in the exponents."""
    found = lr_law("marin-august").of({"d": 1024, "D": 1e11, "B": 2**20})
    assert found == pytest.approx(0.087571 * 1e11**-0.3461 * 1024**-0.3448 * 2**10, rel=3e-3)


def test_ling() -> None:
    """log10: 0.06356 - 0.1529·20 and -1.15864 + 0.3644·20; their grid ends at 2^21 tokens and 2^-11."""
    law = get_law("ling")
    lr, batch = (law.sets[sets].of({"C": 1e20}) for sets in ("lr", "batch"))
    assert lr == pytest.approx(10**-2.99444, rel=1e-4) and batch == pytest.approx(10**6.12936, rel=1e-4)
    assert 2**-11 < lr < 2**-9 and 2**18 < batch < 2**21


def test_ludziejewski() -> None:
    """Equation 8: exp(8.39 - 0.81·ln 1e9) for a dense model; eight experts 8^-0.25 of it."""
    power = lr_law("ludziejewski")
    dense = power.of({"N_a": 1e9, "E": 1})
    assert dense == pytest.approx(math.exp(8.39 - 16.78585), rel=1e-4)
    assert power.of({"N_a": 1e9, "E": 8}) / dense == pytest.approx(0.59460, rel=1e-4)


def test_zhou_in_ratios() -> None:
    power = lr_law("zhou")
    assert power.constant is None
    assert power.of({"N_a": 2e9, "D": 1e11}) / power.of({"N_a": 1e9, "D": 1e11}) == pytest.approx(2**-0.2219)
    assert power.of({"N_a": 1e9, "D": 1e12}) / power.of({"N_a": 1e9, "D": 1e11}) == pytest.approx(10**-0.3509)


@pytest.mark.parametrize(
    ("d", "L", "S", "predicted"),
    [(1280, 12, 64 / 6, 8.60e-4), (1920, 18, 64 / 6, 5.90e-4), (2560, 30, 12, 4.05e-4), (7168, 61, 32, 2.21e-4)],
)
def test_nmoe_predicts_the_four_rates_of_its_table(d: int, L: int, S: float, predicted: float) -> None:
    """The Predicted column of its Validation; the models were trained with 8.6, 5.9, 4.0 and 2.2e-4."""
    power = lr_law("nmoe")
    assert power.of({"d": d, "L": L, "S": S}) == pytest.approx(predicted, rel=5e-3)
    power.check({"d": d, "L": L, "S": S})


def test_power_lines() -> None:
    """In sequences at 10 B tokens: 0.0306 · 10^3.83 = 206.9 and 0.0471 · 10^4.62 = 1,963."""
    law = get_law("power-lines")
    assert law.sets["batch"].of({"D": 1e10}) / 2048 == pytest.approx(206.88, rel=1e-3)
    assert law.sets["critical batch"].of({"D": 1e10}) / 2048 == pytest.approx(1963.4, rel=1e-3)


@pytest.mark.parametrize("millions", [85, 302, 1200])
def test_zhangs_fits_agree_in_the_units_taken_here(millions: float) -> None:
    """93.20 · N^0.47 sequences at 20 tokens a parameter; 621.34 · N^0.087 at what the model of 151 M got then."""
    power = get_law("zhang").sets["critical batch"]
    assert power.of({"D": 20e6 * millions}) / 512 == pytest.approx(93.20 * millions**0.47, rel=0.02)
    fixed = power.of({"D": 20e6 * 151}) / 512
    assert fixed == pytest.approx(621.34 * millions**0.087, rel=0.2)
    # the control: with tokens in single ones instead of millions the two would be hundreds apart
    assert fixed / 621.34 / (millions * 1e6) ** 0.087 < 0.4


def test_the_two_critical_batches_agree_where_their_definitions_do() -> None:
    """Twice the tokens at B_crit are 1 + B/B_crit; a fifth more are a fifth of it."""
    fifth = get_law("power-lines").sets["critical batch"].of({"D": 1e10}) / 5
    assert get_law("zhang").sets["critical batch"].of({"D": 1e10}) == pytest.approx(fifth, rel=0.15)
