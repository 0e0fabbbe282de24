"""A model under FSDP2 (``fully_shard``): its parameters are DTensors, and a plan draws and groups them as any others."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mue
from mue.lab.models.language import LanguageModel

BASE = mue.Dense(width=32, ffn=32, layers=2, head_dim=16, vocab=64)
TARGET = mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, vocab=64)


def test_a_sharded_model_is_drawn_and_grouped_as_a_whole_one(tmp_path: Path) -> None:
    plan = mue.transfer(BASE, TARGET, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02))
    whole, sharded = (LanguageModel(TARGET, plan.multipliers) for _ in range(2))
    plan.init_(whole, seed=3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        plan.init_(sharded, seed=3)
        for ours, theirs in zip(whole.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(ours, theirs.full_tensor())  # type: ignore[attr-defined]
        settings = [
            [(g["lr"], g["weight_decay"], len(g["params"])) for g in plan.param_groups(m)] for m in (whole, sharded)
        ]
        assert settings[0] == settings[1]
    finally:
        dist.destroy_process_group()
