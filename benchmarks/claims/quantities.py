"""What a claim can ask of a run: numbers from its metrics, and from the model that it left.

Metrics have the routers of each evaluated step, in training (:func:`mue.moe.diagnostics.measure`); "at the end" is their mean over the last 100
steps, of the layer for which it is largest where several layers differ and the claim is about the worst.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mue.lab.data import Corpus
from mue.lab.train.run import Run, Store
from mue.lab.train.step import moe_layers
from mue.lab.train.task import Batch, task_of
from mue.lab.trained.evaluate import score
from mue.lab.trained.find import find, untrained
from mue.moe.diagnostics import active_counts
from mue.moe.layer import self_changing
from mue.moe.losses import consistency_loss
from mue.moe.routers.base import active_experts

END = 100  # steps
HELD = 0.25  # |mean active − T| that counts as held
WINDOW = 10  # steps
DRAWS = 8  # of the experts: with few experts two draws are often the same


@dataclass
class Trained:
    """A run that has ended, as quantities see it.

    Attributes:
        result: what ``result.json`` holds. store, corpus: where its files and its text are.
    """

    run: Run
    result: Mapping[str, Any]
    store: Store
    corpus: Corpus

    @cached_property
    def seen(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """(step, a measurement of each layer) of every evaluated step, the first step's being at init."""
        return [(row["step"], row["routers"]) for row in self.store.metrics(self.run.key) if "routers" in row]

    @property
    def at_end(self) -> list[list[dict[str, Any]]]:
        """The measurements of the last :data:`END` steps."""
        last = self.seen[-1][0]
        return [layers for step, layers in self.seen if step > last - END]

    @cached_property
    def batches(self) -> Any:
        return task_of(self.run.settings).batches(self.run, self.corpus)

    def model(self) -> torch.nn.Module:
        """The model it left, anew, in eval mode; ``ValueError`` where its weights were not kept."""
        return find(self.store.folder(self.run.key)).model()

    def routings(self, model: torch.nn.Module, step: int) -> Any:
        """What a model's routers make of a training batch, in training mode."""
        model.train()
        with torch.no_grad():
            return task_of(self.run.settings).loss(model, self.batches.at(step)).routings


@dataclass(frozen=True)
class Quantity:
    """One number of a run.

    Attributes:
        of: computes it; infinite where what it looks for never came. numbered: it is asked with a number.
    """

    of: Callable[..., float]
    numbered: bool


QUANTITIES: dict[str, Quantity] = {}


def quantity(*, numbered: bool = False) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Register a function under its own name."""

    def register(of: Callable[..., float]) -> Callable[..., float]:
        QUANTITIES[of.__name__] = Quantity(of, numbered)
        return of

    return register


def measure(trained: Trained, names: frozenset[str]) -> dict[str, float | None]:
    """Quantities by name, sorted, in six digits; None for what never came, and of a run that diverged."""
    out: dict[str, float | None] = {}
    for name in sorted(names):
        known, _, number = name.partition("@")
        one = QUANTITIES[known]
        if trained.result["val_loss"] is None:
            out[name] = None
            continue
        value = one.of(trained, float(number)) if one.numbered else one.of(trained)
        out[name] = float(f"{value:.6g}") if math.isfinite(value) else None
    return out


# ---- from metrics -----------------------------------------------------------------------------------------------------------


@quantity()
def loss(trained: Trained) -> float:
    """The validation loss, in nats per token."""
    return float(trained.result["val_loss"])


@quantity()
def active(trained: Trained) -> float:
    """Mean active experts of a token at the end, over layers."""
    return statistics.fmean(layer["active"] for layers in trained.at_end for layer in layers)


@quantity()
def active_at_init(trained: Trained) -> float:
    """Mean active experts of a token in the first step."""
    return statistics.fmean(layer["active"] for layer in trained.seen[0][1])


@quantity()
def active_off(trained: Trained) -> float:
    """How far the mean number of active experts at the end is from the plan's a, either way."""
    target = statistics.fmean(b.active for b in trained.run.plan.target.per_layer if b.experts)
    return abs(active(trained) - target)


@quantity()
def active_spread(trained: Trained) -> float:
    """Standard deviation over steps, from step :data:`END` on (half of a shorter run's), of the mean number of active experts."""
    begin = min(END, trained.seen[-1][0] / 2)
    means = [statistics.fmean(x["active"] for x in layers) for step, layers in trained.seen if step >= begin]
    return statistics.pstdev(means)


@quantity()
def max_vio(trained: Trained) -> float:
    """MaxVio (2408.15664) of batches at the end, of the layer where it is worst."""
    return max(
        statistics.fmean(layer["max_vio"] for layer in of_layer) for of_layer in zip(*trained.at_end, strict=True)
    )


@quantity()
def max_vio_ever(trained: Trained) -> float:
    """The largest MaxVio of any evaluated step and layer, the init included."""
    return max(layer["max_vio"] for _, layers in trained.seen for layer in layers)


@quantity()
def idle(trained: Trained) -> float:
    """Share of the tokens without any expert at the end, of the layer where it is largest."""
    return max(statistics.fmean(layer["idle"] for layer in of_layer) for of_layer in zip(*trained.at_end, strict=True))


