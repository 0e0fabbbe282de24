"""Whatever structure a model has: right, everything planned is measured; wrong, it is named; unseen, it is said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mue
from mue.checks import CheckError
from mue.checks.context import logits_of
from support.structures import OUTPUTS, L, structure

FORWARD = ("multipliers", "attention scale")
STRUCTURES: dict[str, dict[str, Any]] = {
    "learned positions": {"positions": "table"},
    "positions as a parameter": {"positions": "parameter"},
    "waves": {"positions": "waves"},
    "parallel, one sum": {"block": "parallel"},
    "parallel, in place": {"block": "in place"},
    "parallel, one after the other": {"block": "in turn"},
    "a norm after each addition": {"block": "after"},
    "sandwich norms": {"ends": True},
    "sandwich norms in a parallel block": {"ends": True, "block": "parallel"},
    "a norm after the embedding": {"entry": True},
    "a norm after the embedding, parallel": {"entry": True, "block": "parallel"},
    "a norm after embedding and positions": {"entry": True, "positions": "table", "block": "in place"},
    "a norm inside the feed-forward": {"inner": True},
    "an activation of its own": {"activation": torch.sin, "block": "in place"},
    "tied": {"tied": True},
    "softcapped": {"softcap": 5.0},
}
WRONG = {
    "attention": r"attention branch .*(o\.weight|end1)",
    "feed-forward": r"feed-forward branch .*(down\.weight|end2)",
    "stream": "residual stream",
    "embedding": "embedding on its way .*embed.weight",
    "head": "logits of (head|embed).weight",
    "loss": "loss of (head|embed).weight",
    "attention scale": r"q\.weight",
}


def report(options: Mapping[str, Any], wrong: Mapping[str, float] | None = None, **more: Any) -> mue.checks.Report:
    plan, model, batch = structure(**options, wrong=wrong)
    return mue.check(model, plan, batch, raises=False, only=FORWARD, **more)


@pytest.mark.parametrize("name", STRUCTURES)
def test_right_structures_are_measured_whole(name: str) -> None:
    found = report(STRUCTURES[name])
    assert found.ok and not found.warnings, found
    multipliers, scales = (next(f for f in found.findings if f.check == check) for check in FORWARD)
    # two branches a block, the stream at every join but the first, the embedding, the loss and the logits
    assert multipliers.count >= 2 * L + (L - 1) + 3 and scales.count == L


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", STRUCTURES)
def test_wrong_multipliers_are_named_in_every_structure(name: str, wrong: str) -> None:
    found = report(STRUCTURES[name], {wrong: 0.25})
    named = [f for f in found.failures if re.search(WRONG[wrong], f.where)]
    assert (named and "0.25 of it" in named[0].measured) or wrong == "attention scale", found


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_head_is_read_whatever_the_model_returns(output: str) -> None:
    """From the product with its weight: no logits are needed, and a loss of other logits than those returned is seen."""
    assert report({"output": output}).ok
    for wrong in ({"head": 0.5}, {"head": 2.0}, {"loss": 2.0}):
        if output == "logits" and "loss" in wrong:
            continue  # what became of that loss nobody was told; it is still read
        found = report({"output": output}, wrong)
        assert any("head.weight" in f.where for f in found.failures), found


def test_a_step_needs_the_loss_only_wherever_it_stands() -> None:
    for output in OUTPUTS:
        plan, model, batch = structure(output=output)
        if output == "logits":
            with pytest.raises(CheckError, match="returned no loss for this batch"):
                mue.check(model, plan, batch)
            batch_loss = lambda m, b: F.cross_entropy(m(*b).flatten(0, 1), b[1].flatten())  # noqa: E731
            assert mue.check(model, plan, batch, loss=batch_loss).ok
        else:
            assert mue.check(model, plan, batch).ok
        logits = logits_of(model(*batch))
        assert (logits is None) == (output in ("loss", "dict of loss", "dataclass of loss")), output


def test_what_was_planned_and_not_measured_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model, batch = structure()

    def norm(x: Tensor) -> Tensor:  # made by nothing that is known here
        return x / x.abs().amax(-1, keepdim=True)

    monkeypatch.setattr(model.norm, "forward", norm)
    found = mue.check(model, plan, batch, raises=False, only=FORWARD)
    assert not found.ok and not found.failures
    assert [(f.check, f.where) for f in found.unmeasured] == [("multipliers", "head.weight")]
    lines = [line.split() for line in str(found).splitlines() if line.startswith("multipliers ")]
    assert [line[1] for line in lines] == ["pass", "not"], found  # a line of its own
    with pytest.raises(CheckError, match=r'1 planned thing could not be measured.*allow_unmeasured=\["multipliers"\]'):
        mue.check(model, plan, batch, only=FORWARD)
    for allowed in ("multipliers", "head.weight", "head*"):
        allowing = mue.check(model, plan, batch, only=FORWARD, allow_unmeasured=[allowed])
        assert allowing.ok and not allowing.unmeasured and "not measured (allowed)" in str(allowing)
    with pytest.raises(CheckError):
        mue.check(model, plan, batch, only=FORWARD, allow_unmeasured=["attention scale"])


def test_what_nobody_asked_for_is_left_out() -> None:
    plan, model, _ = structure()
    found = mue.check(model, plan, raises=False, only=FORWARD)
    assert found.ok and {f.status for f in found.findings} == {"left out"}
