"""Per-role values: what they multiply, which roles of the target they stand for, where along the depth, and what is refused."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mue
from mue.fold import FOLDS, fold
from mue.lab.models.language import LanguageModel
from mue.plan.explain import WHOLE, why
from mue.plan.toml import plan_inputs
from mue.plan.transfer import plan_of
from mue.rules.roles import ROLES, roles_of
from mue.rules.table import FIELDS
from mue.shapes.hparams import THIRDS, third_of
from support import rule_properties as properties
from support.plan_file import PLAN as FILE

BASE = mue.Dense(width=64, ffn=64, layers=3, head_dim=32, sequence=32)
TARGET = mue.MoE.parse("8e2a1s", width=128, expert=32, layers=6, head_dim=32, sequence=32)
TUNED = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02)
RUNS: dict[str, Any] = {"base_training": mue.Training(1 << 12, 4000), "training": mue.Training(1 << 12, 8000)}
few = settings(max_examples=25, deadline=None)
ON_THE_BASE = [r for r in roles_of(BASE) if ROLES[r].trained and ROLES[r].fallback is None and r != "router"]


def make(roles: dict[str, Any] | None = None, **changes: Any) -> mue.Plan:
    numbers: dict[str, Any] = {"base": BASE, "target": TARGET, **RUNS, **changes}
    return mue.transfer(numbers.pop("base"), numbers.pop("target"), TUNED.replace(roles=roles or {}), **numbers)


@st.composite
def role_tables(draw: st.DrawFn, *, thirds: bool = True) -> dict[str, Any]:
    """Random multipliers and values of random roles, some of them in a third of the depth."""

    def table(role: str) -> dict[str, float]:
        fields = [f for f in FIELDS if not ROLES[role].vector or f in ("lr", "eps")]
        chosen = draw(st.lists(st.sampled_from(fields), max_size=3, unique=True))
        return {f"{f}{draw(st.sampled_from(['', '_times']))}": draw(st.floats(1e-3, 8)) for f in chosen}

    roles = draw(st.lists(st.sampled_from(ON_THE_BASE), max_size=4, unique=True))
    found: dict[str, Any] = {role: table(role) for role in roles}
    for third in draw(st.lists(st.sampled_from(THIRDS), max_size=2, unique=True)) if thirds else ():
        inside = draw(st.lists(st.sampled_from([r for r in ON_THE_BASE if ROLES[r].inside]), max_size=3, unique=True))
        found[third] = {role: t for role in inside if (t := table(role))}
    return {name: t for name, t in found.items() if t}


# ---- what they say ---------------------------------------------------------------------------------------------------


def test_a_multiplier_of_1_is_no_change_of_anything() -> None:
    said = {"head": {"lr_times": 1}, "first_third": {"ffn_up": {"init_std_times": 1.0}}, "norm": {}}
    assert make(said).to_dict() == make().to_dict() and make(said).hash == make().hash
    assert "per role" not in str(make(said)) and "per role" in str(make({"head": {"lr_times": 2}}))


def test_a_value_replaces_and_a_multiplier_multiplies_what_would_be_there_otherwise() -> None:
    plan = make(
        {
            "ffn_down": {"lr": 1e-2, "weight_decay_times": 3},
            "expert_down": {"lr_times": 2, "weight_decay_times": 5},
            "shared_down": {"lr": 7e-3},
            "last_third": {"ffn_down": {"lr_times": 0.5}, "shared_down": {"weight_decay": 1.0}},
        }
    )
    factor = make().roles["expert_down"].factor
    for role, layer, lr, decay in (
        ("expert_down", 0, 2e-2, 1.5),
        ("shared_down", 0, 7e-3, 0.3),
        ("expert_down", 5, 1e-2, 1.5),
        ("shared_down", 5, 3.5e-3, 1.0),
    ):
        values = plan.role(role, layer).values
        assert values.lr == pytest.approx(lr * factor.lr, rel=1e-12), (role, layer)  # type: ignore[operator]
        assert values.weight_decay == pytest.approx(decay * factor.weight_decay, rel=1e-12), (role, layer)  # type: ignore[operator]


@few
@given(roles=role_tables())
def test_the_base_gets_exactly_what_was_tuned(roles: dict[str, Any]) -> None:
    """base → base, every factor 1: the tuned number, times its multipliers, bit for bit."""
    plan = make(roles, target=BASE, training=RUNS["base_training"])
    for layer in range(BASE.layers):
        third = third_of(layer, BASE.layers)
        for role in ON_THE_BASE:
            values = plan.role(role, layer).values
            for field in ("lr", "eps") if ROLES[role].vector else FIELDS:
                expected = getattr(TUNED, field)
                for table in (roles.get(role, {}), roles.get(third, {}).get(role, {})):
                    expected = table.get(field, expected) * table.get(f"{field}_times", 1.0)
                assert getattr(values, field) == pytest.approx(expected, rel=1e-15), (role, field)


@few
@given(roles=role_tables())
def test_the_rule_carries_them_to_every_role_they_stand_for(roles: dict[str, Any]) -> None:
    """Factors are the rule's own; a role's value is its factor times that of the base's role in the same third."""
    plain, plan, base = make(), make(roles), make(roles, target=BASE, training=RUNS["base_training"])
    for layer in range(TARGET.layers):
        tuned_at = next(i for i in range(BASE.layers) if third_of(i, BASE.layers) == third_of(layer, TARGET.layers))
        for role in roles_of(TARGET):
            here, star = plan.role(role, layer), base.role(ROLES[role].tuned_as[-1], tuned_at)
            assert here.factor == plain.role(role, layer).factor, role
            for field, value in here.values.items():
                factor, own = getattr(here.factor, field), getattr(star.values, field)
                if value is not None and ROLES[role].trained:
                    assert value == pytest.approx(factor * own, rel=1e-12), (role, field)
    assert plan.role("router", 0).values == plain.role("router", 0).values


