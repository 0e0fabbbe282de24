"""Files of claims: what they share, and that a mistake in one names the file, the claim and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from claims.spec import Claims, Value, read_claims
from support.claims import BASE, GROUP, claims_folder


def read(folder: Path, old: str = "", new: str = "") -> Claims:
    """The claims, with words of their file replaced at their first place."""
    assert old in GROUP
    text = GROUP.replace(old, new, 1) if old else GROUP
    (folder / "base.toml").write_text(BASE, encoding="utf-8")
    return read_claims(claims_folder(folder, text), folder / "base.toml")


def test_what_is_read(tmp_path: Path) -> None:
    claims = read(tmp_path)
    better, alone = claims.all
    assert [str(value) for value in better.values] == ["a.loss", "b.loss", "worse.loss", "b.loss"]
    assert claims.only(("group",)) == claims.all and claims.only(("alone",)) == (alone,)
    with pytest.raises(ValueError, match=r"no claim or group is called 'betterr'.*'better'"):
        claims.only(("betterr",))
    assert len(claims.wanted) == 9  # three arms, three seeds; what both claims read is one run
    assert claims.arms["group", "worse"].plan.training.steps == 4


def test_a_run_is_known_on_any_corpus_and_by_its_seed(tmp_path: Path) -> None:
    arm = read(tmp_path).arms["group", "a"]
    runs = [arm.run(seed, {"hash": text}) for seed, text in ((0, "x" * 64), (0, "y" * 64), (1, "x" * 64))]
    assert runs[0].key != runs[1].key
    identities = [type(arm)("", run.plan, run.settings).identity(run.settings.seed) for run in runs]
    assert identities[0] == identities[1] == arm.identity(0)
    assert identities[2] == arm.identity(1) != arm.identity(0)


def test_a_number_may_have_a_dot(tmp_path: Path) -> None:
    claims = read(tmp_path, '{ of = "a.loss", within = 1 }', '{ of = "a.recovery@1.5", within = 1 }')
    assert claims.all[1].checks[0].of == Value("a", "recovery", 1.5)
    assert claims.all[1].checks[0].of.name == "recovery@1.5"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[arms.b]\n", "[arms.b]\nstep = 4\n", r"'step' in group.toml \[arms.b\].*steps"),
        ('moe = "4e2a", expert = 16, router = "softmax"', 'moe = "4e5a", expert = 16', r"group.toml \[arms.a\].*5 active of 4"),
        ("seeds = [0, 1, 2]", "seeds = [0, 1]", r"\[claims.better\].*at least 3"),
        ("seeds = [0, 1, 2]", "seeds = [1, 1, 1]", r"\[claims.better\].*at least 3"),
        ('of = "a.loss"', 'of = "c.loss"', r"'c.loss' is of no arm"),
        ('of = "a.loss"', 'of = "a.los"', r"'a.los' is no quantity.*loss"),
        ('of = "a.loss"', 'of = "loss"', r"'loss' is no value: write arm.quantity"),
        ('of = "a.loss"', 'of = "a.loss_at"', "loss_at needs a number"),
        ('of = "a.loss"', 'of = "a.loss@2"', "loss has no number"),
        ("below = 0.01", "under = 0.01", "'under'"),
        ("below = 0.01", "below = 0.01, above = 0", "one of below, above, within, apart"),
        ('controls = [{ of = "worse.loss", minus = "b.loss", above = 0.01 }]', "controls = []", "needs a check, and a control"),
        ("half_width = 0.02\n", "", r"\[claims.better\] needs half_width"),
        ("[claims.alone]", "[claims.alone]\nstrength = 1", "'strength'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(tmp_path, old, new)


def test_a_name_is_one_claims_alone(tmp_path: Path) -> None:
    read(tmp_path)
    (tmp_path / "claims" / "other.toml").write_text(GROUP, encoding="utf-8")
    with pytest.raises(ValueError, match="two claims are called"):
        read_claims(tmp_path / "claims", tmp_path / "base.toml")
