"""mue.lab.trained.active, ranges and figures: any k′ of a run, its FLOPs, and the words that ask for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.models.language import LanguageModel
from mue.lab.trained.active import ActiveCurve, RunAtAnyActive, ask
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
        assert is_range(text) and active_of(text, model) == expected
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


def test_the_default_takes_what_there_is(domains: Path, tmp_path: Path) -> None:
    target = mue.MoE.parse("8e4a2g", width=32, expert=16, layers=1, head_dim=16, sequence=32)
    model = subject_of(trained(domains, tmp_path, target, steps=1), None, 8, None, CPU).any_active()
    assert active_of("1..3k", model) == [2, 4, 6, 8]
    with pytest.raises(ValueError, match="each of 2 groups, which 3 is no multiple of"):
        active_of("3", model)


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
        subject_of(trained(domains, tmp_path, target, steps=1), None, 8, None, CPU).any_active()


def test_the_picture_has_a_line_for_each_scale(subject: Subject) -> None:
    points = list(ask(subject.any_active(), [1, 2, 3], ["mean", "root"], subject.text.windows[WHOLE], None))
    [axes] = active_figure(ActiveCurve(points[0], tuple(points[1:])), "a model").axes
    assert axes.get_ylabel() == "held-out loss, nats per token"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[0] == "as trained: k = 2" and [t.partition(":")[0] for t in texts[1:]] == ["mean", "root"]
    lines = [c for c in axes.containers if hasattr(c, "lines")]
    assert all(list(c.lines[0].get_xdata()) == [p.flops / 1e6 for p in points[1::2]] for c in lines)
