"""mue.check on transformers families: folded plans on stock code."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch

import mue
from mue.fold import fold
from support.wiring_cases import STOCK, case
from support.wiring_faults import broken, load

torch.set_num_threads(1)
FAULTS = load()
SAMPLE = (
    "a folded output multiplier applied in the forward pass too",
    "softmax without renormalisation",
    "one expert of N left at default init",
    "folded gradients clipped by their plain norm",
    "stale plan: another granularity",
)
EVERY = [(n, f) for n, fault in FAULTS.items() for f in fault.families if f in STOCK]


def judge(name: str, family: str) -> None:
    report = broken(name, family).check()
    assert any(re.search(FAULTS[name].culprit, f.where) for f in report.failures), report


@pytest.mark.parametrize("family", STOCK)
def test_right_stock_models_pass(family: str) -> None:
    for seed in range(2):
        report = case(family, seed).check()
        assert report.ok and not report.warnings, report
        measured = {f.check for f in report.findings if f.status == "pass"}
        assert measured >= {"multipliers", "attention scale", "gates", "moved", "clipping"}


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("family", STOCK)
def test_a_fault_in_stock_code_is_caught_and_named(name: str, family: str) -> None:
    judge(name, family)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [e for e in EVERY if e[0] not in SAMPLE])
def test_every_fault_in_stock_code(name: str, family: str) -> None:
    judge(name, family)


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
