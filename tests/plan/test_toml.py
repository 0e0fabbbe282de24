"""Plan files: what they mean, and one clear line for everything that is wrong with one."""

from __future__ import annotations

import codecs
import tomllib
from pathlib import Path
from typing import Any

import pytest

import mue
from mue.plan.toml import lr_grid, plan_inputs, read_toml, shape_from, training_from
from mue.plan.transfer import plan_of
from support.plan_file import PLAN as FILE
from support.sde import SDE


def inputs(text: str) -> Any:
    return plan_inputs(tomllib.loads(text))


def test_the_file_of_the_readme() -> None:
    made = inputs(FILE)
    expected = mue.transfer(
        mue.Dense(width=128, ffn=128, layers=8),
        mue.MoE.parse("128e8a1s", width=1024, expert=1024, layers=8),
        mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01),
        base_training=mue.Training(524288, 25000),
        training=mue.Training(524288, 100000),
    )
    assert plan_of(made) == expected
    assert plan_of(inputs(FILE.replace("1e-3", "2e-3"))) != expected


def test_everything_a_file_may_say() -> None:
    text = """
    rule = "complete-mue"
    [base]
    width = 128
    ffn = 512
    layers = 4
    head_dim = 32
    heads = 4
    kv_heads = 2
    vocab = 300
    sequence = 64
    gated = false
    tied = true
    output_multiplier = 0.25
    [base.convention]
    attention_scale = "1/d"
    weight_decay = "independent"
    depth_scaled_init = true
    [tuned]
    lr = 1e-3
    weight_decay = 1e-4
    init_std = 0.01
    betas = [0.9, 0.98]
    eps = 1e-9
    optimizer = "adamw"
    clip = 1.0
    warmup = 0.1
    floor = 0.1
    balance = 0.01
    z = 0.001
    bias_speed = 0.002
    [tuned.roles.embedding]
    lr = 3e-3
    [options]
    depth_exponent = 0.5
    duration_exponent = 0.3
    weight_decay_width = "sqrt-width"
    head = "paper"
    betas = "power"
    up_gate_correction = true
    [target]
    width = 256
    head_dim = 32
    vocab = 300
    sequence = 64
    gated = false
    tied = true
    kv_heads = 4
    [[target.blocks]]
    layers = 1
    ffn = 1024
    [[target.blocks]]
    layers = 3
    moe = "8e2a1s"
    expert = 128
    shared = 64
    gates = "measured"
    gate_moments = [0.9, 0.5]
    """
    p = plan_of(inputs(text))
    assert [b.notation for b in p.blocks] == ["dense", "8e2a1s"]
    assert p.roles["embedding"].values.lr == pytest.approx(3e-3)
    assert p.attention_scale == pytest.approx(1 / 32) and p.unchanged["clip"] == 1.0
    assert p.to_dict()["options"] == {
        "depth_exponent": "1/2",
        "duration_exponent": "3/10",
        "weight_decay_width": "sqrt-width",
        "head": "paper",
        "betas": "power",
        "up_gate_correction": True,
        "batch_exponent": "7/20",
        "weight_decay_run": "unchanged",
    }


BY_SDE = "[options]\n" + "".join(f"{name} = '{value}'\n" for name, value in SDE.items())


def edit(old: str, new: str) -> str:
    assert old in FILE
    return FILE.replace(old, new)


