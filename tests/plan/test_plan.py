"""Plans: chained, compared, hashed, saved, printed, and made without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mue
from mue.rules.roles import ROLES

BASE = mue.Dense(width=128, ffn=128, layers=8)
TARGET = mue.MoE.parse("16e4a1s", width=256, expert=64, layers=8)
TUNED = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01)
RUNS: dict[str, Any] = {"base_training": mue.Training(1 << 16, 5000), "training": mue.Training(1 << 16, 20000)}


def make(**changes: Any) -> mue.Plan:
    numbers: dict[str, Any] = {"base": BASE, "target": TARGET, "tuned": TUNED, **RUNS, **changes}
    return mue.transfer(numbers.pop("base"), numbers.pop("target"), numbers.pop("tuned"), **numbers)


def test_the_dictionary_has_what_conventions_5_says() -> None:
    d = make().to_dict()
    top = {"rule", "hash", "active_width", "output_multiplier", "route_scale", "residual_multiplier", "head_multiplier"}
    assert top | {"betas", "drift", "roles", "blocks", "unchanged", "options", "inputs", "notes"} <= set(d)
    assert set(d["roles"]) == set(ROLES)
    for role, row in d["roles"].items():
        assert {"init_std", "lr", "weight_decay", "eps", "factor", "source", "status", "count", "init"} <= set(row), (
            role
        )
        assert set(row["factor"]) == {"init_std", "lr", "weight_decay", "eps"}
    assert d["roles"]["norm"]["init_std"] is None and d["roles"]["norm"]["weight_decay"] == 0
    assert d["roles"]["ffn_up"]["count"] == 0 and d["roles"]["expert_up"]["count"] == 16 * 8
    assert set(d["drift"]) == {"sigma0_experts", "sigma0_other", "up_gate"}
    assert set(d["unchanged"]) == {"optimizer", "clip", "warmup", "floor", "balance", "z", "bias_speed"}
    block = d["blocks"][0]
    assert {"layers", "active_width", "output_multiplier", "route_scale", "roles", "drift"} <= set(block)
    assert json.loads(json.dumps(d)) == d


def test_save_and_load(tmp_path: Path) -> None:
    for p in (make(), mue.transfer(make(), replace(TARGET, width=512)), make(head="paper", duration_exponent=0.3)):
        p.save(tmp_path / "plan.json")
        q = mue.Plan.load(tmp_path / "plan.json")
        assert q == p and q.to_dict() == p.to_dict() and not p.diff(q)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["plan.json"]  # nothing temporary is left


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["roles"]["head"].update(lr=1.0),
        lambda d: d["blocks"][0]["roles"]["head"].update(eps=1.0),
        lambda d: d.update(hash="0" * 16),
        lambda d: d.update(betas=[0.9, 0.99]),
        lambda d: d["unchanged"].update(clip=3.0),
        lambda d: d["inputs"]["tuned"].update(lr=2e-3),
        lambda d: d["inputs"]["target"].update(layers=9),
    ],
)
def test_an_edited_file_is_refused(edit: Any, tmp_path: Path) -> None:
    data = make().to_dict()
    edit(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="was edited or written by another version"):
        mue.Plan.load(tmp_path / "plan.json")


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match="does not exist"):
        mue.Plan.load(path)
    for text in ("", "[]", "3", "{}", '{"inputs": {}}', '{"inputs": 3}', "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a saved plan"):
            mue.Plan.load(path)


def test_the_hash_is_blind_to_key_order_and_formatting(tmp_path: Path) -> None:
    p = make(tuned=TUNED.replace(roles={"head": {"lr": 1e-3}, "embedding": {"lr": 3e-3, "eps": 1e-9}}))
    q = make(tuned=TUNED.replace(roles={"embedding": {"eps": 1e-9, "lr": 3e-3}, "head": {"lr": 1e-3}}))
    assert p.hash == q.hash

    def turned(data: Any) -> Any:
        if isinstance(data, dict):
            return {k: turned(v) for k, v in reversed(data.items())}
        return [turned(v) for v in data] if isinstance(data, list) else data

    (tmp_path / "turned.json").write_text(json.dumps(turned(p.to_dict()), indent=7, ensure_ascii=True))
    assert mue.Plan.load(tmp_path / "turned.json").hash == p.hash
    assert make(depth_exponent=1).hash == make(depth_exponent=None).hash == make(depth_exponent="1").hash


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"tuned": TUNED.replace(lr=1.1e-3)},
    "weight decay": {"tuned": TUNED.replace(weight_decay=0.2)},
    "init": {"tuned": TUNED.replace(init_std=0.011)},
    "eps": {"tuned": TUNED.replace(eps=1e-11)},
    "beta": {"tuned": TUNED.replace(betas=(0.9, 0.951))},
    "role": {"tuned": TUNED.replace(roles={"head": {"lr": 2e-3}})},
    "clip": {"tuned": TUNED.replace(clip=1.0)},
    "warmup": {"tuned": TUNED.replace(warmup=0.06)},
    "floor": {"tuned": TUNED.replace(floor=0.1)},
    "balance": {"tuned": TUNED.replace(balance=0.01)},
    "z": {"tuned": TUNED.replace(z=0.01)},
    "bias speed": {"tuned": TUNED.replace(bias_speed=2e-3)},
    "optimizer": {"tuned": TUNED.replace(optimizer="nadamw")},
    "rule": {"rule": "complete-mue-paper"},
    "depth exponent": {"depth_exponent": 0.5},
    "duration exponent": {"duration_exponent": 0.3},
    "weight decay width": {"weight_decay_width": "none"},
    "head": {"head": "paper"},
    "betas option": {"betas": "power"},
    "correction": {"up_gate_correction": True},
    "base width": {"base": replace(BASE, width=192)},
    "base ffn": {"base": replace(BASE, ffn=64)},
    "base multiplier": {"base": replace(BASE, output_multiplier=0.5)},
    "experts": {"target": replace(TARGET, experts=32)},
    "groups": {"target": replace(TARGET, groups=2)},
    "layers": {"target": replace(TARGET, layers=9)},
    "vocabulary": {"target": replace(TARGET, vocab=257)},
    "sequence": {"target": replace(TARGET, sequence=99)},
    "tied": {"target": replace(TARGET, tied=True)},
    "steps": {"training": mue.Training(1 << 16, 20001)},
    "batch": {"training": mue.Training(1 << 17, 20000)},
    "convention": {"convention": mue.Convention(attention_scale="1/d")},
    "decay form": {"convention": mue.Convention(weight_decay="independent")},
    "depth-scaled init": {"convention": mue.Convention(depth_scaled_init=True)},
}


def test_the_hash_changes_with_every_meaningful_number() -> None:
    hashes = {name: make(**change).hash for name, change in CHANGES.items()}
    hashes["nothing"] = make().hash
    assert len(set(hashes.values())) == len(hashes), "two different plans share a hash"
    assert len(make().hash) == 16


def test_diff_names_what_differs() -> None:
    p, q = make(), make(tuned=TUNED.replace(lr=2e-3, clip=1.0))
    paths = {path for path, _, _ in p.diff(q)}
    assert "roles.head.lr" in paths and "unchanged.clip" in paths
    assert not any("init_std" in path or "factor" in path for path in paths)
    assert p.diff(make()) == []


def test_retuned_and_scaled_follow_through_a_chain() -> None:
    chain = mue.transfer(make(tuned=TUNED.replace(roles={"head": {"lr": 5e-4}})), replace(TARGET, width=512))
    double = chain.scaled(2)
    for role in ROLES:
        before, after = chain.roles[role].values, double.roles[role].values
        assert after.lr == (None if before.lr is None else pytest.approx(2 * before.lr))
        assert after.weight_decay == before.weight_decay and after.init_std == before.init_std
    assert chain.retuned(weight_decay=0.2).roles["head"].values.weight_decay == pytest.approx(0.1)
    assert chain.retuned(lr=2e-3).roles["head"].values.lr == chain.roles["head"].values.lr  # its own rate


def test_a_plan_as_base_brings_its_own_values() -> None:
    p = make()
    for change in ({"tuned": TUNED}, {"base_training": RUNS["training"]}, {"convention": mue.Convention("1/d")}):
        with pytest.raises(ValueError, match="leave them out"):
            mue.transfer(p, TARGET, change.get("tuned"), **{k: v for k, v in change.items() if k != "tuned"})
    alone = mue.transfer(BASE, TARGET, TUNED)
    with pytest.raises(ValueError, match="the base plan has none"):
        mue.transfer(alone, TARGET, training=RUNS["training"])
    with pytest.raises(ValueError, match="tuned is missing"):
        mue.transfer(BASE, TARGET)
    mixed = mue.Mixed(256, (mue.Block(layers=1, ffn=64), mue.Block(layers=1, ffn=128)))
    with pytest.raises(ValueError, match="blocks differ"):
        mue.transfer(mue.transfer(BASE, mixed, TUNED), TARGET)
    with pytest.raises(ValueError, match="no single e"):
        mue.transfer(mixed, TARGET, TUNED)


def test_conventions_of_the_base() -> None:
    stock = make()
    independent = make(tuned=TUNED.replace(weight_decay=1e-4), convention=mue.Convention(weight_decay="independent"))
    assert independent.roles["head"].values.weight_decay == stock.roles["head"].values.weight_decay
    scaled = make(convention=mue.Convention(depth_scaled_init=True))
    for role in ("attention_o", "expert_down", "attention_q"):
        ratio = scaled.roles[role].values.init_std / stock.roles[role].values.init_std  # type: ignore[operator]
        assert ratio == pytest.approx(1 if role == "attention_q" else 0.25)
    assert make(convention=mue.Convention(attention_scale=0.3)).attention_scale == 0.3
    assert stock.attention_scale == 64**-0.5
    other_heads = make(target=replace(TARGET, head_dim=32), convention=mue.Convention("1/d"))
    assert other_heads.attention_scale == pytest.approx(1 / 32)  # (1/64)·(64/32)
    assert make(target=replace(TARGET, head_dim=32)).attention_scale == pytest.approx(64**-0.5 * 2)


def test_a_matrix_whose_fan_in_is_not_the_width_uses_its_own_ratio() -> None:
    """Conventions 8: o_proj reads heads·head_dim."""
    target = replace(TARGET, head_dim=32, heads=4)
    p = mue.transfer(BASE, target, TUNED)
    assert p.roles["attention_o"].factor.lr == 1 and p.roles["attention_q"].factor.lr == 0.5


def test_roles_are_looked_up_by_layer() -> None:
    mixed = mue.Mixed(256, (mue.Block(layers=1, ffn=128), mue.Block(layers=2, expert=64, experts=8, active=4)))
    p = mue.transfer(BASE, mixed, TUNED)
    assert p.role("ffn_down", 0).count == 1 and p.role("expert_down", 2).count == 16
    assert p.per_layer == (p.blocks[0], p.blocks[1], p.blocks[1]) and [p.block_of(i) for i in range(3)] == [0, 1, 1]
    assert p.output_multiplier is None and p.multipliers.output == (2.0, 1.0, 1.0) and p.multipliers.route == (1, 4, 4)
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        p.role("norm", 3)
    with pytest.raises(ValueError, match="did you mean 'expert_down'"):
        p.role("expert_don")


def test_a_block_whose_router_has_no_matrix_has_none_in_its_plan() -> None:
    hashed, scored = (mue.Block(layers=1, expert=64, experts=8, active=2, router=r) for r in ("hash", "softmax"))
    p = mue.transfer(BASE, mue.Mixed(256, (hashed, scored)), TUNED)
    assert [p.role("router", layer).count for layer in (0, 1)] == [0, 1]
    assert [p.role("router_bias", layer).count for layer in (0, 1)] == [0, 1]


def test_printed_plans_show_everything() -> None:
    text = str(make())
    for role, plan in make().roles.items():
        assert (f"\n{role} " in text) == (plan.count > 0), role
    assert "(not derived)" not in text and "ρ_d^-1/2 · ρ_e^1/2" in text and "inferred" in text
    header, rows = make().table()
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) == len(header)
    assert header[-2:] == ["marks", "source"]
    marks = {row[0]: row[-2] for row in rows}
    assert marks["expert_down"] == marks["router"] == "P P I I" and marks["embedding"] == "I I I I"
    assert marks["norm"] == "– I I I" and "P published" in text and "C authors' code" in text
    literal = make(weight_decay_width="none", up_gate_correction=True).roles["expert_up"].marks
    assert literal["weight_decay"] == "published" and literal["lr"] == "inferred"
    assert make(tuned=TUNED.replace(optimizer="lion")).roles["expert_up"].marks["lr"] == "inferred"


def test_notes_warn() -> None:
    one = make(target=mue.MoE.parse("16e1a", width=256, expert=64, layers=8))
    assert any("router gets no gradient" in note for note in one.notes)
    assert not make().notes
    assert any("kv heads" in n for n in make(target=replace(TARGET, kv_heads=2)).notes)
    assert any("gated" in n for n in make(target=replace(TARGET, gated=False)).notes)
    tied = make(rule="complete-mue-paper", target=replace(TARGET, tied=True))
    assert any("the embedding row wins" in n for n in tied.notes)
    for other, noted in (({"rule": "complete-mue"}, False), ({"rule": "complete-mue", "head": "paper"}, True)):
        same = mue.transfer(BASE, replace(TARGET, tied=True), TUNED, **other)
        assert any("the embedding row wins" in n for n in same.notes) == noted
    with pytest.raises(ValueError, match="leave it out"):
        make(target=replace(TARGET, output_multiplier=0.3))


PLANNING = """
import mue
base = mue.Dense(width=128, ffn=128, layers=8)
target = mue.MoE.parse("256e8a1s", width=4096, expert=2048, layers=128)
plan = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01))
str(plan), plan.to_dict()
"""


def test_planning_imports_no_torch() -> None:
    def imported(code: str) -> set[str]:
        run = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
        )
        return {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "import time" in line}

    found = imported(PLANNING)
    assert "mue.plan.plan" in found and not {m for m in found if m.split(".")[0] in ("torch", "numpy")}
    assert "torch" in imported("import mue\nmue.Layout")  # control: the layout of a model does need it


def test_a_base_with_experts_says_which_route_scale_it_stands_for() -> None:
    base = mue.MoE.parse("16e4a", width=128, expert=64, layers=8)
    assert any("tuned with R = 4" in note for note in make(base=base).notes)
    assert not make(base=base, rule="standard").notes
    chain = mue.transfer(make(), TARGET)  # a plan says itself what it is
    assert not any("R = 4" in note for note in chain.notes)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (mue.Block(layers=1, ffn=512), "active width"),
        (mue.Block(layers=1, ffn=256), "width of one expert"),
        (mue.Block(layers=1, expert=64, experts=16, active=4), "number of experts"),
    ],
)
def test_a_base_whose_blocks_differ_is_refused(other: mue.Block, what: str) -> None:
    first = mue.Block(layers=1, expert=64, experts=8, active=4)
    mue.transfer(mue.Mixed(256, (first, first)), TARGET, TUNED)
    with pytest.raises(ValueError, match=f"differ in their {what}.*no single e"):
        mue.transfer(mue.Mixed(256, (first, other)), TARGET, TUNED)
