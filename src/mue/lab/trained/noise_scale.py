"""The gradient noise scale of a model at its weights (1812.06162): about the batch beyond which larger ones save few steps.

    B_simple = tr Σ / |G|²          Σ: covariance of the gradient of one token, G: the gradient of the expected loss

Gradients of many small batches at the same weights give both. With M of them, of b tokens each, mean ḡ and variance s² around it,
s² = tr Σ / b and |ḡ|² - s²/M = |G|², without bias: appendix A.1 there, for batches of b and of M·b tokens. It does not know what an
optimizer makes of the gradient, and it grows while a model trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from mue.lab.data.corpus import Corpus
from mue.lab.train.step import autocast
from mue.lab.train.task import Batch, task_of
from mue.lab.trained.find import TrainedRun
from mue.util.statistics import student_quantile


@dataclass(frozen=True)
class Gradients:
    """Gradients at one point, in groups of equally many small batches.

    Attributes:
        tokens: of a small batch. many: small batches in a group.
        squares: of each group the mean |g|² of its small batches. products: of the groups' mean gradients with each other.
    """

    tokens: int
    many: int
    squares: tuple[float, ...]
    products: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class NoiseScale:
    """B_simple in tokens with the ends of its 95 % interval, tr Σ of one token, |G|², and the tokens behind them.

    ``high`` is infinite where the batches do not bound it: without one of them the gradient drowns in its noise.
    """

    value: float
    low: float
    high: float
    trace: float
    square: float
    tokens: int


def noise_scale(seen: Gradients) -> NoiseScale:
    """B_simple of all groups; the interval is a jackknife over groups, of its logarithm.

    Raises:
        ValueError: fewer than two groups; gradients that are not finite, as of a run that diverged; or the gradient drowns in its own noise, with the fix.
    """
    groups = range(len(seen.squares))
    if len(groups) < 2 or len(groups) * seen.many < 3:
        raise ValueError("a noise scale needs the gradients of two batches at least, of three sequences in all")
    if not all(map(math.isfinite, chain(seen.squares, *seen.products))):
        raise ValueError("the model's gradients are not finite: its run diverged")
    trace, square = _moments(seen, groups)
    if square <= 0 or trace <= 0:
        raise ValueError(
            f"the gradient drowns in its noise after {len(groups) * seen.many * seen.tokens:,} tokens: its noise scale is larger than that;"
            " give more --batches"
        )
    without = [_moments(seen, [g for g in groups if g != left]) for left in groups]
    logs = [math.log(t / s) if s > 0 and t > 0 else math.inf for t, s in without]
    half, mean = math.inf, math.fsum(logs) / len(logs)
    if math.isfinite(mean):
        spread = math.fsum((x - mean) ** 2 for x in logs) * (len(logs) - 1) / len(logs)
        half = student_quantile(0.975, len(logs) - 1) * math.sqrt(spread)
    value = trace / square
    high = value * math.exp(half) if half < 700 else math.inf  # beyond it the exponential overflows
    tokens = len(groups) * seen.many * seen.tokens
    return NoiseScale(value, value * math.exp(-half), high, trace, square, tokens)


def _moments(seen: Gradients, groups: Sequence[int]) -> tuple[float, float]:
    """tr Σ of one token and |G|², of some of the groups."""
    n, small = len(groups), len(groups) * seen.many
    mean_square = math.fsum(seen.squares[g] for g in groups) / n
    square_of_mean = math.fsum(seen.products[g][h] for g in groups for h in groups) / n**2
    variance = (mean_square - square_of_mean) * small / (small - 1)
    return variance * seen.tokens, square_of_mean - variance / small


def gradients(parameters: Sequence[nn.Parameter], groups: Iterable[Iterable[Tensor]], tokens: int) -> Gradients:
    """Gradients of small batches, of which no more than one and its group's sum are held at a time, with the groups' means.

    Args:
        parameters: trained ones. groups: the mean losses of the small batches, equally many in each group. tokens: of one of them.
    """
    squares, means, many = [], [], 0
    for losses in groups:
        total, square, many = None, 0.0, 0
        for loss in losses:
            found = torch.autograd.grad(loss, parameters, allow_unused=True)  # an expert that got no token has none
            flat = torch.cat(
                [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, found, strict=True)]
            )
            square += float(flat.double().square().sum())
            total = flat if total is None else total + flat
            many += 1
        assert total is not None
        squares.append(square / many)
        means.append((total / many).double().cpu())
    stacked = torch.stack(means)
    products = (stacked @ stacked.T).tolist()
    return Gradients(tokens, many, tuple(squares), tuple(map(tuple, products)))


def of_run(found: TrainedRun, corpus: Corpus, batches: int, device: torch.device) -> NoiseScale:
    """The noise scale of a run's task loss at its weights, on batches that follow its training, one sequence a small batch.

    Args:
        found: the run. corpus: its data. batches: of the run's own size.

    Raises:
        ValueError: as :func:`noise_scale`; a loss that is not finite; weights that cannot be read.
    """
    run = found.run
    task, model = task_of(run.settings), found.model().to(device).train()  # its gradients as the training had them
    data = task.batches(run, corpus)
    assert run.plan.training is not None
    first = run.plan.training.steps

    def losses(batch: Batch) -> Iterator[Tensor]:
        for i in range(len(batch[0])):
            with autocast(device, run.settings):
                loss = task.loss(model, tuple(part[i : i + 1].to(device) for part in batch)).loss
            assert loss is not None
            if not bool(torch.isfinite(loss)):
                raise ValueError("the model's loss is not finite: its run diverged")
            yield loss

    groups = (losses(data.at(first + step)) for step in range(batches))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return noise_scale(gradients(parameters, groups, run.plan.training.batch // len(data.at(first)[0])))
