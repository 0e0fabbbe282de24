"""The routers' part of a page: a collapsed router is warned of and a balanced one is not, drift is told as it was, what is missing is said."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mue
from mue.lab.report.page import Section, write_report
from mue.lab.report.router_plots import coactive, drawn, lift, over_time_figure
from mue.lab.report.routers import router_sections, routers_table
from mue.lab.tasks.language import LanguageTask
from mue.lab.train.router_record import RouterRecord
from mue.lab.train.run import Run, Settings
from mue.moe import Routing

TOKENS, N, A = 128, 8, 2
BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1)


def a_run(notation: str = "8e2a", layers: int = 2, **block: Any) -> Run:
    target = mue.MoE.parse(notation, width=64, expert=32, layers=layers, head_dim=16, sequence=32, **block)
    training = mue.Training(TOKENS, 24)
    plan = mue.transfer(BASE, target, TUNED, base_training=training, training=training)
    return Run(plan, Settings(), {"hash": "0", "tokenizer": "bytes"})


def routing(expert_TK: Tensor, weights: Tensor | None = None, scores: Tensor | None = None) -> Routing:
    weight_TK = torch.full(expert_TK.shape, 1.0) if weights is None else weights.expand(expert_TK.shape) * A
    made = Routing.from_topk(expert_TK, weight_TK, N, route_scale=float(A))
    made.scores_TN = scores
    return made


def balanced(**more: Any) -> Routing:
    return routing((torch.arange(TOKENS)[:, None] * A + torch.arange(A)) % N, **more)


def collapsed() -> Routing:
    return routing(torch.arange(A).expand(TOKENS, A))


def pages(run: Run, *steps: list[Routing]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rows and matrices as a run records them whose steps 1, 2, ... route so."""
    text = torch.tensor(list(b"abc de12, ") * 13)[:TOKENS].view(4, 32)
    record = RouterRecord(run, LanguageTask(), SimpleNamespace(at=lambda step: (text, text)), [])  # type: ignore[arg-type]
    rows = []
    for step, routings in enumerate(steps, 1):
        row = record.row(routings, step, evaluated=True, last=step == len(steps))
        rows.append({"step": step, "tokens": step * TOKENS, "loss": 2.0, **row})
    return rows, record.at_end


def said(sections: list[Section]) -> tuple[str, list[str]]:
    """All texts of the page's part, and those that warn."""
    texts = [text for section in sections for text in section.texts]
    return " ".join(text["text"] for text in texts), [text["text"] for text in texts if text["warn"]]


def test_a_collapsed_router_is_warned_of_and_a_balanced_one_is_not() -> None:
    run = a_run()
    rows, found = pages(run, [balanced(), balanced()], [balanced(), collapsed()])
    words, warnings = said(router_sections(run, rows, found))
    assert warnings == [
        "Layer 1 has collapsed: as if 2.0 of 8 experts were used evenly.",
        "Layer 1: 6 of 8 experts got no token in the last row.",
    ]
    assert "The busiest expert has 4.00 times its fair share in the last row." in words
    rows, found = pages(run, [balanced(), balanced()], [balanced(), balanced()])
    words, warnings = said(router_sections(run, rows, found))
    assert warnings == [] and "1.00 times its fair share in the last row, and no expert is dead." in words


def test_between_the_two_ends_it_is_far_from_balanced() -> None:
    run, half = a_run(), routing((torch.arange(TOKENS)[:, None] * A + torch.arange(A)) % 3)
    _, warnings = said(router_sections(run, *pages(run, [half, half])))
    assert warnings[0] == "Layer 0 is far from balanced: as if 3.0 of 8 experts were used evenly."


def test_the_table_has_plan_init_and_end_and_tells_the_drift() -> None:
    run = a_run(gates="measured", gate_moments=(0.5, 0.125), normalize=False)
    even, skewed = torch.tensor([0.25, 0.25]), torch.tensor([0.75, 0.25])
    steps = [[balanced(weights=even)] * 2, [balanced(weights=even), balanced(weights=skewed)]]
    [summary, *_] = router_sections(run, *pages(run, *steps))
    table = {row[0]: row[1:] for row in summary.rows}
    assert table["m1 = E[Σw]"][:3] == ["0.5", "0.5", "0.75 (0.5 to 1)"]
    assert table["m1 = E[Σw]"][3] == (
        "as planned at init, drifted by +100% in layer 1: R is made for the plan's, so the routed sum began at ×1 and ended at ×2 of"
        " its planned scale"
    )
    assert table["F = a·m2/m1²"][:3] == ["1", "1", "1.12 (1 to 1.25)"]
    assert table["F = a·m2/m1²"][3].endswith("layer 1: a token's weights are less even at the end than planned")
    assert table["active experts of a token"] == ["2", "2", "2", "as planned at init, no drift"]
    assert table["token share of an expert"] == ["0.25", "0.25", "0.25", "every expert has the planned share"]
    off = a_run(gates="measured", gate_moments=(0.5, 0.25), normalize=False)  # F = 2 planned, 1 found
    [summary, *_] = router_sections(off, *pages(off, steps[0]))
    assert "50% below plan at init in layer 0, no drift: the routed sum's std began at ×0.707" in summary.rows[4][4]


