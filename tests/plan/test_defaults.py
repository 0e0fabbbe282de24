"""Defaults that nobody gave are in a plan's text, and in nothing else of it."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from mue.api import Plan
from mue.plan.defaults import differing, given_in, not_given
from mue.plan.toml import plan_inputs
from mue.plan.transfer import plan_of
from support.plan_file import SHORT
from support.plans import make

FULL = """
rule = "complete-mue"
base = { width = 128, ffn = 128, layers = 8, head_dim = 64, kv_heads = 2, vocab = 256, sequence = 1024, gated = true, tied = false, training = { batch = 64, steps = 9 } }
target = { width = 128, ffn = 128, layers = 8, heads = 2, kv_heads = 2, vocab = 256, sequence = 1024, gated = true, tied = false, training = { batch = 64, steps = 9 } }
[tuned]
lr = 1e-3
weight_decay = 0.1
init_std = 0.01
betas = [0.9, 0.95]
eps = 1e-12
optimizer = "adamw"
clip = 1.0
warmup = 0.05
floor = 0.0
balance = 0.0
z = 0.0
bias_speed = 1e-3
"""


def test_every_default_of_a_file_is_listed_with_its_value() -> None:
    said = not_given(plan_inputs(tomllib.loads(SHORT)))
    assert said.startswith(
        "rule complete-mue; [base] head_dim 64, kv_heads 2, vocab 256, sequence 1024, gated true, tied false;"
    )
    assert (
        "[target] head_dim 64, kv_heads 16, vocab 256, sequence 1024, gated true, tied false, router sigmoid, normalize true"
        in said
    )
    assert "[tuned] betas (0.9, 0.95), eps 1e-12, optimizer adamw, clip off, warmup 0.05" in said
    assert said.endswith("batch and duration are taken not to change")


@pytest.mark.parametrize("optimizer", ["adamw", "nadamw", "lion", "muon"])
def test_the_defaults_of_every_optimizer_have_a_text(optimizer: str) -> None:
    text = SHORT.replace("[target]", f'optimizer = "{optimizer}"\n[target]')
    said = not_given(plan_inputs(tomllib.loads(text)))
    assert ("muon_moves (attention, ffn, expert, shared)" in said) == (optimizer == "muon")
    assert ("adamw_lr 0.001, as lr" in said) == (optimizer == "muon")
    given = text.replace("[target]", "adamw_lr = 2e-3\n[target]")
    if optimizer == "muon":
        assert "adamw_lr" not in not_given(plan_inputs(tomllib.loads(given)))


def test_what_is_given_is_not_listed_whatever_its_value() -> None:
    assert not_given(plan_inputs(tomllib.loads(FULL))) == ""
    one = FULL.replace("eps = 1e-12\n", "")
    assert not_given(plan_inputs(tomllib.loads(one))) == "[tuned] eps 1e-12"


def test_a_sweeps_values_are_given_and_blocks_name_their_routers() -> None:
    data = tomllib.loads(SHORT)
    tuned = plan_inputs(data).tuned
    del data["tuned"]
    assert "[tuned]" not in not_given(plan_inputs(data, tuned))
    block = {"layers": 2, "moe": "4e2a", "expert": 8}
    routed = {**block, "router": "softmax"}
    assert "target.router" in given_in({"target": {"blocks": [routed, {"layers": 1, "ffn": 8}]}})
    assert "target.router" not in given_in({"target": {"blocks": [routed, block]}})


def test_it_is_text_only(tmp_path: Path) -> None:
    """The same numbers, given or not, are one plan with one hash; a plan of Python or of a saved file claims nothing."""
    inputs = plan_inputs(tomllib.loads(SHORT))
    ours, other = (Plan.of(plan_of(one)) for one in (inputs, replace(inputs, given=None)))
    assert ours.hash == other.hash and ours.to_dict() == other.to_dict() and ours.inputs == other.inputs
    line = dict(ours.header())["not given, so default"]
    assert "betas (0.9, 0.95)" in line and " ".join(line.split()) in " ".join(str(ours).split())
    assert "if you gave no other" not in dict(ours.header())["taken of the base"]
    for plan in (other, make()):
        assert "not given, so default" not in dict(plan.header())
        assert "if you gave no other" in dict(plan.header())["taken of the base"]
    ours.save(tmp_path / "plan.json")
    assert "given" not in json.loads((tmp_path / "plan.json").read_text())["inputs"]
    assert "not given, so default" not in dict(Plan.load(tmp_path / "plan.json").header())


BASE_HAS = (
    "[base]\nwidth = 128\nlayers = 8\nffn = 128\ngated = false\ntied = true\nsequence = 64\nheads = 8\nkv_heads = 8\n"
)
TARGET_HAS = '[target]\nmoe = "8e2a"\nwidth = 256\nexpert = 128\nlayers = 8\n'
VALUES = "[tuned]\nlr = 1e-3\nweight_decay = 0.1\ninit_std = 0.02\n"


def test_what_the_base_gives_and_the_target_leaves_out_with_another_value_is_the_first_note() -> None:
    plan = plan_of(plan_inputs(tomllib.loads(BASE_HAS + VALUES + TARGET_HAS)))
    said = (
        "[target] head_dim is not given and 64, [base] has 16: say which",
        "[target] sequence is not given and 1024, [base] has 64: say which",
        "[target] gated is not given and true, [base] has false: say which",
        "[target] tied is not given and false, [base] has true: say which",
    )
    assert differing(plan.inputs) == said == plan.notes[: len(said)]
    grouped = BASE_HAS.replace("kv_heads = 8", "kv_heads = 2")
    assert "[target] kv_heads is not given and 4, [base] has 2: say which" in differing(
        plan_inputs(tomllib.loads(grouped + VALUES + TARGET_HAS))
    )


def test_what_the_target_says_too_is_no_oversight_and_changes_no_plan() -> None:
    """The warning goes when the same values are said, and the plan is the same one."""
    unsaid = plan_inputs(tomllib.loads(BASE_HAS + VALUES + TARGET_HAS))
    given = "sequence = 1024\ngated = true\ntied = false\nhead_dim = 64\n"
    said = plan_inputs(tomllib.loads(BASE_HAS + VALUES + TARGET_HAS + given))
    assert differing(said) == () and plan_of(said).hash == plan_of(unsaid).hash
    assert differing(replace(unsaid, given=None)) == ()
    assert differing(plan_inputs(tomllib.loads(SHORT))) == ()
