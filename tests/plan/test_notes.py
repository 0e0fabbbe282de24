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


def test_a_batch_below_one_sequence_is_asked_about() -> None:
    """Batches are tokens here and sequences in many trainers; neither the values nor the hash know of the question."""
    runs = {"base_training": mue.Training(256, 5000), "training": mue.Training(2**20, 20000)}
    asked = make(**runs)
    assert [n for n in asked.notes if "does it count sequences" in n] == [
        n for n in asked.notes if "the base's batch" in n
    ]
    assert any("give batch = 262,144" in note for note in asked.notes)
    short = make(base=replace(BASE, sequence=256), target=replace(TARGET, sequence=256), **runs)
    assert not short.notes
    assert not make(base_training=mue.Training(1024, 5000), training=mue.Training(1024, 20000)).notes


def test_what_no_rule_reads_is_said_where_it_changes() -> None:
    """Another vocabulary, another window, a head of its own: values stay as tuned, and the reader knows."""
    other = make(target=replace(TARGET, vocab=50257, sequence=4096, tied=True))
    assert any(
        "vocab 256 → 50257, sequence 1024 → 4096, tied False → True: no rule covers that" in n for n in other.notes
    )
    assert not any("no rule covers that" in n for n in make().notes)


def test_notes_make_no_other_plan() -> None:
    noted = make(base_training=mue.Training(256, 5000), training=mue.Training(256, 20000))
    assert noted.notes and replace(noted, notes=()).hash == noted.hash
