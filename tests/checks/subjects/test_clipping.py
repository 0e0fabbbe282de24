"""Clipping that cannot be measured is warned of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mue
from mue.checks import CheckError
from mue.lab.models.language import LanguageModel
from support.wiring.case import BASE, OURS, TUNED, case


def test_clipping_is_warned_of_where_it_cannot_be_measured(tmp_path: Path) -> None:
    from mue.fold import fold

    shape = OURS["mue hybrid"]
    plan = fold(mue.transfer(BASE, shape, TUNED.replace(clip=1.0)))
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (2, 16))
    batch = tokens, tokens.roll(-1, 1)
    assert [f.check for f in mue.check(model, plan, batch).warnings] == ["clipping"]
    plain = lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # noqa: E731
    with pytest.raises(CheckError, match="the norm is that of the folded gradients"):
        mue.check(model, plan, batch, clip=plain)


@pytest.mark.parametrize("given", [1.0, "norm", torch.nn.utils.clip_grad_norm_, lambda model: None])
def test_what_cannot_be_called_without_arguments_is_refused(given: object) -> None:
    c = case("mixtral")
    c.clip = given  # type: ignore[assignment]
    with pytest.raises(ValueError, match="clip= is your own call that clips, without arguments"):
        c.check(only=["clipping"])


def test_a_call_that_raises_is_named_and_not_the_model() -> None:
    from mue.fold import clip_grad_norm_, coefficients

    c = case("mixtral")
    c.clip = lambda: clip_grad_norm_(c.plan, 1.0, coefficients=coefficients(c.plan, c.model))  # type: ignore[arg-type]
    (found,) = c.check(only=["clipping"]).failures
    assert found.where == "the call that clips" and found.measured.startswith("TypeError: ")
    assert found.mend.startswith("clip=lambda: mue.fold.clip_grad_norm_(")
