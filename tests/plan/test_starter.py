"""Files that ``mue init`` begins: every line has its comment, and what is written reads back as what was meant."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from typing import Any

import pytest

import mue
from mue.plan import toml
from mue.plan.convention import Convention
from mue.plan.key_words import KEY_WORDS
from mue.plan.starter import Starter, proposed_base, toml_value
from mue.plan.toml import plan_inputs, shape_from
from mue.plan.transfer import plan_of

BASE = mue.Dense(64, 96, 3, head_dim=16, vocab=300, sequence=48, gated=False, tied=True)
RUN, LONG = mue.Training(4096, 100), mue.Training(8192, 300)
TUNED: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "init_std": 0.05}
SHAPES = [
    BASE,
    mue.Dense(64, 96, 3, heads=8, head_dim=16, kv_heads=2),
    mue.MoE.parse("8e2a1s", width=64, expert=24, shared=40, layers=2, head_dim=16, router="softmax"),
    mue.MoE.parse("8e2a", width=64, expert=24, layers=2, router="switch", router_settings={"capacity": 1.5}),
    mue.MoE.parse(
        "8e2a",
        width=64,
        expert=24,
        layers=2,
        gates="measured",
        gate_moments=(0.4, 0.2),
        normalize=False,
        router="softmax",
    ),
    mue.MoE.parse("8e2a2g1p", width=64, expert=24, layers=2),
    mue.Mixed(
        64, (mue.Block(layers=1, ffn=96), mue.Block(layers=2, experts=4, active=2, expert=24)), heads=4, head_dim=16
    ),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("runs", [(None, None), (RUN, LONG)], ids=["no runs", "runs"])
def test_a_plan_file_reads_back(shape: Any, runs: Any) -> None:
    text = Starter("plan", BASE, shape, *runs, TUNED).text()
    inputs = plan_inputs(tomllib.loads(text))
    assert inputs.base == BASE and inputs.target == shape
    assert (inputs.base_training, inputs.training) == runs
    assert inputs.tuned == mue.HParams(**TUNED) and inputs.convention == Convention()
    plan_of(inputs)


@pytest.mark.parametrize("kind", ["plan", "sweep", "train"])
def test_every_line_has_its_comment_in_plain_words(kind: str) -> None:
    tuned = {} if kind == "sweep" else TUNED
    text = Starter(kind, BASE, SHAPES[2], RUN, LONG, tuned, source="texts/").text()
    for line in text.splitlines():
        said = line.rpartition(" # ")[2] if " # " in line else line.removeprefix("# ") if line.startswith("# ") else ""
        assert not line or len(said.split()) >= 2, line
    # lines that are off are lines of the file all the same: taken in, they are read
    on = "\n".join(line.removeprefix("# ") for line in text.splitlines()[1:])
    data = tomllib.loads(on)
    if kind == "plan":
        inputs = plan_inputs({k: v for k, v in data.items() if k in toml.PLAN_TABLES})
        assert inputs.tuned is not None and inputs.tuned.clip == 1.0


def test_a_sweeps_rates_lie_around_the_one_in_mind() -> None:
    data = tomllib.loads(Starter("sweep", BASE, None, RUN, lr=0.02, source="t").text())
    assert data["sweep"]["lr"] == [0.005, 0.01, 0.02, 0.04, 0.08] and "target" not in data and "tuned" not in data


def test_a_proposed_base_is_alike_but_for_its_size() -> None:
    target = mue.MoE.parse("8e2a", width=1024, expert=256, layers=24, head_dim=64, vocab=999, sequence=512, tied=True)
    base = proposed_base(target)
    assert (base.width, base.ffn, base.layers) == (128, 128, 8)
    assert (base.head_dim, base.vocab, base.sequence, base.tied) == (64, 999, 512, True)
    assert proposed_base(mue.Dense(64, 64, 2, head_dim=32)).num_heads == 2
    mue.transfer(base, target, mue.HParams(**TUNED))


@pytest.mark.parametrize(
    "value", [True, 3, 1e-12, 'a "quoted" \\ word ν', [1, [2.5, "x"]], {"name": "x", "p": {"a": 1.0}}]
)
def test_values_read_back(value: Any) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_there_are_words_for_every_key_that_a_plan_file_reads() -> None:
    """The readers' own tables of keys are the list."""
    read = {
        "shape": {
            *toml.COMMON_KEYS,
            *toml.MOE_KEYS,
            "ffn",
            "blocks",
            "schedule",
            "output_multiplier",
            "training",
            "convention",
        },
        "tuned": set(toml.TUNED_KEYS),
        "convention": {f.name for f in fields(Convention)},
        "schedule": set(toml.SCHEDULE_KEYS),
        "training": {f.name for f in fields(mue.Training)},
    }
    for table, keys in read.items():
        assert set(KEY_WORDS[table]) == keys, table
    with pytest.raises(ValueError, match="unknown key"):  # negative control: what has no words is not read
        shape_from({"width": 64, "layers": 1, "ffn": 64, "wdth": 1}, "base")
