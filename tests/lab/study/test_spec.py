"""A study's file: what it means where it is silent, and what it says of a mistake."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from mue.lab.study.shipped import shipped_study
from mue.lab.study.spec import BASE, study_from
from mue.plan.transfer import transfer
from mue.shapes import Dense, MoE
from support.study import STUDY, study


def test_every_axis_has_the_base_and_a_target_changes_only_what_it_says() -> None:
    spec = study()
    assert [(t.axis, t.name) for t in spec.targets] == [
        ("width", BASE), ("width", "width 64, ffn 64"), ("experts", BASE), ("experts", "moe 4e2a, expert 32")
    ]  # fmt: skip
    _, wide, base, experts = (t.shape for t in spec.targets)
    assert base == spec.base and isinstance(base, Dense)
    assert isinstance(wide, Dense) and (wide.width, wide.ffn, wide.layers, wide.sequence) == (64, 64, 1, 32)
    # a MoE keeps nothing of the base's dense feed-forward, and the rest of the base
    assert isinstance(experts, MoE) and (experts.width, experts.active_width, experts.head_dim) == (32, 64, 16)


def test_an_approach_is_a_transfer_by_its_rule_and_a_law_multiplies_the_rate() -> None:
    spec = study()
    cells = {(c.target.name, c.approach.name): c for c in spec.cells()}
    wide = cells["width 64, ffn 64", "complete-mue"]
    by_hand = transfer(
        spec.base, wide.target.shape, spec.tuned, base_training=spec.training, training=wide.target.training
    )
    assert wide.plan is not None and wide.plan.hash == by_hand.hash
    law = cells["width 64, ffn 64", "step-law"]
    # (N / N*)^-0.713 at the same tokens, N counted by hand without embedding and head: 7 matrices d x d, norms, QK-norm
    sizes = [7 * d * d + 3 * d + 2 * 16 for d in (32, 64)]
    assert law.plan is not None and law.plan.tuned.lr == pytest.approx(0.008 * (sizes[1] / sizes[0]) ** -0.713)
    assert law.multipliers == (1.0,) and law.reach == 1.0


def test_a_rule_without_an_answer_is_a_cell_that_says_why() -> None:
    refused = [c for c in study().cells() if c.plan is None]
    assert [(c.approach.name, c.target.name) for c in refused] == [("mup", "moe 4e2a, expert 32")]
    assert "mup" in refused[0].refused and "expert" in refused[0].refused


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["complete-mue", "mup"]', '["complete-mue", "mupp"]', "unknown approach 'mupp'.*mup"),
        ("multipliers = [0.5, 1, 2]", "multipliers = [0.5, 2]", "must have 1 among them"),
        ("seeds = [0, 1]", "seeds = 2", "seeds must be a list of whole numbers, got 2"),
        ('law = "step-law"', 'law = "zhang"', "sets no learning rate but critical batch"),
        ('law = "step-law"', 'law = "steplaw"', "unknown fitted law 'steplaw'.*step-law"),
        ("[axes.width]\ntargets = [{", "[axes.width]\ntargets = [{ widht = 3,", "unknown key 'widht'.*width"),
        ("reach = 4", "reach = 0", "reach must be greater than 0"),
        ("reach = 4", "raech = 4", "unknown key 'raech'.*reach"),
        # the file's own mistakes, which were once told as targets that the rule has no answer to
        (
            "[approaches.mup]",
            "[approaches.mup.options]\nheads = 'paper'",
            r"unknown key 'heads'.*head",
        ),
        ("[approaches.mup]", "[approaches.mup]\nrule = 'mupp'", r"\[approaches.mup\].*'mupp'.*mup"),
        ("[approaches.mup]", "[approaches.mup.tuned.roles.norms]\nlr_times = 2", "unknown role 'norms'.*'norm'"),
        ("[base.training]\nbatch = 64\nsteps = 20\n", "", r"\[base.training\]"),
        ("[tuned]\nlr = 0.008\nweight_decay = 0.1\ninit_std = 0.1\n", "", r"needs a \[tuned\] table"),
    ],
)
def test_a_mistake_is_named(old: str, new: str, words: str) -> None:
    assert old in STUDY
    with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
        study_from(tomllib.loads(STUDY.replace(old, new)), Path("/somewhere"))


def test_only_the_axes_asked_for() -> None:
    assert study().on(("experts",)).axes == ("experts",)
    assert study().on(()).axes == ("width", "experts")
    with pytest.raises(ValueError, match=r"no axis .wdth.*width"):
        study().on(("wdth",))


@pytest.mark.parametrize("small", [False, True])
def test_the_shipped_studies_plan(small: bool, tmp_path: Path) -> None:
    spec = study_from(shipped_study(small=small, cache=tmp_path), tmp_path)
    assert "width" in spec.axes and {"complete-mue", "hidden-ratio-only", "standard"} <= set(spec.approaches)
    assert all(c.plan is not None for c in spec.cells() if c.approach.name in ("complete-mue", "standard"))
