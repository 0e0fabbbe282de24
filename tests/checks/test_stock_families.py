"""mue.check on a transformers family far larger than memory: what shapes alone tell."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch

import mue
from mue.fold import fold


def test_671_billion_parameters_on_the_meta_device() -> None:
    from mue.layouts.inspect import inspect
    from mue.layouts.transformers.configs import build, default_config

    config = default_config("deepseek_v3")
    config.routed_scaling_factor = 8.0
    shape = inspect(config).shape
    assert shape is not None
    plan = fold(
        mue.transfer(mue.Dense(512, 2048, 8, head_dim=shape.head_dim), shape, mue.HParams(1e-3, 0.1, 0.02)), "model"
    )
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) > 6e11
    report = mue.check(model, plan, optimizer=torch.optim.AdamW(plan.param_groups(model)))
    assert {f.check for f in report.findings if f.status == "pass"} >= {"coverage", "groups", "gates"}
