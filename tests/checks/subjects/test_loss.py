"""The loss against the mean of the cross-entropy on its way: sums fail, further losses beside it pass."""

from __future__ import annotations

from typing import Any

import pytest

from support.wiring.case import case
from support.wiring.fault import around


@pytest.mark.parametrize(
    ("factor", "more", "status"), [(1.0, 0.0, "pass"), (1.0, 2.0, "pass"), (48.0, 0.0, "fail"), (0.5, 0.0, "pass")]
)
def test_a_sum_fails_and_an_auxiliary_loss_does_not(factor: float, more: float, status: str) -> None:
    c = case("mue dense, tied")

    def change(old: Any, *args: Any) -> Any:
        out = old(*args)
        out.loss = out.loss * factor + more
        return out

    around(c.model, change)
    (found,) = c.check(only=["loss"]).findings
    assert (found.check, found.status) == ("loss", status)
    if status == "fail":
        assert found.where == "loss" and "48 times as much" in found.measured


def test_without_targets_nothing_is_said() -> None:
    c = case("mue dense, tied")
    c.batch = c.batch[:1]
    (found,) = c.check(only=["loss"]).findings
    assert found.status == "left out"
