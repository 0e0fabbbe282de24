"""Batch and duration: what the choices of exponents, weight decay, eps and betas keep is what plans say that they keep."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.fold import fold
from mue.plan.explain import RUN, why
from mue.plan.plan import PlanData
from mue.plan.replan import inputs_from_dict, retuned
from mue.plan.transfer import plan_of
from mue.rules import OPTIONS, RULES, Rule
from mue.rules.algebra import ONE, ratio
from mue.rules.roles import ROLES
from mue.rules.sde import AS_MEASURED, HORIZON, INVARIANTS, kept_and_lost, sde
from support.optimizer_plans import few
from support.paths import GOLDEN
from support.sde import SDE

RULES_OF_RUNS = ["complete-mue", "complete-mue-paper", "complete-d-p"]
BASE = mue.Dense(width=64, ffn=64, layers=2, head_dim=16)
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1, betas=(0.998, 0.999), eps=1e-10)
RUN_OF_BASE = mue.Training(2**14, 4000)
CHOICES = {name: OPTIONS[name].choices for name in ("weight_decay_run", "eps_run", "betas")}


def planned(rule: str, training: mue.Training, tuned: mue.HParams = TUNED, **options: Any) -> mue.Plan:
    return mue.transfer(BASE, BASE, tuned, base_training=RUN_OF_BASE, training=training, rule=rule, **options)


def measured(plan: Any, training: mue.Training) -> dict[str, list[float]]:
    """Every invariant on the target over the base's, from the values that a user gets: one number for each role (and beta)."""
    steps = training.steps / RUN_OF_BASE.steps
    rows = [
        (v.lr, v.weight_decay, v.eps) for r, p in plan.roles.items() if p.count and ROLES[r].drawn for v in [p.factor]
    ]
    averages = [(1 - b) / (1 - star) for b, star in zip(plan.betas, TUNED.betas, strict=True)]
    return {
        "T·η²": [steps * lr**2 for lr, _, _ in rows],
        "η·λ·T": [steps * lr * wd for lr, wd, _ in rows],
        "λ/η": [wd / lr for lr, wd, _ in rows],
        "η·ε": [lr * eps for lr, _, eps in rows],
        "(1-β)/η²": [a / lr**2 for a in averages for lr, _, _ in rows],
        "(1-β)·T": [a * steps for a in averages],
    }


def said(plan: Any, training: mue.Training) -> dict[str, float]:
    """The same as the plan's note prints it: 1 for what it keeps, the printed power law (and number) for the rest."""
    notes = [note for note in plan.notes if note.startswith("batch and duration")]
    if not notes:
        return dict.fromkeys(INVARIANTS, 1.0)
    (note,) = notes
    kept = re.search(r"keeps (.*?)(;|$)", note)
    found = dict.fromkeys(kept[1].replace(" to first order", "").split(", ") if kept else [], 1.0)
    here = {"ρ_B": training.batch / RUN_OF_BASE.batch, "ρ_D": training.tokens / RUN_OF_BASE.tokens}
    for name, formula, number in re.findall(r"(\S+) \(× ([^=]+) = ([^)]+)\)", note):
        value = math.prod(here[r] ** float(Fraction(p or 1)) for r, p in re.findall(r"(ρ_.)(?:\^([-\d/]+))?", formula))
        assert float(number) == pytest.approx(value, rel=1e-3)
        found[name] = value
    return found


def agrees(said: Mapping[str, float], measured: Mapping[str, list[float]]) -> None:
    assert set(said) == set(INVARIANTS)
    for name, values in measured.items():
        assert values == pytest.approx([said[name]] * len(values), rel=1e-9), name


exponents = st.fractions(0, 1, max_denominator=20)
runs = st.builds(mue.Training, st.sampled_from([2**12, 2**14, 2**16]), st.sampled_from([1000, 4000, 5555, 20_000]))


@few
@given(
    st.sampled_from(RULES_OF_RUNS),
    runs,
    exponents,
    exponents,
    st.fixed_dictionaries({k: st.sampled_from(v) for k, v in CHOICES.items()}),
)
def test_what_a_plan_says_it_keeps_is_kept_and_the_rest_moves_as_printed(
    rule: str, training: mue.Training, p: Fraction, q: Fraction, choices: dict[str, str]
) -> None:
    if choices["betas"] == "power":
        return  # equal to first order only: the next test
    plan = planned(rule, training, batch_exponent=p, duration_exponent=q, **choices)
    agrees(said(plan, training), measured(plan, training))
    assert {s.number: s.value for s in why(plan, RUN) if s.number in INVARIANTS} == pytest.approx(said(plan, training))
    wanted = math.prod([(training.batch / 2**14) ** float(p), (training.tokens / RUN_OF_BASE.tokens) ** -float(q)])
    assert plan.roles["embedding"].factor.lr == pytest.approx(wanted, rel=1e-12)