@pytest.mark.parametrize("rule", ["complete-mue", "complete-mue-paper", "standard", "hidden-ratio-only"])
@settings(max_examples=10, deadline=None)
@given(roles=role_tables(), data=st.data())
def test_composition(rule: str, roles: dict[str, Any], data: st.DataObject) -> None:
    """A → B → C is A → C layer by layer, per-role values and thirds included (B has a layer in each)."""
    a, b, c = (
        replace(x, shape=replace(x.shape, layers=x.shape.layers + 2)) for x in data.draw(properties.cases(rule, 3))
    )
    tuned = properties.TUNED.replace(roles=roles)
    chained = properties.plan(rule, properties.plan(rule, a, b, tuned), c)
    direct = properties.plan(rule, a, c, tuned)
    for layer in range(c.shape.layers):
        for role in roles_of(c.shape):
            for (name, x), (_, y) in zip(
                chained.role(role, layer).values.items(), direct.role(role, layer).values.items(), strict=True
            ):
                assert x == (None if y is None else pytest.approx(y, rel=1e-12)), (role, layer, name)
    assert [block.layers for block in chained.blocks] == [block.layers for block in direct.blocks]


# ---- depth -----------------------------------------------------------------------------------------------------------


def test_thirds_of_the_depth() -> None:
    cut = {n: [sum(third_of(i, n) == t for i in range(n)) for t in THIRDS] for n in (1, 2, 3, 4, 5, 6, 8, 48)}
    assert cut == {
        1: [0, 1, 0],
        2: [1, 0, 1],
        3: [1, 1, 1],
        4: [1, 2, 1],
        5: [2, 1, 2],
        6: [2, 2, 2],
        8: [3, 2, 3],
        48: [16, 16, 16],
    }