def test_f_has_the_plans_a_where_the_number_of_experts_differs_by_token() -> None:
    """Even scores of 8 experts, half of their sum: a token has four experts, and the plan for a = 2 takes F = 2·m2/m1² = ½."""
    run = a_run(router="top-p", router_settings={"p": 0.5, "logit_std": 0.0})
    four = torch.stack([torch.randperm(N)[:4] for _ in range(TOKENS)])
    even = Routing.from_topk(four, torch.full((TOKENS, 4), 4.0 / N), N, route_scale=4.0)  # R = a/m1 = 2/½
    rows, found = pages(run, [even, even])
    assert rows[0]["routers"][0]["F"] == pytest.approx(1)  # what the file says, with the mean number of experts
    [summary, _, tracked, *_] = router_sections(run, rows, found)
    assert summary.rows[4][1:] == ["0.5", "0.5", "0.5", "as planned at init, no drift"]
    assert [row[4] for row in tracked.rows] == ["0.5", "0.5"]
    assert routers_table([("one", run, rows)])[0].rows[0][3] == "0.5"


def test_every_layers_f_is_drawn_against_its_own_plan() -> None:
    run = a_run()
    rows, _ = pages(run, [balanced(), balanced()])
    plan = [{"m1": 1.0, "F": 1.0}, {"m1": 1.0, "F": 0.5}]
    *layers, dotted = (line.get_ydata()[0] for line in over_time_figure(rows, [0, 1], plan).axes[3].lines)
    assert layers == pytest.approx([1.0, 2.0], abs=1e-5) and dotted == 1.0


def test_shares_off_the_plan_move_sigma0() -> None:
    run = a_run()
    [summary, *_] = router_sections(run, *pages(run, [collapsed(), collapsed()]))
    assert summary.rows[1][4] == (
        "from ×0 to ×4 of the plan's at the end, and σ0 with share^-½: ×0.5 for the busiest expert, without bound for one that got no token"
    )


def test_layers_that_share_a_pool_are_balanced_together() -> None:
    """Each layer uses half of the pool, and nobody is dead; with the same half in both, half of it is."""
    run = a_run("8e2a1p")
    low, high = (routing((torch.arange(TOKENS)[:, None] * A + torch.arange(A)) % 4 + first) for first in (0, 4))
    [summary, *_] = sections = router_sections(run, *pages(run, [low, high]))
    assert said(sections)[1] == [] and summary.rows[1][1:] == [
        "0.5",
        "0.5",
        "0.5",
        "every expert has the planned share",
    ]
    _, warnings = said(router_sections(run, *pages(run, [low, low])))
    assert warnings[-1] == "The pool of layers 0 to 1: 4 of 8 experts got no token in the last row."


def test_drawn_experts_are_not_called_dead() -> None:
    run = a_run("8e1a", router="thor")
    one = Routing.from_topk(torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1), N)
    words, warnings = said(router_sections(run, *pages(run, [one, one])))
    assert (
        warnings == []
        and "drawn at random" in words
        and "busiest" not in words
        and "entropy (the router has no scores)" in words
    )


def test_a_router_that_learns_and_draws_can_collapse() -> None:
    """Elastic MoE draws among a token's best experts: an expert that is never among them is dead."""
    words, warnings = said(router_sections(a_run(router="elastic"), *pages(a_run(), [collapsed(), collapsed()])))
    assert len(warnings) == 4 and "drawn at random" not in words


def test_tokens_without_an_expert_are_counted() -> None:
    run, lost = a_run(), torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [N, N]]).repeat(26, 1)[:TOKENS]
    words, warnings = said(router_sections(run, *pages(run, [balanced(), routing(lost)])))
    assert "19.5% of the tokens of layer 1 had no expert at the end" in words and warnings == []
    assert "had no expert" not in said(router_sections(run, *pages(run, [balanced(), balanced()])))[0]


def test_pictures_that_nobody_has_are_left_out() -> None:
    """One active expert has no pairs, and a model whose blocks are not known no overlap: then there is no such section."""
    run = a_run("8e1a", router="hash")
    one = Routing.from_topk(torch.arange(TOKENS)[:, None] % N, torch.ones(TOKENS, 1), N)
    found = [s.id for s in router_sections(run, *pages(run, [one, one]))]
    assert found == ["routers", "load", "routers-over-time", "specialisation", "active"]