def test_power_keeps_what_linear_keeps_to_first_order() -> None:
    training = mue.Training(2**14, 2000)
    plan = planned("complete-mue", training, betas="power", duration_exponent="2/5")
    assert "(1-β)/η² to first order" in plan.notes[0]
    (one, *_) = measured(plan, training)["(1-β)/η²"]
    assert one == pytest.approx(1, rel=2e-3) and one != pytest.approx(1, rel=1e-6)


def test_control_a_wrong_factor_is_no_invariant() -> None:
    training = mue.Training(2**14, 8000)
    plan = planned("complete-mue", training, **SDE | {"weight_decay_run": "unchanged"})
    with pytest.raises(AssertionError):
        agrees(dict.fromkeys(INVARIANTS, 1.0), measured(plan, training))
    assert said(planned("complete-mue", training, **SDE), training) == dict.fromkeys(INVARIANTS, 1.0)  # nothing to say


@pytest.mark.parametrize("name", ["weight_decay_run", "eps_run", "betas"])
@pytest.mark.parametrize("rule", RULES_OF_RUNS)
def test_a_choice_moves_its_own_number_and_no_other(rule: str, name: str) -> None:
    """A finding on the lr moves neither of the others, and one on weight decay, eps or betas moves nothing else."""
    training = mue.Training(2**15, 9000)
    usual = planned(rule, training, **SDE)
    field = {"weight_decay_run": "weight_decay", "eps_run": "eps", "betas": "betas"}[name]
    changed = planned(rule, training, **SDE | {name: "unchanged"})
    moved = {path.rsplit(".", 1)[-1].partition("[")[0] for path, _, _ in usual.diff(changed)}
    assert moved == {field, name}
    kept = SDE | dict.fromkeys(("weight_decay_run", "eps_run", "betas"), "unchanged")
    lr_only = planned(rule, training, **kept).diff(planned(rule, training, **kept | {"duration_exponent": "1/5"}))
    assert {path.rsplit(".", 1)[-1] for path, _, _ in lr_only} == {"lr", "duration_exponent"}


def test_timescales_do_not_follow_the_lr() -> None:
    training = mue.Training(2**15, 9000)
    for q in ("0", "1/4", "1"):
        plan = planned(
            "complete-mue",
            training,
            duration_exponent=q,
            betas="constant-timescale",
            weight_decay_run="constant-timescale",
        )
        assert 1 - plan.betas[0] == pytest.approx(0.002 * 4000 / 9000)
        head = plan.roles["head"].values
        assert head.lr * head.weight_decay * 9000 == pytest.approx(0.01 * 0.1 * 4000)


@pytest.mark.parametrize(
    ("p", "q", "batch", "fix"),
    [
        ("1/2", "0", 2**19, r"at most ([\d,]+) tokens a step"),
        ("1/2", "1/2", 2**14, r"at least ([\d,]+) steps"),
        ("1/4", "9/10", 2**14, r"at least ([\d,]+) steps"),
    ],
)
def test_betas_that_cannot_be_carried_name_what_works(p: str, q: str, batch: int, fix: str) -> None:
    """The fewest steps, or where steps have no part in it the largest batch; beyond it nothing works.

    The bound itself is a whole number in two of the cases, and there rounding decides: hence one further.
    """
    tuned = TUNED.replace(betas=(0.9, 0.95))

    def at(batch: int, steps: int) -> mue.Plan:
        options = SDE | {"batch_exponent": p, "duration_exponent": q}
        return planned("complete-mue", mue.Training(batch, steps), tuned, **options)

    with pytest.raises(ValueError, match=fix) as error:
        at(batch, 100)
    found = re.search(fix, str(error.value))
    assert found is not None
    bound = int(found[1].replace(",", ""))
    of_steps = "steps" in fix
    at(batch, bound) if of_steps else at(bound, 100)
    with pytest.raises(ValueError, match="cannot be carried"):
        at(batch, bound - 2) if of_steps else at(bound + 2, 100)


def test_an_exponent_next_to_zero_asks_for_no_impossible_number() -> None:
    tuned = TUNED.replace(betas=(0.9, 0.95))
    with pytest.raises(ValueError, match="no run is long enough at this batch"):
        planned("complete-mue", mue.Training(2**20, 100), tuned, **SDE | {"duration_exponent": "1/1000"})