def test_a_third_is_the_same_place_at_another_depth() -> None:
    plan = make({"first_third": {"ffn_up": {"lr_times": 2}, "norm": {"lr_times": 4}}})
    assert [b.layers for b in plan.blocks] == [2, 4]  # the last two thirds have nothing of their own
    plain, rates = make(), [plan.role("expert_up", layer).values.lr for layer in range(6)]
    assert rates == [plain.roles["expert_up"].values.lr * m for m in (2, 2, 1, 1, 1, 1)]  # type: ignore[operator]
    assert plan.role("norm", 1).values.lr == 4 * plan.role("norm", 2).values.lr  # type: ignore[operator]
    assert plan.roles["expert_up"].values.lr is None and plan.roles["head"] == plain.roles["head"]
    assert plan.multipliers == plain.multipliers and plan.drift == plain.drift
    text = str(plan)
    assert "expert_up [layers 0–1]" in text and "expert_up [layers 2–5]" in text and "\nexpert_gate " in text
    mixed = mue.Mixed(
        128, (mue.Block(layers=1, ffn=64), mue.Block(layers=5, expert=32, experts=8, active=2)), head_dim=32
    )
    cut = make({"first_third": {"ffn_up": {"lr_times": 2}}}, target=mixed)
    assert [(b.layers, b.notation) for b in cut.blocks] == [(1, "dense"), (1, "8e2a"), (4, "8e2a")]
    assert cut.role("ffn_up", 0).values.lr == cut.role("expert_up", 1).values.lr != cut.role("expert_up", 2).values.lr


def test_on_a_model_each_layer_gets_its_own() -> None:
    """Drawn and grouped: the first third's up projections, routed and shared, and nothing else."""
    plan = make({"first_third": {"ffn_up": {"lr_times": 2, "init_std_times": 3}}, "head": {"lr_times": 4}})
    plain = make()
    model, other = (LanguageModel(TARGET, p.multipliers) for p in (plan, plain))
    for p, m in ((plan, model), (plain, other)):
        p.init_(m, seed=1)
    settings_of = {
        id(p): (g["lr"], g["weight_decay"])
        for m, q in ((model, plan), (other, plain))
        for g in q.param_groups(m)
        for p in g["params"]
    }
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        up = name in {f"blocks.{i}.moe.{kind}_up" for i in (0, 1) for kind in ("experts", "shared")}
        torch.testing.assert_close(mine, theirs * (3 if up else 1))
        times = 2 if up else 4 if name == "head.weight" else 1
        lr, decay = settings_of[id(theirs)]
        assert settings_of[id(mine)] == (pytest.approx(lr * times), decay), name


def test_the_check_reads_them_and_sees_where_they_are_missing() -> None:
    plan = make({"first_third": {"ffn_up": {"lr_times": 2}}, "embedding": {"init_std_times": 4}})
    model = LanguageModel(TARGET, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    assert mue.check(model, plan, (tokens, tokens), optimizer, raises=False).ok
    wrong = torch.optim.AdamW(make().param_groups(model))
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.\w+_up.*lr"):
        mue.check(model, plan, (tokens, tokens), wrong)


# ---- folding, tying, zero init ---------------------------------------------------------------------------------------


@few
@given(roles=role_tables(), tied=st.booleans(), route=st.sampled_from(["weights", "model"]))
def test_the_fold_commutes_with_them(roles: dict[str, Any], tied: bool, route: str) -> None:
    """A multiplier before the fold is the same multiplier after it: c does not know of them."""
    target = replace(TARGET, tied=tied)
    plain, own = (fold(make(r, target=target), route) for r in (None, roles))
    before, unfolded = make(target=target), make(roles, target=target)
    compared = list[tuple[str, int]]()
    powers = {
        "init_std": 1,
        "lr": FOLDS["adamw"].lr,
        "weight_decay": FOLDS["adamw"].weight_decay,
        "eps": FOLDS["adamw"].eps,
    }
    for layer in range(TARGET.layers):
        for role in roles_of(TARGET):
            if not ROLES[role].trained or not own.role(role, layer).count:
                continue
            compared.append((role, layer))
            for field, power in powers.items():
                here, there = (getattr(p.role(role, layer).values, field) for p in (own, plain))
                mine, theirs = (getattr(p.role(role, layer).values, field) for p in (unfolded, before))
                assert power is not None and (here is None) == (there is None)
                if here:
                    assert here / there == pytest.approx(mine / theirs, rel=1e-12), (role, field)
            assert own.role(role, layer).constant == plain.role(role, layer).constant
    assert len(compared) >= 8 * TARGET.layers


def test_a_tied_head_follows_the_embedding_and_says_so() -> None:
    plan = make({"head": {"lr_times": 2}, "embedding": {"lr_times": 3}}, target=replace(TARGET, tied=True))
    assert any("tuned.roles.head: the target has no head" in note for note in plan.notes)
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model)
    rates = {id(p): g["lr"] for g in plan.param_groups(model) for p in g["params"]}
    assert rates[id(model.head.weight)] == plan.roles["embedding"].values.lr
    assert plan.roles["embedding"].values.lr == pytest.approx(3 * make().roles["embedding"].values.lr)  # type: ignore[operator]


