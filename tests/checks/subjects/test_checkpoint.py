"""The plan's hash, found in every kind of checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mue.checks.subjects.checkpoint import stored_hash
from support.wiring.case import case


def test_plan_hashes_are_found_in_every_kind_of_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plan = case("mue hybrid").plan
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {"mue": json.dumps({"run": "r", "plan": plan.hash})})
    torch.save({"plan": plan.hash, "w": torch.zeros(2)}, tmp_path / "b.pt")
    plan.save(tmp_path / "plan.json")
    for name in ("a.safetensors", "b.pt", "plan.json", "."):
        assert stored_hash(tmp_path / name) == plan.hash, name
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    assert stored_hash(tmp_path / "c.safetensors") is None
    (tmp_path / "d.safetensors").write_bytes(b"xx")
    c = case("mue hybrid")
    c.checkpoint = tmp_path / "d.safetensors"
    assert any("cannot be read" in f.measured for f in c.check(only=["plan hash"]).failures)