def test_a_run_from_before_says_so_and_shows_its_load() -> None:
    run = a_run()
    rows, _ = pages(run, [balanced(), collapsed()])
    old = [{name: value for name, value in row.items() if name != "routers"} for row in rows]
    sections = router_sections(run, old, None)
    words, warnings = said(sections)
    assert (
        "from before reports had that" in words
        and len(warnings) == 2
        and [s.id for s in sections] == ["routers", "load"]
    )
    [table] = routers_table([("new", run, rows), ("old", run, old), ("dense", dense_run(), [])])
    assert [row[0] for row in table.rows] == ["new"] and table.rows[0][4:6] == ["3.000", "6"]
    assert "from before they were kept: old." in table.texts[1]["text"]
    assert "No load" in said(router_sections(run, [{"step": 1, "loss": 2.0}], None))[0]


def dense_run() -> Run:
    training = mue.Training(TOKENS, 24)
    plan = mue.transfer(BASE, BASE, TUNED, base_training=training, training=training)
    return Run(plan, Settings(), {"hash": "0"})


def test_a_dense_run_has_no_routers() -> None:
    assert router_sections(dense_run(), [], None) == [] and routers_table([("dense", dense_run(), [])]) == []


def test_a_model_of_ones_own_with_other_blocks_is_shown_without_the_plan() -> None:
    run = a_run()
    [summary, *_] = sections = router_sections(run, *pages(run, [balanced()]))
    assert "is not known, so nothing is compared" in said(sections)[0]
    assert [row[1] for row in summary.rows] == ["–"] * 5 and {row[4] for row in summary.rows} == {""}


def test_what_is_not_finite_is_said() -> None:
    run = a_run()
    broken = balanced(weights=torch.tensor([math.nan, 1.0]), scores=torch.full((TOKENS, N), math.nan))
    sections = router_sections(run, *pages(run, [balanced(), balanced()], [broken, balanced()]))
    assert sections[0].rows[2][4] == "a measurement is not finite"
    assert "entropy (its scores are no distribution)" in said(sections)[0]


def test_the_page_has_every_picture(tmp_path: Path) -> None:
    """Ragged counts, scores, classes, eight layers: everything that can be drawn is, and by its own section."""
    run = a_run(layers=8)
    ragged = routing(
        torch.tensor([[0, 1], [2, N], [3, 4], [5, N]]).repeat(TOKENS // 4, 1), scores=torch.rand(TOKENS, N)
    )
    rows, found = pages(run, [balanced(scores=torch.ones(TOKENS, N))] * 8, [ragged] * 8)
    sections = router_sections(run, rows, found)
    page = write_report(tmp_path, "title", "lead", sections).read_text()
    names = ("load", "routers-over-time", "coactivation", "specialisation", "active")
    assert [s.id for s in sections] == ["routers", *names]
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in names)
    assert "6 of 8 layers are drawn" in page and "letters (" in page


@pytest.mark.parametrize(("layers", "expected"), [(1, [0]), (6, list(range(6))), (24, [0, 5, 9, 14, 18, 23])])
def test_few_layers_are_all_drawn_and_of_many_the_ends_too(layers: int, expected: list[int]) -> None:
    assert drawn(layers) == expected


def layer_of(made: Routing, run: Run) -> dict[str, Any]:
    found = pages(run, [made, made])[1]
    assert found is not None
    return {**found, "layer": found["layers"][0]}


def test_coactivation_over_chance() -> None:
    """1 for an even independent choice, ragged too; N - 1 for pairs that always go together; none for one active expert."""
    run, generator = a_run(), torch.Generator().manual_seed(1)
    many = 4096
    chosen = torch.rand(many, N, generator=generator).argsort(1)[:, :4]
    padded = torch.where((torch.arange(many) % 2)[:, None].bool() & (torch.arange(4) > 1), N, chosen)
    for expert_TK in (chosen, padded):
        found = coactive(layer_of(routing(expert_TK), run)["layer"])
        assert found is not None
        off = torch.tensor([x for i, row in enumerate(found) for j, x in enumerate(row) if i != j])
        assert off.mean().item() == pytest.approx(1, abs=0.01) and (off - 1).abs().max() < 0.2
    pairs = coactive(layer_of(balanced(), run)["layer"])
    assert pairs is not None and pairs[0][1] == pytest.approx(N - 1) and pairs[0][2] == 0
    assert coactive(layer_of(routing(torch.zeros(TOKENS, 1, dtype=torch.int64)), run)["layer"]) is None


def test_lift_of_an_expert_that_takes_a_class_alone() -> None:
    """Expert 0 has all letters and nothing else; expert 1 has all the rest."""
    run = a_run()
    text = torch.tensor(list(b"abc de12, ") * 13)[:TOKENS]
    letters = torch.tensor([chr(b).isalpha() for b in text.tolist()])
    found = layer_of(routing((~letters).long()[:, None]), run)
    table, share = lift(found, 0), letters.double().mean().item()
    assert table[0][0] == pytest.approx(-math.log2(share)) and table[0][1] == -6
    assert table[1][1] == pytest.approx(-math.log2(1 - share)) and math.isnan(table[0][2]) and math.isnan(table[4][0])