def test_a_zero_init_stays_zero_and_says_so() -> None:
    base = mue.MoE.parse("8e2a", width=64, expert=32, layers=3, head_dim=32)
    wide = replace(base, width=128)
    plan = make(
        {"router": {"init_std_times": 2}}, base=base, target=wide, rule="mssp-fixed-experts", **dict.fromkeys(RUNS)
    )
    assert plan.roles["router"].init == "zero" and plan.roles["router"].values.init_std == 0
    assert any("starts router at zero" in note for note in plan.notes)


def test_notes_say_what_they_stand_for() -> None:
    notes = make({"ffn_down": {"lr_times": 4}, "middle_third": {"attention_q": {"lr_times": 2}}}).notes
    assert "tuned.roles.ffn_down stands for expert_down, shared_down too" in notes
    assert any(note.startswith("router: the base has none") for note in notes)
    two = make({"middle_third": {"attention_q": {"lr_times": 2}}}, target=replace(TARGET, layers=2))
    assert any("none of the target's 2 layers lies there" in note for note in two.notes)
    assert not any("tuned.roles" in note or note.startswith("router") for note in make().notes)
    assert "tuned.roles.ffn_down: lr × 4" in make({"ffn_down": {"lr_times": 4}}).roles["expert_down"].source


# ---- plans and files -------------------------------------------------------------------------------------------------

ROLES_FILE = FILE.replace(
    "[target]\n",
    """[tuned.roles]
head = { lr_times = 2.0 }
ffn_down = { lr_times = 4.0, init_std_times = 0.5 }
embedding = { lr = 3e-3 }
[tuned.roles.first_third]
ffn_up = { lr_times = 1.5 }
[target]
""",
)


def test_a_file_says_the_same_as_python(tmp_path: Path) -> None:
    made = mue.Plan.of(plan_of(plan_inputs(tomllib.loads(ROLES_FILE))))
    times = {"head": {"lr_times": 2.0}, "ffn_down": {"lr_times": 4.0, "init_std_times": 0.5}}
    tuned = mue.HParams(
        1e-3, 0.1, 0.01, roles={**times, "embedding": {"lr": 3e-3}, "first_third": {"ffn_up": {"lr_times": 1.5}}}
    )
    assert made == plan_of(plan_inputs({k: v for k, v in tomllib.loads(FILE).items() if k != "tuned"}, tuned))
    made.save(tmp_path / "plan.json")
    assert mue.Plan.load(tmp_path / "plan.json").to_dict() == made.to_dict()
    plain = plan_of(plan_inputs(tomllib.loads(FILE)))
    assert made.hash != plain.hash and "roles.head.lr" in {path for path, _, _ in made.diff(plain)}
    double = made.scaled(2)
    for layer in (0, 7):
        for role in ("head", "embedding", "expert_up", "expert_down"):
            assert double.role(role, layer).values.lr == pytest.approx(2 * made.role(role, layer).values.lr)  # type: ignore[operator]
    assert made.retuned(lr=2e-3).roles["head"].values.lr == pytest.approx(2 * made.roles["head"].values.lr)  # type: ignore[operator]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"down": {"lr_times": 2}}, "unknown role 'down' in tuned.roles; did you mean 'ffn_down'"),
    ({"first_third": {"ffn_upp": {"lr_times": 2}}}, "unknown role 'ffn_upp'.*did you mean 'ffn_up'"),
    ({"first_thrid": {"ffn_up": {"lr_times": 2}}}, "unknown third 'first_thrid'.*did you mean 'first_third'"),
    ({"first.ffn_up": {"lr_times": 2}}, "unknown third 'first'"),
    ({"head": {"lr_time": 2}}, "unknown key 'lr_time' in tuned.roles.head; did you mean 'lr_times'"),
    ({"head": {"lr_times": 0}}, r"tuned\.roles\.head\.lr_times must be greater than 0"),
    ({"head": {"lr_times": -2}}, "must be greater than 0"),
    ({"head": {"weight_decay_times": 0}}, "must be greater than 0"),
    ({"head": {"lr_times": float("inf")}}, "must be a finite number"),
    ({"head": {"lr_times": 2, "lr": 1e-3}}, "has lr and lr_times: the value is the product"),
    ({"norm": {"init_std_times": 2}}, "gains start at 1"),
    ({"final_norm": {"weight_decay_times": 2}}, "neither is decayed"),
    ({"first_third": {"head": {"lr_times": 2}}}, "head lies outside the blocks and has no depth"),
    ({"router_bias": {"lr_times": 2}}, "unknown role 'router_bias'"),
    ({"head": {"weight_decay": 0.0}, "embedding": 3}, "tuned.roles.embedding must be a table of lr, lr_times"),
]


