"""The gradient noise scale against models whose noise is known, and of a small trained run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mue.lab.data.spec import open_corpus
from mue.lab.train.task import task_of
from mue.lab.trained.find import TrainedRun, find
from mue.lab.trained.noise_scale import Gradients, NoiseScale, gradients, noise_scale, of_run
from support.trained import moe_run_of_bytes

SIGMA = torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64)  # standard deviations of the four gradients
AWAY = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)  # w minus the mean of the examples: the true gradient
KNOWN = float(SIGMA.square().sum() / AWAY.square().sum())  # tr Σ / |G|² of ½|w - x|², x ~ N(μ, σ²)


def quadratic(seed: int, groups: int, many: int, tokens: int, scale: float = 1.0) -> Gradients:
    """Gradients of ½|w - x|², an example a token: w - x, whose mean and covariance are known."""
    w, random = nn.Parameter(AWAY.clone()), torch.Generator().manual_seed(seed)

    def losses() -> Iterator[Tensor]:
        for _ in range(many):
            x = scale * SIGMA * torch.randn(tokens, 4, generator=random, dtype=torch.float64)
            yield 0.5 * (w - x).square().sum(1).mean()

    return gradients([w], (losses() for _ in range(groups)), tokens)


@pytest.mark.parametrize(("many", "tokens"), [(8, 1), (4, 7), (1, 16)])
def test_a_quadratic_has_the_noise_scale_it_was_given(many: int, tokens: int) -> None:
    found = noise_scale(quadratic(0, 64, many, tokens))
    assert found.low < KNOWN < found.high and found.value == pytest.approx(KNOWN, rel=0.5)
    assert found.trace == pytest.approx(float(SIGMA.square().sum()), rel=0.2)
    assert found.tokens == 64 * many * tokens


def test_both_moments_are_without_bias_and_the_interval_holds_what_it_should() -> None:
    seen = [quadratic(seed, 16, 4, 2) for seed in range(150)]
    found = [noise_scale(s) for s in seen]
    for values, true in (
        ([f.trace for f in found], float(SIGMA.square().sum())),
        ([f.square for f in found], float(AWAY.square().sum())),
    ):
        mean = math.fsum(values) / len(values)
        error = math.sqrt(math.fsum((v - mean) ** 2 for v in values)) / len(values)
        assert abs(mean - true) < 3.5 * error
    assert sum(f.low < KNOWN < f.high for f in found) / len(found) > 0.85
    # the control: without taking its own noise off, |ḡ|² is too large by tr Σ / tokens
    naive = [math.fsum(math.fsum(row) for row in s.products) / 16**2 for s in seen]
    assert math.fsum(naive) / len(naive) > 1.04 * float(AWAY.square().sum())


def test_it_grows_with_the_noise_and_not_with_the_size_of_the_batches() -> None:
    one, louder, larger = (noise_scale(quadratic(1, 64, *of)) for of in ((8, 2), (8, 2, 2.0), (8, 32)))
    assert louder.trace == pytest.approx(4 * one.trace, rel=1e-9)
    assert louder.value > 2 * one.value
    assert larger.value == pytest.approx(one.value, rel=0.5) and larger.high - larger.low < one.high - one.low


def test_it_is_the_papers_formula_of_two_batch_sizes() -> None:
    """1812.06162, appendix A.1: from |G|² at B_small and at B_big = all of them."""
    seen = quadratic(2, 5, 3, 4)
    small, big = 4, 5 * 3 * 4
    at_small, at_big = sum(seen.squares) / 5, sum(map(sum, seen.products)) / 25
    square = (big * at_big - small * at_small) / (big - small)
    trace = (at_small - at_big) / (1 / small - 1 / big)
    found = noise_scale(seen)
    assert (found.square, found.trace) == (pytest.approx(square, rel=1e-12), pytest.approx(trace, rel=1e-12))


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drowns in its noise after 16 tokens.*--batches"):
        noise_scale(quadratic(3, 2, 8, 1, 100.0))
    with pytest.raises(ValueError, match="two batches at least"):
        noise_scale(quadratic(3, 1, 8, 1))


def test_an_upper_end_that_the_batches_do_not_bound_is_infinite() -> None:
    # without the first group the two others say nothing of |G|²
    loose = Gradients(1, 2, (2.0, 2.0, 2.0), ((3.0, 0.9, 0.9), (0.9, 1.0, -0.9), (0.9, -0.9, 1.0)))
    found = noise_scale(loose)
    assert 0 == found.low < found.value < found.high == math.inf
    assert math.isfinite(noise_scale(quadratic(0, 64, 8, 1)).high)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_of_a_run_that_diverged(bad: float) -> None:
    seen = quadratic(0, 4, 4, 2)
    rows = ((bad, -bad, *seen.products[0][2:]), *seen.products[1:])
    for broken in (replace(seen, squares=(bad, *seen.squares[1:])), replace(seen, products=rows)):
        with pytest.raises(ValueError, match="gradients are not finite: its run diverged"):
            noise_scale(broken)


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_run_of_bytes(texts, tmp_path_factory.mktemp("noise"))


def test_a_trained_run_has_one_and_it_is_that_of_its_batches(run: Path) -> None:
    found = find(run)
    corpus, here = open_corpus(found.run.data["source"]), torch.device("cpu")
    measured: NoiseScale = of_run(found, corpus, 4, here)
    assert measured.tokens == 4 * 256 and 0 < measured.low < measured.value < measured.high
    assert of_run(found, corpus, 4, here) == measured  # nothing of the run moved
    # by hand: the gradient of each whole batch, and of each sequence in it
    model = found.model().train()
    data = task_of(found.run.settings).batches(found.run, corpus)
    squares, means = [], []
    for step in range(20, 24):
        tokens, following = data.at(step)
        for i in [None, *range(8)]:
            model.zero_grad()
            part = slice(None) if i is None else slice(i, i + 1)
            model(tokens[part], following[part]).loss.backward()
            flat = torch.cat(
                [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().double() for p in model.parameters()]
            )
            if i is None:
                means.append(flat)
            else:
                squares.append(float(flat.square().sum()))
    whole = float(torch.stack(means).mean(0).square().sum())
    square = (1024 * whole - 32 * sum(squares) / 32) / (1024 - 32)
    assert measured.square == pytest.approx(square, rel=1e-3)


def test_a_diverged_run_has_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(run)
    model = found.model()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    monkeypatch.setattr(TrainedRun, "model", lambda self: model)
    with pytest.raises(ValueError, match="loss is not finite: its run diverged"):
        of_run(found, open_corpus(found.run.data["source"]), 2, torch.device("cpu"))
