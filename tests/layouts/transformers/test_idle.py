"""What a family's own code gives no gradient is known of it, and of nothing else."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

from mue.layouts.transformers.idle import idle_in_family
from support.wiring.case import case


def test_indexers_choose_and_nothing_else_is_idle() -> None:
    found = idle_in_family(case("deepseek_v32").model)
    assert found and all(".indexer." in pattern for pattern in found)
    assert not idle_in_family(case("deepseek_v3").model)
    assert not idle_in_family(case("mue hybrid").model)


def test_a_class_of_the_users_own_is_not_excused() -> None:
    c = case("deepseek_v32")
    c.model.__class__ = type("Own", (type(c.model),), {"__module__": "own"})
    assert not idle_in_family(c.model)
