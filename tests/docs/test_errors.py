"""docs/errors.md: every text on the page is what is raised."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import mue
from mue.fold import fold
from mue.lab.models.language import LanguageModel
from mue.layouts.transformers.configs import default_config
from support.paths import ROOT

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
TEXTS = dict(re.findall(r"^### (.+?)$.*?^```text\n(.*?)\n```$", PAGE, flags=re.S | re.M))
TUNED = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02)
BASE, TARGET = mue.Dense(32, 32, 2, head_dim=16), mue.Dense(64, 64, 2, head_dim=16)
MOE = mue.MoE.parse("8e2a", width=64, expert=32, layers=2, head_dim=16)
PLAN = mue.transfer(BASE, TARGET, TUNED)


class WithAdapter(LanguageModel):
    def __init__(self) -> None:
        super().__init__(TARGET, PLAN.multipliers)
        self.adapter = nn.Linear(4, 4, bias=False)


class WithStaleRow(LanguageModel):
    def layout(self) -> list[mue.Layout]:
        return [*super().layout(), mue.Layout("adapter.weight", "unplanned", ("out", "in"))]


def planned() -> LanguageModel:
    return LanguageModel(TARGET, PLAN.multipliers)


def on_meta() -> None:
    with torch.device("meta"):
        model = planned()
    PLAN.init_(model)


def without_transformers() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        default_config("qwen3_moe")


def without_groups() -> None:
    model, x = planned(), torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    PLAN.init_(model)
    mue.check(model, PLAN, (x, x), torch.optim.AdamW(model.parameters(), lr=1e-3))


RAISED: dict[str, Callable[[], object]] = {
    "An extra is missing": without_transformers,
    "A model where numbers are wanted": lambda: mue.transfer(nn.Linear(2, 2), TARGET, TUNED),
    "One run without the other": lambda: mue.transfer(BASE, TARGET, TUNED, training=mue.Training(batch=1024, steps=10)),
    "A name that is not known": lambda: mue.transfer(BASE, TARGET, TUNED, rule="complete_mue"),
    "Gates that do not sum to one": lambda: mue.MoE.parse(
        "8e2a", width=64, expert=32, layers=2, router="softmax", normalize=False
    ),
    "A change that a rule has no answer to": lambda: mue.transfer(BASE, MOE, TUNED, rule="completep"),
    "A beta that cannot be carried": lambda: mue.transfer(
        BASE,
        TARGET,
        TUNED,
        base_training=mue.Training(batch=1024, steps=1000),
        training=mue.Training(batch=1024, steps=50),
        **mue.rules.SDE,
    ),
    "A folded plan as base": lambda: mue.transfer(fold(PLAN), mue.Dense(128, 128, 2, head_dim=16)),
    "No layout": lambda: PLAN.init_(nn.Sequential(nn.Linear(2, 2))),
    "A parameter without a row": lambda: PLAN.init_(WithAdapter()),
    "A row without a parameter": lambda: PLAN.init_(WithStaleRow(TARGET, PLAN.multipliers)),
    "Another model than planned": lambda: PLAN.init_(LanguageModel(mue.Dense(64, 128, 2, head_dim=16))),
    "Multipliers that the model does not have": lambda: PLAN.init_(LanguageModel(TARGET)),
    "A model without memory": on_meta,
    "Wired wrong": without_groups,
}


def begins(text: str, message: str) -> bool:
    """Whether a message begins as the page has it, with anything in place of each ``…``."""
    return re.match(".*?".join(map(re.escape, text.split("…"))), message, flags=re.S) is not None


def test_the_page_has_a_dozen_and_each_is_raised_here() -> None:
    assert list(TEXTS) == list(RAISED) and len(TEXTS) >= 12
    for part in PAGE.split("\n### ")[1:]:
        assert part.count("**Cause.**") == part.count("**Mend.**") == 1, part


@pytest.mark.parametrize("heading", RAISED)
def test_it_is_what_is_raised(heading: str) -> None:
    with pytest.raises(ValueError) as caught:
        RAISED[heading]()
    assert begins(TEXTS[heading], str(caught.value)), str(caught.value)
    others = [other for other in TEXTS if other != heading and begins(TEXTS[other], str(caught.value))]
    assert others == []  # negative control: no text is so short that any message begins with it