# ---- files -----------------------------------------------------------------------------------------------------------


def test_new_options_at_their_old_meaning_are_in_no_file_and_no_hash() -> None:
    for rule in RULES_OF_RUNS:
        plan = planned(rule, RUN_OF_BASE, **SDE)
        stored = plan.to_dict()["inputs"]["options"] | plan.to_dict()["options"]
        assert not {"batch_exponent", "weight_decay_run", "eps_run"} & set(stored), rule
        other = planned(rule, RUN_OF_BASE, **SDE | {"eps_run": "unchanged"})
        assert other.hash != plan.hash and other.to_dict()["inputs"]["options"]["eps_run"] == "unchanged"
        assert ("options.eps_run", "follows-lr", "unchanged") in plan.diff(other)
    today = planned("complete-mue", RUN_OF_BASE).to_dict()["inputs"]["options"]
    assert (today["batch_exponent"], today["weight_decay_run"]) == ("7/20", "unchanged") and "eps_run" not in today


def test_the_defaults_are_what_was_measured_and_name_their_page() -> None:
    """Each of them by its own page; the rules that publish the SDE rule keep it; and only a run that changes is spoken of."""
    defaults = mue.get_rule("complete-mue").options
    assert {name: defaults[name] for name in AS_MEASURED} == AS_MEASURED and defaults["eps_run"] == "follows-lr"
    for rule in ("complete-mue-paper", "complete-d-p"):
        assert {name: str(mue.get_rule(rule).options[name]) for name in SDE} == SDE
    assert {name: str(value) for name, value in mue.rules.SDE.items()} == SDE
    training = mue.Training(2**15, 9000)

    def notes(training: mue.Training, **options: Any) -> list[str]:
        return [n for n in planned("complete-mue", training, **options).notes if n.startswith("batch and duration")]

    (note,) = notes(training)
    assert all(f"{name} = {value}" in note for name, value in AS_MEASURED.items()) and HORIZON in note
    assert "eps_run" not in note and "keeps η·ε" in note  # nobody measured another
    assert not notes(training, **SDE) and not notes(RUN_OF_BASE)
    (other,) = notes(training, betas="linear", batch_exponent="2/5")
    assert "weight_decay_run = unchanged" in other and "betas =" not in other and "batch_exponent =" not in other


def test_a_derivation_says_what_was_left_alone_and_by_what() -> None:
    plan = planned("complete-mue", mue.Training(2**15, 9000))
    steps = why(plan, "ffn_up")
    for number, ratios in (("lr", ["ρ_D"]), ("weight decay", ["ρ_B", "ρ_D"]), ("eps", ["ρ_D"])):
        left = [s for s in steps if s.number == number and "left as it is" in s.text]
        assert [s.text.split("for ")[1].split(" =")[0] for s in left] == ratios
        assert all(HORIZON in s.source for s in left)
    moved = next(s for s in steps if s.number == "lr" and "× ρ_B^7/20" in s.text)
    assert HORIZON in moved.source
    assert [HORIZON in s.source for s in why(plan, RUN) if s.number in ("lr", "weight decay", "beta1")] == [True] * 3
    by_sde = planned("complete-mue", mue.Training(2**15, 9000), **SDE)
    assert not any(
        "left as it is" in s.text or HORIZON in s.source for s in (*why(by_sde, "ffn_up"), *why(by_sde, RUN))
    )
    assert not any("left as it is" in s.text for s in why(planned("complete-mue", RUN_OF_BASE), "ffn_up"))


def test_a_plan_file_from_before_keeps_its_meaning() -> None:
    """Written when the SDE rule was complete-mue's default: a plan on a plan, batch and duration changed twice."""
    plan = mue.Plan.load(GOLDEN / "plan-of-sde-defaults.json")
    assert {name: str(plan.rule.options[name]) for name in SDE} == SDE
    stored = json.loads((GOLDEN / "plan-of-sde-defaults.json").read_text(encoding="utf-8"))
    assert "batch_exponent" not in stored["inputs"]["options"]  # it says nothing of what came later
    assert plan.hash == stored["hash"] and plan.roles["head"].values.lr == pytest.approx(2**-0.5 * 2**-0.5 * 1e-3)
    assert plan.betas == pytest.approx((0.975, 0.9875))
    base = plan.inputs.base
    assert isinstance(base, PlanData) and base.rule.options["duration_exponent"] == Fraction(1, 2)
    today = mue.transfer(BASE, BASE, TUNED, base_training=RUN_OF_BASE, training=mue.Training(2**14, 8000))
    assert today.roles["head"].factor.lr == 1 and today.betas == TUNED.betas  # what the same inputs would mean now


