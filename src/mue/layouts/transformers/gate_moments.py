"""Moments of gates that do not sum to one, measured on the family's own router code: what ``gate_moments`` of a plan takes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mue.layouts.layout import canonical, pattern_of
from mue.layouts.observe.axis_sizes import Build, parameter_shapes
from mue.layouts.observe.config import attributes, integers, language_integers, subconfigs, text_config
from mue.layouts.observe.describe import Description
from mue.layouts.observe.gates import Gates, record_gates
from mue.layouts.observe.names import ACTIVE_EXPERTS, ACTIVE_GROUPS, EXPERT_GROUPS
from mue.layouts.observe.run import run_tokens
from mue.layouts.transformers.family import family_of
from mue.layouts.transformers.tiny import shrunk_enough

SMALL = {"expert width": 16, "shared width": 16, "ffn": 64}  # nothing that a router reads
VOCABULARY = 2048  # different tokens are all that a router at init can tell apart


@dataclass(frozen=True)
class Moments:
    """(E[Σw], E[Σw²]) over tokens at init, the model's own scale included, each with its standard error.

    ``draws`` counts independent routers: tokens of one router share its weights, so the error is that of a mean over routers.
    """

    m1: float
    m2: float
    error1: float
    error2: float
    draws: int
    tokens: int
    router_std: float

    @property
    def pair(self) -> tuple[float, float]:
        return self.m1, self.m2

    @property
    def how(self) -> str:
        """The plan's line, and how it was found."""
        return (
            f"gate_moments = [{self.m1:.6g}, {self.m2:.6g}]  # ± {self.error1:.1g}, {self.error2:.1g} over {self.draws} routers"
            f" of std {self.router_std:.4g}, {self.tokens:,} tokens each"
        )


def measure_gates(
    config: Any,
    build: Build,
    description: Description,
    *,
    router_std: float | None = None,
    draws: int = 8,
    tokens: int = 2048,
    seed: int = 0,
) -> Moments:
    """Run the model's own first router at init on random tokens and average over tokens and draws.

    Width, experts, active experts and groups are the config's; all that routers do not see is small. What they see is what
    the model's norms hand them, so a wider or differently drawn model has other moments.

    Args:
        description: of the config. router_std: of the router's weights; the planned one is tuned.init_std·√(base width/width).
            None: as the model's own code draws them.
        draws, tokens, seed: how many models, tokens each, and where random numbers start. Tokens of one model share its
            router, so more models lower the error and more tokens hardly do.

    Raises:
        ValueError: a model without routers that can be watched, or whose gates sum to one number already.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, to know the error: got {draws}")
    if not attributes(config, "vocabulary"):
        raise ValueError(
            f"{type(config).__name__} reads no tokens, and its routers are measured on such here: call"
            " mue.layouts.transformers.gate_moments.moments_of on a model and inputs of your own"
        )
    small = _small(config, build)
    routers = {f.pattern for f in description.patterns if f.row is not None and f.row.role == "router"}
    sums: list[tuple[float, float]] = []
    drawn: list[float] = []
    for draw in range(draws):
        torch.manual_seed(seed + draw)
        model = build(small).float().eval()
        # a matrix of one row is the gate of a shared expert
        weights = [p for n, p in model.named_parameters() if pattern_of(canonical(n)) in routers and p.shape[0] > 1]
        with torch.no_grad():
            for p in weights if router_std is not None else ():
                p.normal_(0.0, router_std or 0.0)
        drawn += [float(p.detach().std()) for p in weights]
        sums.append(moments_of(model, lambda m: run_tokens(m, _tokens(small, tokens)), only_first=True))
    means, errors = zip(*(_mean(list(column)) for column in zip(*sums, strict=True)), strict=True)
    std = router_std if router_std is not None else sum(drawn) / len(drawn)
    return Moments(means[0], means[1], errors[0], errors[1], draws, tokens, std)


@torch.no_grad()
def moments_of(model: nn.Module, run: Callable[[nn.Module], object], only_first: bool = False) -> tuple[float, float]:
    """(m1, m2) of a model as it is, over the tokens of ``run`` and over its layers: for inputs of your own.

    Raises:
        ValueError: no router was seen, or its weights sum to one number.
    """
    gates: dict[str, Gates] = {}
    with record_gates(model, gates, only_first):
        run(model)
    if not gates:
        raise ValueError("no module was handed expert indices and weights, so there is nothing to measure")
    if all(g.normalised for g in gates.values()):
        total = next(iter(gates.values())).total
        raise ValueError(
            f"these gates sum to {total:g} for every token: plan with normalised gates, nothing to measure"
        )
    return sum(g.total for g in gates.values()) / len(gates), sum(g.square for g in gates.values()) / len(gates)


def _small(config: Any, build: Build) -> Any:
    """The config with what routers see as it is."""
    inner = language_integers(config)
    seen = [*attributes(config, "width"), *attributes(config, "experts")]
    kept = {
        k: v
        for k, v in inner.items()
        if k in seen or re.fullmatch(f"{ACTIVE_EXPERTS}|{EXPERT_GROUPS}|{ACTIVE_GROUPS}", k)
    }
    unseen = {k: size for name, size in SMALL.items() for k in attributes(config, name)}
    vocabulary = {k: min(VOCABULARY, inner[k]) for k in attributes(config, "vocabulary")}
    tiny = family_of(getattr(config, "model_type", "")).tiny
    # later ones win: what routers see is the config's own, whatever makes the rest small
    changed: Mapping[str, Any] = {**tiny, **unseen, **vocabulary, **kept}
    return shrunk_enough(config, lambda c: {pattern_of(n) for n in parameter_shapes(build, c)}, dict(changed))


def _tokens(config: Any, count: int) -> Tensor:
    (name, *_) = attributes(config, "vocabulary")
    top = next(v for part in subconfigs(text_config(config)) for k, v in integers(part).items() if k == name)
    # short sequences: attention costs their square, and at init hardly changes what a router sees
    length = min(128, count)
    return torch.randint(3, top, (math.ceil(count / length), length))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = sum(values) / len(values)
    # n - 1: an unbiased variance over few draws
    spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))
