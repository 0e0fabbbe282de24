"""Slow evidence on real text: coordinate check and initial-loss overlay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.data import Batches, Corpus, load_corpus
from mue.lab.models.language import LanguageModel
from mue.shapes import Transformer

pytestmark = pytest.mark.slow
BASE = mue.Dense(64, 64, 2, head_dim=32, sequence=64)
TUNED = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02)
STEPS, SEEDS = 10, (0, 1, 2)


@pytest.fixture(scope="module")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(texts, cache=tmp_path_factory.mktemp("cache"))


def changes(shape: Transformer, rule: str, corpus: Corpus, steps: int = STEPS) -> tuple[float, float]:
    """RMS change of the last hidden state and of the logits on a held batch after some steps, over seeds."""
    hidden_square = logit_square = 0.0
    for seed in SEEDS:
        plan = mue.transfer(BASE, shape, TUNED, rule=rule)
        model = LanguageModel(shape, plan.multipliers)
        plan.init_(model, seed)
        optimizer = torch.optim.AdamW(plan.param_groups(model))
        batches = Batches(corpus, "train", 64, 8, seed)
        held = batches.at(10_000)[0]
        states: list[torch.Tensor] = []
        model.final_norm.register_forward_hook(
            lambda module, given, out, states=states: states.append(given[0].detach())
        )

        def look(
            model: LanguageModel = model, held: torch.Tensor = held, states: list[torch.Tensor] = states
        ) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                logits = model(held).logits
            return states[-1], logits

        before = look()
        for step in range(steps):
            model(*batches.at(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = look()
        hidden_square += float((after[0] - before[0]).square().mean())
        logit_square += float((after[1] - before[1]).square().mean())
    return math.sqrt(hidden_square / len(SEEDS)), math.sqrt(logit_square / len(SEEDS))


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope in log-log."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


# Depth is flat in the limit: the random part of the stream shrinks as 1/√L, so the change still falls by 0.29 → 0.26 from
# 4 to 8 layers and is flat from there (0.26, 0.25, 0.27, 0.26 up to 48; standard parametrization: 0.5 → 4.4).
WIDTHS, DEPTHS = (64, 128, 256), (8, 16, 32)


def dense(width: int = 64, layers: int = 2) -> Transformer:
    return mue.Dense(width, width, layers, head_dim=32, sequence=64)


def moe(width: int = 64, layers: int = 2) -> Transformer:
    return mue.MoE.parse("8e2a", width=width, expert=width // 2, layers=layers, head_dim=32, sequence=64)


@pytest.mark.parametrize("kind", [dense, moe])
def test_updates_are_flat_in_width(kind, corpus: Corpus) -> None:
    found = [changes(kind(width=w), "complete-mue", corpus) for w in WIDTHS]
    assert abs(slope(WIDTHS, [h for h, _ in found])) < 0.15
    assert abs(slope(WIDTHS, [g for _, g in found])) < 0.2


@pytest.mark.parametrize("kind", [dense, moe])
def test_updates_are_flat_in_depth(kind, corpus: Corpus) -> None:
    found = [changes(kind(layers=n), "complete-mue", corpus) for n in DEPTHS]
    assert abs(slope(DEPTHS, [h for h, _ in found])) < 0.15
    assert abs(slope(DEPTHS, [g for _, g in found])) < 0.2


def test_the_published_head_row_shrinks_the_logit_update(corpus: Corpus) -> None:
    """The paper's head: both width factors and the forward multiplier; the logits' change falls about as 1/ρ_d."""
    found = [changes(dense(width=w), "complete-mue-paper", corpus)[1] for w in WIDTHS]
    assert slope(WIDTHS, found) == pytest.approx(-1.0, abs=0.35)


def test_control_standard_parametrization_is_not_flat(corpus: Corpus) -> None:
    wide = [changes(dense(width=w), "standard", corpus)[0] for w in WIDTHS]
    assert slope(WIDTHS, wide) > 0.35
    deep = [changes(dense(layers=n), "standard", corpus)[0] for n in DEPTHS]
    assert slope(DEPTHS, deep) > 0.3


def losses(shape: Transformer, corpus: Corpus, steps: int = 100, lr: float = 1.0) -> list[float]:
    """Training losses of the first steps with transferred values (every lr times ``lr``)."""
    plan = mue.transfer(BASE, shape, TUNED).scaled(lr)
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    batches = Batches(corpus, "train", 64, 8, 0)
    found = []
    for step in range(steps):
        loss = model(*batches.at(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.end_step_(1e-3)
        found.append(float(loss.detach()))
    return found


VARIANTS = {
    "dense 4x": mue.Dense(64, 256, 2, head_dim=32, sequence=64),
    "dense moe": mue.MoE.parse("8e8a", width=64, expert=8, layers=2, head_dim=32, sequence=64),
    "sparse": mue.MoE.parse("8e2a", width=64, expert=32, layers=2, head_dim=32, sequence=64),
    "capacity": mue.MoE.parse("64e2a", width=64, expert=32, layers=2, head_dim=32, sequence=64),
    "granular": mue.MoE.parse("32e8a", width=64, expert=8, layers=2, head_dim=32, sequence=64),
    "hybrid": mue.MoE.parse("16e4a4g1s", width=64, expert=16, layers=2, head_dim=32, sequence=64),
}


def gaps(shape: Transformer, reference: Sequence[float], corpus: Corpus, lr: float = 1.0) -> tuple[float, float]:
    """Mean difference to the dense base's losses over steps 20–60 and 60–100 (same batches, so noise cancels)."""
    own = losses(shape, corpus, lr=lr)
    difference = [a - b for a, b in zip(own, reference, strict=True)]
    return sum(difference[20:60]) / 40, sum(difference[60:]) / 40


def overlays(early: float, late: float) -> bool:
    """Close to the dense base after a hundred steps, and no widening gap."""
    return abs(late) < 0.12 and abs(late) < abs(early) + 0.05


def test_the_first_hundred_steps_overlay(corpus: Corpus) -> None:
    reference = losses(BASE, corpus)
    assert reference[-1] < reference[0] - 2  # it learns: the overlay is of something
    for name, shape in VARIANTS.items():
        early, late = gaps(shape, reference, corpus)
        assert overlays(early, late), (name, early, late)


def test_control_a_wrong_rate_does_not_overlay(corpus: Corpus) -> None:
    """What the overlay can see: a rate scaled twice. (A branch 32 times too strong it could not: 0.05 apart.)"""
    reference = losses(BASE, corpus)
    for wrong in (1 / 8, 8.0):
        early, late = gaps(VARIANTS["sparse"], reference, corpus, lr=wrong)
        assert not overlays(early, late), (wrong, early, late)
