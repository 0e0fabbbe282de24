"""DTop-p: top-p whose p is moved so that a given number of experts is active on average (2512.13996).

Shape suffixes: T tokens, N experts, K slots: the most that a token of this batch uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mue.layouts.layout import Layout
from mue.moe.routers.at_init import at_init, mass_for, standardised
from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.common import one_of_all
from mue.moe.routers.controller import MOVES, PIController
from mue.moe.routers.matrix import MatrixRouter
from mue.moe.routers.prefix import even_sums, prefix_of_mass
from mue.moe.routing import Routing
from mue.shapes.settings import Setting


def start(active: int, experts: int, settings: Mapping[str, Any]) -> float:
    """p_0: as set, else such that a experts are active at θ = 1."""
    return mass_for(active, experts) if settings["start"] is None else float(settings["start"])


def moments(active: int, experts: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    """1 and E[Σw²] at p_0: known whatever the init std, for the logits are standardised."""
    return 1.0, at_init(experts, start(active, experts, settings), None).even_square


def mean_active(active: int, experts: int, settings: Mapping[str, Any]) -> float:
    """The mean number of active experts at p_0, which is a unless p_0 is set."""
    return at_init(experts, start(active, experts, settings), None).active


@router(
    "dtop-p",
    place=2.2,
    revision=1,  # -ln(1 - p) is moved in place of p, by other factors
    unit_sum=True,
    matrix=True,
    scalars=("theta",),
    grouped=False,
    settings={
        "control": Setting(
            default="model", choices=("model", "layer"), meaning="one p for the whole model, or one for each layer"
        ),
        "start": Setting(
            default=None, kind=float, low=0.0, high=1.0, low_open=True,
            meaning="p before the first step; else such that a experts are active at init",
        ),
        "moves": Setting(
            default="tail", choices=MOVES, meaning="what is moved: -ln(1 - p), the mass left out, or p itself as in the paper",
        ),
        # The paper's K_p and K_i are not published in what could be read; of these 2·K_p + K_i < 2, which "tail" needs and no more.
        "proportional": Setting(default=0.1, low=0.0, meaning="K_p: how much of an error it moves by at once"),
        "integral": Setting(default=1.5, low=0.0, meaning="K_i: how much of the sum of all errors it has moved by"),
    },
    losses={"load_balance": 1e-4, "entropy": 1e-3},
    moments=moments,
    mean_active=mean_active,
)  # fmt: skip
class DTopPRouter(MatrixRouter):
    """P = softmax(θ·z̃), z̃ the standardised logits of a token; it uses the most probable experts up to the one with which they have p, and
    their P divided by its sum as weights.

    `theta` (1,) is trained: each layer's own sharpness, and so its own mean number of active experts. p is moved after every step
    by a :class:`PIController`, so that their mean over layers is a (`control = "model"`: one p, which the model owns), or that of
    every layer (`"layer"`: slightly worse in the paper, exact in every layer). In evaluation p stays.

    `pairs` and `tokens` count what was routed in training since the last step, so that several forward passes of one step (accumulated
    gradients; a recomputed pass, which counts twice over) give their mean. Under data parallelism sum both over the ranks before
    :meth:`end_step_`.
    """

    pairs: Tensor
    tokens: Tensor
    controller: PIController | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.theta = nn.Parameter(torch.ones(1))
        self.register_buffer("pairs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        # without a model around it a router controls itself
        self.controller = _controller([self])

    @classmethod
    def shared(cls, routers: Sequence[Any]) -> nn.Module | None:
        """One controller for those that are controlled together."""
        together = [one for one in routers if one.options.settings["control"] == "model"]
        for one in together:
            one.controller = None
        return SharedController(together) if together else None

    def layout(self) -> Sequence[Layout]:
        """θ starts at 1 and is trained like a gain: its gradient does not depend on the width."""
        return [*super().layout(), Layout("theta", "norm", ("vector",), start=1.0)]

    @property
    def p(self) -> Tensor:
        """The mass in use."""
        return (self.controller or self.common.controller).p  # type: ignore[union-attr, return-value]

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes tokens: P = T·K pairs, token-major, those beyond a token's own being padding (expert N, weight 0)."""
        logit_TN = self.logits(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            sharp_TN = standardised(logit_TN) * self.theta.to(logit_TN.dtype)
            prob_TN = torch.softmax(sharp_TN, dim=1)
            expert_TK = prefix_of_mass(prob_TN, float(self.p), 2 * self.active)
            routing = self.routing(expert_TK, even_sums(sharp_TN, expert_TK, self.route_scale))
        if self.training:
            with torch.no_grad():
                self.pairs += routing.stats["load"].sum()
                self.tokens += len(x_TD)
        routing.scores_TN, routing.logits_TN = prob_TN, sharp_TN
        return routing

    def error(self) -> Tensor:
        """(T - a_t) / N since the last step, in float64; 0 where nothing was routed."""
        mean = self.pairs.double() / self.tokens.clamp(min=1)
        return torch.where(self.tokens > 0, self.active - mean, 0.0) / self.experts

    @torch.no_grad()
    def end_step_(self, bias_speed: float) -> None:
        """Moves its own p, where it has one; else the model's controller reads the counts after all layers."""
        if self.controller is not None:
            self.controller.step_(self.error())
            self.forget_()

    @torch.no_grad()
    def forget_(self) -> None:
        """The counts of this step are used up."""
        self.pairs.zero_()
        self.tokens.zero_()


def _controller(routers: Sequence[DTopPRouter]) -> PIController:
    """A controller with the factors that all have; p_0 is the mean of the layers' own."""
    factors = one_of_all(
        routers, ("proportional", "integral", "moves"), 'or control = "layer", which gives each layer a p of its own'
    )
    starts = [start(one.active, one.experts, one.options.settings) for one in routers]
    return PIController(sum(starts) / len(starts), *factors)


class SharedController(nn.Module):
    """One p for several layers, by the mean of their errors.

    Args:
        routers: of those layers; they are not a part of it.
    """

    def __init__(self, routers: Sequence[DTopPRouter]) -> None:
        super().__init__()
        self.controller = _controller(routers)
        self.routers = tuple(routers)  # a tuple is no part of a module: the layers own them

    @torch.no_grad()
    def end_step_(self, bias_speed: float) -> None:
        """Moves p, and the layers count anew."""
        self.controller.step_(torch.stack([one.error() for one in self.routers]).mean())
        for one in self.routers:
            one.forget_()