@pytest.fixture
def other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later version does: other defaults, for an option that was always there and for ones that came later."""
    builder = RULES.lookup("complete-mue")

    def complete_mue(**options: Any) -> Rule:
        return builder(**options)

    signature = inspect.signature(builder)
    changed = {
        "duration_exponent": Fraction(1, 5),
        "batch_exponent": Fraction(2, 5),
        "weight_decay_run": "constant-timescale",
    }
    parameters = [p.replace(default=changed.get(n, p.default)) for n, p in signature.parameters.items()]
    monkeypatch.setattr(complete_mue, "__signature__", signature.replace(parameters=parameters), raising=False)
    monkeypatch.setitem(RULES._entries, "complete-mue", (1, complete_mue))


@pytest.mark.parametrize("options", [SDE, {}], ids=["as given", "by default"])
def test_old_files_keep_their_meaning_when_defaults_change(
    options: dict[str, str], request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    training = mue.Training(2**15, 9000)
    old = planned("complete-mue", training, **options)
    chain = mue.transfer(old, replace(BASE, width=128), training=training)
    folded = fold(chain)
    for name, plan in (("old", old), ("chain", chain), ("folded", folded)):
        plan.save(tmp_path / f"{name}.json")
    data = old.inputs.to_dict()
    request.getfixturevalue("other_defaults")
    new = planned("complete-mue", training)
    assert new.rule.options["batch_exponent"] == Fraction(2, 5) and new.hash != old.hash
    for name, plan in (("old", old), ("chain", chain), ("folded", folded)):
        loaded = mue.Plan.load(tmp_path / f"{name}.json")
        assert loaded.hash == plan.hash and loaded.rule.options == plan.rule.options, name
        assert retuned(loaded, lr=0.02).rule.options == plan.rule.options
    again = plan_of(inputs_from_dict(data))
    assert again.hash == old.hash and again.roles["head"].values == old.roles["head"].values
    # and a plan by the new defaults is written down as such
    new.save(tmp_path / "new.json")
    stored = new.to_dict()["inputs"]["options"]
    assert stored["batch_exponent"] == "2/5" and stored["weight_decay_run"] == "constant-timescale"
    assert mue.Plan.load(tmp_path / "new.json").hash == new.hash
    assert retuned(new, lr=new.tuned.lr).hash == new.hash


def test_the_page_says_what_the_algebra_says() -> None:
    B, D = ratio("ρ_B"), ratio("ρ_D")
    unchanged = sde(betas="unchanged", weight_decay_run="unchanged", eps_run="unchanged").changes()
    assert unchanged["(1-β)·T"] == D / B and unchanged["η·ε"] == (B / D) ** "1/2"
    assert all(change == ONE for change in sde().changes().values())
    assert kept_and_lost(sde(), among=["η·ε"]) == "keeps η·ε"
    assert kept_and_lost(sde(Fraction(2, 5), Fraction(0)), among=["T·η²"]) == "gives up T·η² (× ρ_B^-1/5 · ρ_D)"


def test_what_is_not_the_published_rule_is_marked_and_says_what_was_chosen() -> None:
    training = mue.Training(2**15, 9000)
    usual = planned("complete-mue-paper", training)
    other = planned("complete-mue-paper", training, batch_exponent="2/5", eps_run="unchanged")
    marks = usual.roles["ffn_up"].marks, other.roles["ffn_up"].marks
    assert set(marks[0].values()) == {"published"}
    assert marks[1] == {"init_std": "published", "lr": "inferred", "weight_decay": "inferred", "eps": "inferred"}
    steps = why(other, "ffn_up")
    assert any("batch_exponent = 2/5" in s.source for s in steps if s.number == "lr" and "ρ_B" in s.text)
    assert "no SDE rule" in why(mue.transfer(BASE, BASE, TUNED, rule="mup"), RUN)[0].text
    assert [s.value for s in why(other, RUN) if s.number == "beta1"] == [other.betas[0]]


def test_l2_decay_does_not_move_with_the_choice_of_eps() -> None:
    """Under adam-l2 the gradient's scale stands in weight decay, and it is not eps that makes it."""
    tuned, training = TUNED.replace(optimizer="adam-l2"), mue.Training(2**15, 9000)
    one, two = (planned("complete-mue", training, tuned, eps_run=eps) for eps in ("follows-lr", "unchanged"))
    assert one.roles["ffn_up"].values.weight_decay == two.roles["ffn_up"].values.weight_decay
    assert one.roles["ffn_up"].values.eps != two.roles["ffn_up"].values.eps
