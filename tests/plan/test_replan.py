"""Plans made again with other tuned values."""

from __future__ import annotations

from dataclasses import replace

import pytest

import mue
from support.plans import TARGET, TUNED, make


def test_retuned_and_scaled_follow_through_a_chain() -> None:
    chain = mue.transfer(make(tuned=TUNED.replace(roles={"head": {"lr": 5e-4}})), replace(TARGET, width=512))
    double = chain.scaled(2)
    for role in chain.roles:
        before, after = chain.roles[role].values, double.roles[role].values
        assert after.lr == (None if before.lr is None else pytest.approx(2 * before.lr))
        assert after.weight_decay == before.weight_decay and after.init_std == before.init_std
    assert chain.retuned(weight_decay=0.2).roles["head"].values.weight_decay == pytest.approx(0.2)
    assert chain.retuned(lr=2e-3).roles["head"].values.lr == chain.roles["head"].values.lr  # its own rate
