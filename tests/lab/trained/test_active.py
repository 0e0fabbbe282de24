"""mue.lab.trained.active, ranges and figures: any k′ of a run, its FLOPs, and the words that ask for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.models.language import LanguageModel
from mue.lab.trained.active import ActiveCurve, AnyActive, RunAtAnyActive, ask
from mue.lab.trained.evaluate import score
from mue.lab.trained.figures import active_figure
from mue.lab.trained.find import find
from mue.lab.trained.held_out import WHOLE
from mue.lab.trained.ranges import active_of, is_range, scales_of
from mue.lab.trained.subject import Subject, subject_of
from support.trained import trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject(moe_run: Path) -> Subject:
    return subject_of(moe_run, None, 8, None, CPU)


@pytest.mark.filterwarnings("ignore:one active expert")
def test_every_point_is_the_model_with_so_many_experts(subject: Subject, moe_run: Path) -> None:
    """Against the model of a shape with k′ planned anew, whose weights are the trained ones: under "mean" A·R is as it was, so that the two
    scales of that shape, R = k′ and A of the trained k, differ from it by k′/k."""
    model, windows = subject.any_active(), subject.text.windows[WHOLE]
    points = list(ask(model, [1, 2, 4, 8], ["mean", "root", "sum"], windows, subject.bytes_of))
    curve = ActiveCurve(points[0], tuple(points[1:]))
    assert curve.scales == ["mean", "root", "sum"] and [p.active for p in curve.of("root")] == [1, 2, 4, 8]
    whole = score(subject.logits, windows, subject.bytes_of)
    assert curve.trained.scores == whole
    for scale in curve.scales:  # k itself, to the bit
        assert curve.of(scale)[1].scores == whole
    found = find(moe_run)
    trained_model = found.model()
    for point in curve.of("sum"):
        shape = replace(found.run.plan.target, active=point.active)
        multipliers = replace(found.run.plan.multipliers, route=(float(point.active),) * shape.layers)
        other = LanguageModel(shape, multipliers).eval()
        other.load_state_dict(trained_model.state_dict())
        expected = score(lambda tokens_BT, m=other: m(tokens_BT).logits, windows, subject.bytes_of)  # type: ignore[misc]
        assert point.scores.nats == pytest.approx(expected.nats, rel=1e-5)
    losses = {(p.scale, p.active): p.scores.loss.value for p in curve.points}
    assert len({round(loss, 9) for loss in losses.values()}) == 10  # three scales at three k′, and k
    assert subject.logits(windows[0][0]).equal(trained_model(windows[0][0]).logits)  # as before, afterwards


def test_flops_are_those_of_a_shape_with_so_many(subject: Subject) -> None:
    model = subject.any_active()
    assert isinstance(model, RunAtAnyActive)
    shape = model.found.run.plan.target
    for k in (1, 2, 5, 8):
        other = mue.MoE.parse(f"8e{k}a1s", width=32, expert=16, layers=2, head_dim=16, sequence=32)
        assert model.flops(k) == pytest.approx(other.flops_per_token / 3)
    assert model.flops(None) == pytest.approx(shape.flops_per_token / 3)


def test_ranges(subject: Subject) -> None:
    model = subject.any_active()
    for text, expected in {
        "1..3k": [1, 2, 3, 4, 5, 6],
        "1..4": [1, 2, 3, 4],
        "2...4": [2, 3, 4],
        "8": [8],
        "2,8,2": [2, 8],
        "1k..2k": [2, 3, 4],
        "1..k": [1, 2],
        "2k": [4],
    }.items():
        assert is_range(text) and active_of(text, model) == (expected, [])
    for text, words in {
        "1..9": "a token can use 1 to 8 of the 8 experts, not 9",
        "0..2": "not 0",
        "5k": "not 10",
        "4..2": "4 to 2 is no range",
        "1..": "write a range",
        "many": "write a range",
        "": "write a range",
    }.items():
        with pytest.raises(ValueError, match=words):
            active_of(text, model)
    assert not is_range("many") and not is_range("") and not is_range("--json")
    assert scales_of([], model) == ["mean", "root"] and scales_of(["sum", "sum"], model) == ["sum"]
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        scales_of(["meen"], model)


def asked(domains: Path, out: Path, target: mue.MoE | mue.Mixed) -> AnyActive:
    return subject_of(trained(domains, out, target, steps=1), None, 8, None, CPU).any_active()


def test_the_default_takes_what_there_is(domains: Path, tmp_path: Path) -> None:
    model = asked(domains, tmp_path, mue.MoE.parse("8e4a2g", width=32, expert=16, layers=1, head_dim=16, sequence=32))
    assert active_of("1..3k", model) == (
        [2, 4, 6, 8],
        [
            "left out: k′ = 1, 3, 5, 7 (every token uses as many of each of 2 groups, which 1 is no multiple of)",
            "left out: k′ = 9, 10, 11, 12 (a token can use 1 to 8 of the 8 experts, not 9)",
        ],
    )
    with pytest.raises(ValueError, match="each of 2 groups, which 3 is no multiple of"):
        active_of("3", model)


def test_a_router_is_asked_which_numbers_it_can_use(domains: Path, tmp_path: Path) -> None:
    """Before anything is evaluated: two groups of two experts are kept, and hold no fifth."""
    limited = {"router": "group-limited", "router_settings": {"n_group": 4, "topk_group": 2}}
    target = mue.MoE.parse("8e2a", width=32, expert=16, layers=1, head_dim=16, sequence=32, **limited)
    model = asked(domains, tmp_path, target)
    chosen, [note] = active_of("1..3k", model)
    assert chosen == [1, 2, 3, 4] and note.startswith("left out: k′ = 5, 6 (5 active experts do not fit")
    with pytest.raises(ValueError, match="--active 5: 5 active experts do not fit"):
        active_of("5", model)
    with pytest.raises(ValueError, match="5 active experts do not fit"):
        next(ask(model, [1, 5], ["mean"], [], None))


@pytest.mark.filterwarnings("ignore:one active expert")
def test_groups_that_differ_from_layer_to_layer(domains: Path, tmp_path: Path) -> None:
    """k′ is a multiple of the groups of all; what only some layers were trained with is not the trained model."""
    blocks = tuple(
        mue.Block(layers=1, experts=12, active=active, groups=groups, expert=8) for active, groups in ((4, 2), (6, 3))
    )
    model = asked(domains, tmp_path, mue.Mixed(32, blocks, head_dim=16, sequence=32))
    assert (model.trained, model.groups) == (6, 6)
    assert active_of("1..3k", model)[0] == [6, 12]
    assert not model.is_trained(6)


def test_the_trained_number_is_not_asked_again(subject: Subject) -> None:
    """Under any scale it is the trained model to the bit, which another number is not (the control)."""
    model = subject.any_active()
    assert isinstance(model, RunAtAnyActive)
    calls: list[int] = []
    real = model.logits
    model.logits = lambda tokens_BT: (calls.append(1), real(tokens_BT))[1]
    windows = subject.text.windows[WHOLE]
    points = list(ask(model, [2], ["mean", "root"], windows, None))
    assert len(calls) == len(windows) and points[0].scores is points[1].scores is points[2].scores
    with model.at(2, "root") as logits:
        assert score(logits, windows, None) == points[0].scores
    assert len(list(ask(model, [3], ["mean"], windows, None))) == 2 and len(calls) == 4 * len(windows)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (mue.Dense(32, 32, 1, head_dim=16, sequence=32), "no routed experts"),
        (mue.MoE.parse("8e2a", width=32, expert=16, layers=1, head_dim=16, sequence=32, router="hash"), "hash router"),
    ],
    ids=["dense", "hash"],
)
def test_models_without_another_number(target: mue.MoE, words: str, domains: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{words}.*leave --active out"):
        asked(domains, tmp_path, target)


def test_the_picture_has_a_line_for_each_scale(subject: Subject) -> None:
    points = list(ask(subject.any_active(), [1, 2, 3], ["mean", "root"], subject.text.windows[WHOLE], None))
    [axes] = active_figure(ActiveCurve(points[0], tuple(points[1:])), "a model").axes
    assert axes.get_ylabel() == "held-out loss, nats per token"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[0] == "as trained: k = 2" and [t.partition(":")[0] for t in texts[1:]] == ["mean", "root"]
    lines = [c for c in axes.containers if hasattr(c, "lines")]
    assert all(list(c.lines[0].get_xdata()) == [p.flops / 1e6 for p in points[1::2]] for c in lines)
