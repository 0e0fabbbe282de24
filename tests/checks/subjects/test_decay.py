"""Decay is measured in the weights: of an AdamW that nobody knows too, whose step `moved` does not compare."""

from __future__ import annotations

from typing import Any

import pytest

from support.wiring.case import case
from support.wiring.muons import own


@pytest.mark.parametrize(
    ("slips", "cause"),
    [
        ({}, ""),
        ({"decay": 0.0}, "never applied"),
        ({"decay": 2.0}, "applied twice"),
        ({"independent": True}, "not multiplied by the rate"),
        ({"decay": 0.5}, "0.5 × lr·wd"),
    ],
)
def test_what_was_done_instead_is_said(slips: dict[str, Any], cause: str) -> None:
    c = case("mue dense, tied")
    c.optimizer, c.scheduler = own(c.plan.param_groups(c.model), **slips), None
    found = c.check(only=["weight decay"]).failures
    assert [f.causes[0].startswith(cause) for f in found] == [True] * bool(slips), found


def test_an_exchanged_set_is_said_in_both_parts() -> None:
    c = case("mue hybrid")
    c.optimizer, c.scheduler = own(c.plan.param_groups(c.model), exchanged=True), None
    found = c.check(only=["weight decay"]).failures
    assert len(found) == 2 and all("another than the planned one" in f.causes[1] for f in found), found
    assert {f.where.split(",")[0] for f in found} == {"embedding.weight", "blocks.0.attention_norm.weight"}
