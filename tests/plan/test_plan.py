"""A plan as data: its dictionary, files and hash, what differs between two, roles by layer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mue
from mue.rules.roles import ROLES
from support.paths import ROOT
from support.plans import BASE, TARGET, TUNED, make

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def test_the_dictionary_has_what_the_glossary_says() -> None:
    d = make().to_dict()
    top = {"rule", "hash", "active_width", "output_multiplier", "route_scale", "residual_multiplier", "head_multiplier"}
    assert top | {"betas", "drift", "roles", "blocks", "unchanged", "options", "inputs", "notes"} <= set(d)
    assert set(d["roles"]) == {name for name, role in ROLES.items() if role.task is None}
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
    told = set(re.findall(r"`(\w+)`", GLOSSARY.partition("## The fields of a plan")[2]))
    assert set(d) | set(d["roles"]["head"]) | set(block) | set(d["drift"]) <= told


def test_save_and_load(tmp_path: Path) -> None:
    for p in (make(), mue.transfer(make(), replace(TARGET, width=512)), make(head="paper", duration_exponent=0.3)):
        p.save(tmp_path / "plan.json")
        q = mue.Plan.load(tmp_path / "plan.json")
        assert q == p and q.to_dict() == p.to_dict() and not p.diff(q)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["plan.json"]  # nothing temporary is left


def test_a_file_of_format_1_keeps_its_meaning(tmp_path: Path) -> None:
    """Up to format 1 heads without head_dim meant heads of 64; what is written today says the size itself."""
    path, wide = tmp_path / "plan.json", replace(TARGET, heads=2, head_dim=64)
    plan = mue.transfer(mue.transfer(replace(BASE, heads=1, head_dim=64), wide, TUNED), replace(wide, width=512))
    old = plan.to_dict()
    assert old["format"] == 2
    old["format"] = 1
    for shape in (
        old["inputs"]["base"]["plan"]["base"],
        old["inputs"]["base"]["plan"]["target"],
        old["inputs"]["target"],
    ):
        assert shape.pop("head_dim") == 64
    path.write_text(json.dumps(old))
    assert mue.Plan.load(path).hash == plan.hash
    path.write_text(json.dumps({**old, "format": 2}))
    with pytest.raises(ValueError, match="was edited or written by another version"):
        mue.Plan.load(path)  # the same words mean other heads today
    path.write_text(json.dumps({**plan.to_dict(), "format": 3}))
    with pytest.raises(ValueError, match="format 3, and this version of mue reads 1 to 2"):
        mue.Plan.load(path)


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