@quantity()
def layer_unevenness(trained: Trained) -> float:
    """Standard deviation over mean of an expert's share of the tokens at the end: within layers, the mean over layers."""
    return statistics.fmean(_variation(layer["share"]) for layers in trained.at_end for layer in layers)


@quantity()
def pool_unevenness(trained: Trained) -> float:
    """The same of the shares that all layers of a pool give an expert together."""
    return statistics.fmean(
        _variation([sum(of_expert) for of_expert in zip(*(x["share"] for x in layers), strict=True)])
        for layers in trained.at_end
    )


def _variation(shares: list[float]) -> float:
    return statistics.pstdev(shares) / statistics.fmean(shares)


# ---- from the model ---------------------------------------------------------------------------------------------------------


@quantity(numbered=True)
def loss_at(trained: Trained, number: float) -> float:
    """The validation loss with another number of active experts, their weights renormalised to the sum they had (scale "mean")."""
    model = trained.model()
    with active_experts(model, int(number), "mean"):
        return score(lambda tokens: model(tokens).logits, trained.batches.validation(), None).per_token.value


@quantity(numbered=True)
def theta(trained: Trained, number: float) -> float:
    """θ of DTop-p in a layer, counted from 0."""
    return float(moe_layers(trained.model())[int(number)].router.theta.detach())


@quantity(numbered=True)
def recovery(trained: Trained, number: float) -> float:
    """Steps of the controllers alone until the mean number of active experts is held again, θ of every layer times a number."""
    return _recovery(trained, lambda router: router.theta.mul_(number))


@quantity(numbered=True)
def recovery_of_weight(trained: Trained, number: float) -> float:
    """The same with every router's matrix times a number."""
    return _recovery(trained, lambda router: router.weight.mul_(number))


def _recovery(trained: Trained, disturb: Callable[[Any], Any], most: int = 100) -> float:
    """The first of ``most`` steps from which on the mean over :data:`WINDOW` steps is held; infinite without one.

    Over several steps, for the text of a single batch moves its mean by as much. The parameters stand still: at its end a run's rate has
    decayed to nothing, so that a run which went on would move no weight either.
    """
    model = trained.model()
    target = statistics.fmean(b.active for b in trained.run.plan.target.per_layer if b.experts)
    with torch.no_grad():
        for layer in moe_layers(model):
            disturb(layer.router)
    means = []
    for step in range(most):
        routings = trained.routings(model, step)
        for part in self_changing(model):
            part.end_step_(0.0)
        means.append(_mean_active_of(routings))
    windows = [statistics.fmean(means[i : i + WINDOW]) for i in range(most - WINDOW + 1)]
    beyond = [i for i, mean in enumerate(windows) if abs(mean - target) > HELD]
    return 0.0 if not beyond else math.inf if beyond[-1] == len(windows) - 1 else float(beyond[-1] + 1)


@quantity(numbered=True)
def shift_of_weight(trained: Trained, number: float) -> float:
    """By how much the mean number of active experts moves, either way, when every router's matrix is multiplied by a number."""
    model = trained.model()
    before = _mean_active_of(trained.routings(model, 0))
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.mul_(number)
    return abs(_mean_active_of(trained.routings(model, 0)) - before)


def _mean_active_of(routings: Any) -> float:
    """Active experts of a token, mean over tokens and layers."""
    return statistics.fmean(float(active_counts(routing).double().mean()) for routing in routings)


@quantity()
def harder_tokens(trained: Trained) -> float:
    """Mean active experts of the half of the tokens with the higher loss, less that of the other half, over layers."""
    model = trained.model()
    more: list[float] = []
    with torch.no_grad():
        for tokens, following in trained.batches.validation():
            output = model(tokens, following)
            cost_T = torch.nn.functional.cross_entropy(
                output.logits.flatten(0, 1), following.flatten(), reduction="none"
            )
            hard_T = cost_T > cost_T.median()
            counts = [active_counts(routing).double() for routing in output.routings]
            more += [float(c[hard_T].mean() - c[~hard_T].mean()) for c in counts]
    return statistics.fmean(more)


@quantity()
def disagreement(trained: Trained) -> float:
    """Symmetric divergence of the predictions of two draws of the experts in training mode (the consistency loss), in nats."""
    return _draws(trained, trained.model())[0]


@quantity()
def disagreement_at_init(trained: Trained) -> float:
    """The same before the first step."""
    return _draws(trained, untrained(trained.run))[0]


@quantity()
def draw_variance(trained: Trained) -> float:
    """Variance of a token's predicted probabilities over draws of the experts, summed over the vocabulary."""
    return _draws(trained, trained.model())[1]


def _draws(trained: Trained, model: torch.nn.Module) -> tuple[float, float]:
    """Consistency loss, mean over pairs, and variance of :data:`DRAWS` passes over one training batch, as so many steps draw their experts."""
    model.train()
    batch: Batch = trained.batches.at(0)
    logits = []
    with torch.no_grad():
        for _ in range(DRAWS):
            logits.append(model(batch[0]).logits)
            for part in self_changing(model):
                part.end_step_(0.0)
    pairs = [float(consistency_loss(a, b)) for a, b in itertools.combinations(logits, 2)]
    variance = torch.stack([torch.softmax(x.double(), -1) for x in logits]).var(0).sum(-1).mean()
    return statistics.fmean(pairs), float(variance)
