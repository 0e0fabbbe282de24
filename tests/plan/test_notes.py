"""What a plan warns of."""

from __future__ import annotations

from dataclasses import replace

import pytest

import mue
from support.plans import BASE, TARGET, TUNED, make


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