BASE, TARGET = "[base]\nwidth = 128", "[target]\n"
BAD: list[tuple[str, str]] = [
    (
        edit('rule = "complete-mue"', 'rules = "complete-mue"'),
        "unknown key 'rules' in the file's top level; did you mean 'rule'",
    ),
    (
        edit('rule = "complete-mue"', 'rule = "complete-muE"'),
        "unknown rule 'complete-muE'; did you mean 'complete-mue'",
    ),
    (edit("[tuned]", "[tunes]"), "unknown key 'tunes'.*did you mean 'tuned'"),
    (FILE + "[training]\nbatch = 1\n", r"did you mean \[target.training\] or \[base.training\]\?"),
    (edit('moe = "128e8a1s"', 'notation = "128e8a1s"'), r"'notation' in \[target\]; did you mean 'moe'\?"),
    (FILE + "[options]\nnotation = 1\n", r"unknown key 'notation' in \[options\]; (did you mean '(?!moe)|known)"),
    (edit("init_std", "init_sdt"), r"unknown key 'init_sdt' in \[tuned\]; did you mean 'init_std'"),
    (edit("ffn = 128", "fnn = 128"), r"unknown key 'fnn' in \[base\]; did you mean 'ffn'"),
    (edit("expert = 1024", "experts = 1024"), r"unknown key 'experts' in \[target\]; did you mean 'expert'"),
    (edit("[base.training]", "[base.trainings]"), "unknown key 'trainings'.*did you mean 'training'"),
    (edit("steps = 25000", "step = 25000"), r"unknown key 'step' in \[base.training\]; did you mean 'steps'"),
    (
        FILE + "[options]\ndepth_exponnent = 1\n",
        r"unknown key 'depth_exponnent' in \[options\]; did you mean 'depth_exponent'",
    ),
    (edit("[tuned]", "[tuned.roles.embeding]\nlr = 1\n[tuned]"), "unknown role 'embeding'.*did you mean 'embedding'"),
    (edit("[tuned]", "[tuned.roles.head]\nlrate = 1\n[tuned]"), "unknown key 'lrate' in tuned.roles.head"),
    (edit("[tuned]", "[tuned.roles.norm]\ninit_std = 1\n[tuned]"), "gains start at 1"),
    (edit("[tuned]", "[base.convention]\nattention = 1\n[tuned]"), r"unknown key 'attention' in \[base.convention\]"),
    (edit("[tuned]", '[base.convention]\nweight_decay = "l2"\n[tuned]'), "convention weight_decay must be one of"),
    (edit("[tuned]", '[base.convention]\nattention_scale = "d"\n[tuned]'), "attention_scale must be one of"),
    (edit("[tuned]", "[base.convention]\nattention_scale = 0\n[tuned]"), "attention_scale must be greater than 0"),
    (edit("[tuned]", "[base.convention]\ndepth_scaled_init = 1\n[tuned]"), "depth_scaled_init must be true or false"),
    (edit("128e8a1s", "8e16a"), "16 active of 8 experts"),
    (edit("128e8a1s", "128e8a3g"), "3 groups must divide both the 128 experts and the 8 active ones"),
    (edit("128e8a1s", "128e8a16g"), "16 groups must divide"),
    (edit("128e8a1s", "128x"), "unknown suffix 'x'"),
    (edit("width = 1024", "width = 0"), "width must be a whole number of at least 1, got 0"),
    (edit("width = 1024", "width = -1024"), "width must be"),
    (edit("width = 1024", "width = 1000"), "width 1000 is not divisible by head_dim 64"),
    (edit("width = 1024", "width = 1024\nheads = 7"), "width 1024 is not divisible by 7 heads"),
    (edit("width = 1024", "width = 1024.5"), "width must be"),
    (edit("lr = 1e-3", "lr = 0.0"), "lr must be greater than 0"),
    (edit("lr = 1e-3", "lr = -1.0"), "lr must be greater than 0"),
    (edit("lr = 1e-3", "lr = nan"), "lr must be a finite number, got nan"),
    (edit("lr = 1e-3", "lr = inf"), "lr must be a finite number, got inf"),
    (edit("lr = 1e-3", 'lr = "fast"'), "lr must be a finite number, got 'fast'$"),
    (
        edit("lr = 1e-3", 'lr = "1e-3"'),
        r"lr must be .* got '1e-3', which is text: leave the quotes out \(in YAML: 0.001\)",
    ),
    (edit("layers = 8", 'layers = "8"'), "layers must be .* got '8', which is text: leave the quotes out"),
    (edit("steps = 25000", 'steps = "25e3"'), "training steps must be .* leave the quotes out"),
    (edit("weight_decay = 0.1", "weight_decay = -0.1"), "weight_decay must be at least 0"),
    (edit("weight_decay = 0.1\n", ""), r"\[tuned\] needs 'weight_decay'"),
    (edit("[target.training]\nbatch = 524288\nsteps = 100000\n", ""), "base_training is given without training"),
    (edit("[base.training]\nbatch = 524288\nsteps = 25000\n", ""), "training is given without base_training"),
    (edit("[target.training]\nbatch = 524288\n", "[target.training]\n"), r"\[target.training\] needs 'batch'"),
    (edit("steps = 25000", "steps = 0"), r"training steps must be"),
    (edit("steps = 100000", "steps = 2000") + BY_SDE, r"beta1 = 0\.9 cannot be carried.*at least 2,501 steps"),
    (edit('moe = "128e8a1s"', 'moe = "128e8a1s"\nrouter = "softmax"\nnormalize = false'), 'gates = "measured"'),
    (edit('moe = "128e8a1s"', 'moe = "128e8a1s"\nffn = 3'), r"\[target\] has ffn and moe"),
    (edit('moe = "128e8a1s"\n', ""), r"\[target\] needs ffn \(dense\) or moe and expert"),
    (edit("expert = 1024\n", ""), r"\[target\] needs 'expert'"),
    (edit("layers = 8\n[base.training]", "[base.training]"), r"\[base\] needs 'layers'"),
    (edit(BASE, "[base]"), r"\[base\] needs 'width'"),
    (edit("[target]\nmoe", "[target]\noutput_multiplier = 1.0\nmoe"), r"unknown key 'output_multiplier' in \[target\]"),
    ("rule = 'standard'", r"needs a \[base\] table"),
    ("base = 3", r"\[base\] must be a table, got 3"),
    (FILE + "[[target.blocks]]\nlayers = 8\nffn = 8\n", r"\[target\] has moe and \[\[target.blocks\]\]"),
    (FILE + "[options]\nhead = 1\n", "head must be one of"),
    (
        edit('"complete-mue"', '"complete-mue-paper"') + '[options]\nhead = "paper"\n',
        "'complete-mue-paper' has no option head",
    ),
    (edit('"complete-mue"', '"mup"'), "µP as published has no answer for experts"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_files_say_what_is_wrong_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        plan_of(inputs(text))
    assert "\n" not in str(error.value)


def test_blocks_of_a_file() -> None:
    text = """
    [base]
    width = 128
    ffn = 128
    layers = 2
    [tuned]
    lr = 1e-3
    weight_decay = 0.1
    init_std = 0.01
    [target]
    width = 128
    layers = 4
    [[target.blocks]]
    layers = 1
    ffn = 256
    [[target.blocks]]
    layers = 3
    moe = "8e2a"
    expert = 64
    """
    p = plan_of(inputs(text))
    assert p.output_multiplier is None and p.blocks[0].output_multiplier == 0.5 and p.blocks[1].output_multiplier == 1
    for old, new, message in (
        ("layers = 4", "layers = 5", "layers = 5, but its blocks have 4"),
        ("ffn = 256", "fnn = 256", "unknown key 'fnn'"),
        ("layers = 1", "", "needs 'layers'"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs(text.replace(old, new))


def test_tuned_values_come_from_one_place() -> None:
    data = tomllib.loads(FILE)
    tuned = mue.HParams(lr=5e-4, weight_decay=0.2, init_std=0.02)
    with pytest.raises(ValueError, match="use one of them"):
        plan_inputs(data, tuned)
    without = {k: v for k, v in data.items() if k != "tuned"}
    assert plan_of(plan_inputs(without, tuned)).tuned == tuned
    with pytest.raises(ValueError, match=r"needs a \[tuned\] table"):
        plan_inputs(without)


def test_files_that_are_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_toml(tmp_path / "none.toml")
    for name, content in (("bad.toml", b"a = = 1"), ("binary.toml", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a TOML file"):
            read_toml(tmp_path / name)
    with pytest.raises(ValueError, match="not a TOML file"):
        read_toml(tmp_path)
    for line, content in (("lr = .001", "a = 1\n  lr = .001 \n"), ("gated = True", "gated = True")):  # Python's habits
        (tmp_path / "habit.toml").write_text(content)
        with pytest.raises(ValueError, match=rf"not a TOML file: .*at line \d.*: {line}$"):
            read_toml(tmp_path / "habit.toml")
    (tmp_path / "good.toml").write_text(FILE)
    assert plan_of(plan_inputs(read_toml(tmp_path / "good.toml"))).active_width == 9 * 1024


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_byte_order_mark_and_lines_of_windows_are_no_part_of_a_file(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(mark + FILE.replace("\n", "\r\n").encode())
    plan = plan_of(plan_inputs(read_toml(tmp_path / "a.toml")))
    assert plan == plan_of(inputs(FILE))
    plan.save(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(mark + (tmp_path / "plan.json").read_bytes())
    assert mue.Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "a.toml").write_text(FILE, encoding="utf-16")
    with pytest.raises(ValueError, match="this is UTF-16: save it as UTF-8"):
        read_toml(tmp_path / "a.toml")


def test_grids() -> None:
    assert lr_grid([3, 1, 1.0], "sweep.lr") == [1, 3]
    assert lr_grid([0], "sweep.weight_decay") == [0]
    for bad in ([], 3, [0], ["a"]):
        with pytest.raises(ValueError, match=r"sweep\.lr"):
            lr_grid(bad, "sweep.lr")


def test_a_saved_plan_is_said_to_be_none_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{\n "format": 2\n}')
    with pytest.raises(ValueError, match=r"plan\.json is not a TOML file.*it is JSON.*reads the TOML it was made from"):
        read_toml(tmp_path / "plan.json")
    (tmp_path / "a.toml").write_text("a = {\n")
    with pytest.raises(ValueError) as caught:
        read_toml(tmp_path / "a.toml")
    assert "JSON" not in str(caught.value)


def test_a_router_is_a_name_or_a_table_with_settings() -> None:
    plain = inputs(FILE).target
    for text in (
        FILE + '[target.router]\nname = "sigmoid"\nlosses = { entropy = 1e-3 }\n',
        FILE.replace("[target]", '[target]\nrouter = { name = "sigmoid", losses = { entropy = 1e-3, router_z = 0 } }'),
        FILE.replace("moe = ", 'router.name = "sigmoid"\nrouter.losses.entropy = 1e-3\nmoe = '),
    ):
        target = inputs(text).target
        assert target.router == "sigmoid" and target.router_settings == {"losses": {"entropy": 1e-3}}
        assert target != plain == mue.shapes.shape_from_dict({**target.to_dict(), "router_settings": {}})
    blocks = '[[target.blocks]]\nlayers = 2\nmoe = "8e2a"\nexpert = 64\nrouter = { name = "softmax", losses = { entropy = 1 } }'
    mixed = FILE.partition("[target]")[0] + "[target]\nwidth = 128\n" + blocks
    assert inputs(mixed).target.blocks[0].router_settings == {"losses": {"entropy": 1.0}}
    for wrong, message in (
        ("[target.router]\nlosses = {}\n", r"the table router of \[target\] needs 'name'"),
        ('[target.router]\nname = "sigmoid"\np = 0.3\n', "the sigmoid router has no setting 'p'"),
        ('[target.router]\nname = "sigmoyd"\n', "unknown router 'sigmoyd'; did you mean 'sigmoid'"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs(FILE + wrong)


def test_moments_may_be_said_layer_by_layer() -> None:
    """Neighbours with one pair are one block; the wrong number of pairs is an error."""
    plain = FILE.replace("[target]", '[target]\ngates = "measured"\ngate_moments = PAIRS')
    pairs = [[1.0, 0.2]] * 5 + [[0.9, 0.2]] * 3
    said = inputs(plain.replace("PAIRS", str(pairs))).target
    assert [(b.layers, b.gate_moments) for b in said.blocks] == [(5, (1.0, 0.2)), (3, (0.9, 0.2))]
    one = inputs(plain.replace("PAIRS", "[1.0, 0.2]")).target
    assert said.layers == one.layers == 8 and said.width == one.width
    blocks = "[[target.blocks]]\nlayers = 2\nmoe = '8e2a'\nexpert = 64\ngates = 'measured'\ngate_moments = [[1, 0.6], [1, 0.5]]"
    mixed = inputs(FILE.partition("[target]")[0] + "[target]\nwidth = 128\n" + blocks).target
    assert [(b.layers, b.gate_moments) for b in mixed.blocks] == [(1, (1.0, 0.6)), (1, (1.0, 0.5))]
    with pytest.raises(ValueError, match=r"gate_moments of \[target\] has 7 pairs for 8 layers"):
        inputs(plain.replace("PAIRS", str(pairs[1:])))


def test_what_a_shape_refuses_names_the_table() -> None:
    """A file has several tables with the same keys, and the numbers know none of them."""
    dense, moe = {"width": 64, "ffn": 64, "layers": 2}, {"moe": "8e2a", "expert": 32}
    odd = "width 100 is not divisible by head_dim 64 \\(the default\\): change one"
    with pytest.raises(ValueError, match=rf"^\[target\]: {odd}"):
        shape_from({**dense, "width": 100}, "target")
    with pytest.raises(ValueError, match=r"^\[base\]: width 100 is not divisible by head_dim 32: "):
        shape_from({**dense, "width": 100, "head_dim": 32}, "base")
    blocks = [{"layers": 1, "ffn": 64}, {"layers": 3, **moe, "expert": 0}]
    with pytest.raises(ValueError, match=r"^\[\[target.blocks\]\] 2: expert must be a whole number"):
        shape_from({"width": 64, "blocks": blocks}, "target")
    with pytest.raises(ValueError, match=r"^\[target.training\]: training steps must be"):
        training_from({"training": {"batch": 64, "steps": 0}}, "target")
    with pytest.raises(ValueError, match=r"^\[target\] needs 'width'$"):  # named once, where it is named already
        shape_from({}, "target")
