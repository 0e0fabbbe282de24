"""What a printed plan shows."""

from __future__ import annotations

from dataclasses import replace

from mue.plan.fold import fold
from mue.plan.render import WIDTH, split
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


def test_plain_text_fits_a_page_and_keeps_every_cell() -> None:
    """Lines of 210 columns break in every terminal; nothing that was in them is lost."""
    for plan in (make(**SDE), fold(make(**SDE), "model")):
        text = str(plan)
        assert max(map(len, text.splitlines())) <= WIDTH
        words = " ".join(text.split())
        columns, rows = plan.table()
        for row in rows:
            for name, cell in zip(columns[:-1], row, strict=False):
                assert " ".join(cell.split()) in words, (row[0], name)
        assert all(" ".join(value.split()) in words for _, value in plan.header())
    assert rows[0][-1] not in words  # sources are long, and shown on request


def test_factors_are_said_once_for_all_roles_that_share_them() -> None:
    plan = make(**SDE)
    (columns, rows), (_, factors) = split(plan)
    assert not any(name.startswith("×") for name in columns) and columns[-2:] == ["marks", "source"]
    full, lines = plan.table()
    said = {(of, role): formula for of, formula, roles in factors for role in roles.split(", ")}
    expected = {
        (name, line[0]): line[full.index(name)]
        for line in lines
        for name in full
        if name.startswith("×") and line[full.index(name)] != "–"
    }
    assert said == expected and len(factors) < len(expected) / 2 and len(rows) == len(lines)


def test_what_a_model_may_lack_is_in_brackets() -> None:
    """No shape says whether a model has QK-norm or a balance bias, and a plan that meets one without them takes it."""
    plan = make()
    tensors = {row[0]: row[1] for row in plan.table()[1]}
    assert tensors["qk_norm"] == "(16)" and tensors["router_bias"] == "(8)" and tensors["final_norm"] == "(1)"
    assert tensors["attention_q"] == "8" and tensors["head"] == "1"  # asked for, and exactly so many
    assert "ffn_up" not in tensors and plan.to_dict()["roles"]["ffn_up"]["count"] == 0


def test_a_folded_plan_says_which_it_is_of() -> None:
    plan = make()
    own = dict(plan.header())["hash"]
    folded = fold(plan, "model")
    assert own == plan.hash
    assert dict(folded.header())["hash"] == f"{plan.hash} (folded, R in the model: {folded.hash})"
