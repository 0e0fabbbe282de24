"""What a printed plan shows."""

from __future__ import annotations

from dataclasses import replace

from support.plans import BASE, TUNED, make
from support.sde import SDE


def test_printed_plans_show_everything() -> None:
    text = str(make())
    for role, plan in make().roles.items():
        assert (f"\n{role} " in text) == (plan.count > 0), role
    assert "(not derived)" not in text and "ρ_d^-1/2 · ρ_e^1/2" in text and "inferred" in text
    header, rows = make(**SDE).table()
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) == len(header)
    assert header[-2:] == ["marks", "source"]
    marks = {row[0]: row[-2] for row in rows}
    assert marks["expert_down"] == marks["router"] == "P P I I" and marks["embedding"] == "I I I I"
    assert marks["norm"] == "– I I I" and "P published" in text and "C authors' code" in text
    measured = {row[0]: row[-2] for row in make().table()[1]}  # what was measured here is in no published table
    assert measured["expert_down"] == "P I I I" and measured["norm"] == "– I I I"
    literal = make(weight_decay_width="none", up_gate_correction=True, **SDE).roles["expert_up"].marks
    assert literal["weight_decay"] == "published" and literal["lr"] == "inferred"
    assert make(tuned=TUNED.replace(optimizer="lion")).roles["expert_up"].marks["lr"] == "inferred"


def test_the_base_says_what_it_was_taken_to_be() -> None:
    """Defaults that nobody gave are in every plan's head: a head size of 64 or betas of 0.95 may not be the base's."""
    taken = dict(make().header())["taken of the base"]
    assert taken.startswith("2 heads of 64, vocab 256, sequence 1024, betas 0.9, 0.95, eps 1e-12")
    assert "defaults, if you gave no other: head_dim, betas, eps" in taken
    own = make(base=replace(BASE, heads=4, head_dim=32), tuned=TUNED.replace(betas=(0.9, 0.999), eps=1e-8))
    assert dict(own.header())["taken of the base"].endswith("betas 0.9, 0.999, eps 1e-08")