@pytest.mark.parametrize(("roles", "message"), BAD)
def test_what_is_refused(roles: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(roles)


def test_what_nothing_could_have_been_tuned_on_is_refused() -> None:
    roles = {"middle_third": {"ffn_up": {"lr_times": 2}}}
    with pytest.raises(ValueError, match="middle_third: the base has 2 layers, none of them in its middle third"):
        make(roles, base=replace(BASE, layers=2))
    between = make(roles, target=replace(TARGET, layers=2))
    with pytest.raises(ValueError, match="middle_third: the base has 2 layers"):
        mue.transfer(between, TARGET)
    ends = {third: {"ffn_up": {"lr_times": 2}} for third in ("first_third", "last_third")}
    with pytest.raises(ValueError, match="the base plan has 2 layers, all of them in thirds with values of their own"):
        mue.transfer(make(ends, target=replace(TARGET, layers=2)), TARGET)
    with pytest.raises(ValueError, match="multiplies a weight decay of 0"):
        mue.transfer(BASE, TARGET, replace(TUNED, weight_decay=0, roles={"head": {"weight_decay_times": 2}}))


@few
@given(roles=role_tables(), folded=st.booleans())
def test_a_derivation_has_every_step(roles: dict[str, Any], folded: bool) -> None:
    """It ends at the planned number in every layer, and multipliers are steps with their names."""
    plan = fold(make(roles)) if folded else make(roles)
    for layer in (0, 2, 5):
        for role in ("expert_down", "attention_q", "norm", "head"):
            last = {step.number: step.value for step in why(plan, role, layer)}
            values = plan.role(role, layer).values
            assert last["lr"] == pytest.approx(values.lr, rel=1e-12)
            assert last["weight decay"] == pytest.approx(values.weight_decay, rel=1e-12)
    for role, table in roles.items():
        if role in ("head", "norm") and "lr_times" in table and table["lr_times"] != 1:
            assert any(f"tuned.roles.{role}.lr_times" in step.text for step in why(plan, role))
    for name in WHOLE:
        assert why(plan, name)[-1].value == pytest.approx(getattr(plan, name), rel=1e-12)
    assert why(plan, "head_multiplier")[1].text.startswith("× ρ_d^-1 = 0.5")


def test_where_blocks_differ_each_is_derived() -> None:
    plan = make({"first_third": {"ffn_up": {"lr_times": 2}}})
    ends = {s.number: s.value for s in why(plan, "expert_up") if s.number.startswith("lr")}
    assert list(ends) == ["lr [layers 0–1]", "lr [layers 2–5]"]
    assert ends["lr [layers 0–1]"] == pytest.approx(2 * ends["lr [layers 2–5]"])
    assert {s.number for s in why(plan, "expert_gate")} == {"init std", "lr", "weight decay", "eps"}
    blocks = (mue.Block(layers=1, ffn=256), mue.Block(layers=5, expert=32, experts=8, active=2))
    mixed = make(target=mue.Mixed(128, blocks, head_dim=32))
    assert {s.number for s in why(mixed, "output_multiplier")} == {
        "output multiplier [layer 0]",
        "output multiplier [layers 1–5]",
    }
    with pytest.raises(ValueError, match="did you mean 'head_multiplier'"):
        why(plan, "head_multipler")
