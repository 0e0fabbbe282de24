"""What a router is given, what it promises, and how its name finds it.

    @router("first", even=True)                # the facts: mue.shapes.routers.RouterKind
    class FirstExperts(BaseRouter):
        def forward(self, x_TD, given=None):
            return self.even(torch.arange(self.active).expand(len(x_TD), -1))

Shape suffixes: T tokens, D width, N experts, K active experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from mue.layouts.layout import Layout
from mue.moe.routers.ops import with_stats
from mue.moe.routing import Routing
from mue.shapes.block import Block
from mue.shapes.losses import AUXILIARY_LOSSES
from mue.shapes.routers import LOSSES, ROUTERS, RouterKind
from mue.util.errors import nearest, positive_int
from mue.util.registry import Registry

Balance = Literal["bias", "loss", "none"]
_Router = TypeVar("_Router", bound="type[BaseRouter]")
# How the weights over k′ experts sum against those over the k of training: (k′/k) to this power.
SCALES = {
    # R = k′ with A for k′ as well, so that A·R is as trained: the experts' mean (what Complete-muE would plan for k′ experts)
    "mean": 0.0,
    # R = k′ under the A of training, times √(k/k′): the branch keeps the variance of k independent experts' sum
    # (the authors' code of OLMoE 3)
    "root": 0.5,
    # R = k′ under the A of training: every expert counts as much as it did
    "sum": 1.0,
}


@dataclass(frozen=True)
class RouterInput:
    """What a router may read beside the hidden states. Nobody makes one where no router of the model reads it.

    Attributes:
        tokens: ids of the tokens, in the leading shape of the hidden states; (T,) by the time the router sees them.
        draw: which of several forward passes over one batch this is. A router that draws does so anew in each.
    """

    tokens: Tensor | None = None
    draw: int = 0

    def flat(self) -> RouterInput:
        """With the ids as (T,)."""
        return self if self.tokens is None else replace(self, tokens=self.tokens.reshape(-1))

    def variant(self, index: int) -> RouterInput:
        """What one of stacked variants is given, flat."""
        return self if self.tokens is None else replace(self, tokens=self.tokens[index].reshape(-1))


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """What a model says to its routers beyond the numbers of a block; each takes what concerns it.

    Attributes:
        settings: of the router, by name; a router finds them complete, defaults included (:class:`mue.shapes.routers.RouterKind`).
        route_scale: R, multiplied into the weights; the rule wants a.
        balance: "bias" moves the selection bias (:meth:`BaseRouter.end_step_`), "loss" puts ``load_balance`` into
            ``Routing.losses``, "none" does neither. A router without scores has nothing to balance.
        z_loss: put ``router_z`` into ``Routing.losses``, where there are logits. (These two are the run's, which has their
            coefficients; losses with coefficients of their own are among the settings.)
        seed, layer: of what is drawn, so that runs and layers draw differently. A model of your own gives each layer its number.
        pool: which of the model's pools of experts the layer reads, where it reads one. With several pools each has to have a number of
            its own: loads of those with one number are counted together.
    """

    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    route_scale: float = 1.0
    balance: Balance = "bias"
    z_loss: bool = False
    seed: int = 0
    layer: int = 0
    pool: int = 0


class BaseRouter(nn.Module):
    """What every router has; a router is a subclass with :meth:`forward`, under :func:`router`.

    A router without parameters gets by with this constructor. One with an (N, D) matrix calls it ``weight``; one with others
    says in :meth:`layout` what they are.

    Args:
        width: D.
        experts: N.
        active: a, experts per token.
        groups: g; a/g experts are chosen inside each group of N/g consecutive ones.
        options: see :class:`RouterOptions`.

    Raises:
        ValueError: a > N; g divides not N or not a; R not positive and finite; an unknown balance; what the router's kind
            refuses.
    """

    kind: RouterKind  # of the class, set by ``router``
    common: nn.Module | None = None  # what the model's routers of this class share; set by ``share``
    sequence: int | None = (
        None  # tokens of one sequence of the batch being routed, where they are known to be of equal length
    )

    def __init__(
        self, width: int, experts: int, active: int, groups: int = 1, options: RouterOptions | None = None
    ) -> None:
        super().__init__()
        options = options or RouterOptions()
        _check_counts(experts, active, groups)
        if not (math.isfinite(options.route_scale) and options.route_scale > 0):
            raise ValueError(
                f"route_scale={options.route_scale} must be positive and finite; the rule's value is {active}"
            )
        if options.balance not in ("bias", "loss", "none"):
            raise ValueError(f'balance={options.balance!r} is unknown: use "bias", "loss" or "none"')
        settings = self.kind.complete(self.kind.chosen(options.settings))
        # True: whether weights sum to one is asked by the routers that have a choice
        self.kind.check(active, experts, groups, True, settings)
        self.width, self.experts, self.active, self.groups = width, experts, active, groups
        self.options, self.route_scale = replace(options, settings=settings), float(options.route_scale)
        self.losses = self._losses_on()
        self._in_evaluation: tuple[int, float] | None = None

    def _losses_on(self) -> list[tuple[str, float, Callable[[Routing], Tensor]]]:
        """Name, coefficient and function of every loss that is on; those of the run have 1, since the trainer has theirs."""
        own = {name: value for name, value in self.options.settings[LOSSES].items() if value}
        asked = {"load_balance": self.options.balance == "loss", "router_z": self.options.z_loss}
        of_run = {name: 1.0 for name, on in asked.items() if on and not self.kind.even}
        if twice := own.keys() & of_run.keys():
            raise ValueError(
                f"the loss {min(twice)} is asked for by the run and among the {LOSSES} of the {self.kind.name} router:"
                " leave one of them out"
            )
        return [(name, value, AUXILIARY_LOSSES.lookup(name)) for name, value in (own | of_run).items()]

    def __call__(self, x_TD: Tensor, given: RouterInput | None = None, sequence: int | None = None) -> Routing:
        """Routes tokens by :meth:`forward`, and adds the losses that are on.

        Args:
            x_TD, given: see :meth:`forward`; what is not given is not passed on, so that a router that reads hidden states alone needs no
                second argument.
            sequence: tokens of one sequence, where they are known to be of equal length.
        """
        self.sequence = sequence
        routing: Routing = super().__call__(x_TD) if given is None else super().__call__(x_TD, given)
        routing.sequence = sequence
        if self.losses:
            # as the router itself: rounded probabilities would train something else
            with torch.autocast(x_TD.device.type, enabled=False):
                for name, coefficient, loss in self.losses:
                    value = loss(routing)
                    routing.losses[name] = value if coefficient == 1.0 else coefficient * value
        return routing

    @classmethod
    def from_block(cls, block: Block, width: int, options: RouterOptions) -> BaseRouter:
        """The router of a block in numbers. A router with options of its own in a block overrides this."""
        return cls(width, block.experts, block.active, block.groups, options)

    @classmethod
    def shared(cls, routers: Sequence[Any]) -> nn.Module | None:
        """What the routers of this class in one model have together (a controller, pooled counts), or None.

        A model calls it once all of them are built (:func:`share`), owns the module, and so keeps it in its state dict; each router
        finds it as ``self.common``. Its ``end_step_(bias_speed)`` is called after every optimizer step, after those of all
        routers: there alone its buffers may change.

        Args:
            routers: of this class, in the order of their layers.
        """
        return None

    def set_active(self, active: int | None, scale: str = "mean") -> None:
        """Evaluate with another number of active experts than was trained; training is left as it is.

        Args:
            active: k′, or None to go back.
            scale: what the weights of a token sum to, of :data:`SCALES`.

        Raises:
            ValueError: a router that cannot, k′ < 1 or above the number of experts or no multiple of the groups, an
                unknown scale.
        """
        if active is None:
            self._in_evaluation = None
            return
        if not self.kind.any_active:
            raise ValueError(
                f"the {self.kind.name} router cannot be evaluated with another number of active experts than it was trained with"
            )
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is unknown{nearest(scale, SCALES)}")
        active = positive_int("active", active)
        _check_counts(self.experts, active, self.groups)
        self._check_active(active)
        self._in_evaluation = active, (active / self.active) ** SCALES[scale]

    def _check_active(self, active: int) -> None:
        """What a router refuses of a k′ beyond N and its groups."""

    @property
    def in_use(self) -> tuple[int, float]:
        """Experts per token of a forward pass now, and the factor on what their weights sum to."""
        return (self.active, 1.0) if self.training or self._in_evaluation is None else self._in_evaluation

    @property
    def reads_batch(self) -> str:
        """How a token's experts in evaluation depend on what else is in its batch, or on its place there, and what to say instead; empty
        where they do not."""
        return ""

    def layout(self) -> Sequence[Layout]:
        """Role and axes of every parameter, by its name in the router. A router with more than ``weight`` adds to these rows."""
        return [Layout("weight", "router", ("out", "in"))] if self.kind.matrix else []

    def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
        """Routes tokens.

        Args:
            x_TD: (T, width), any float dtype.
            given: what else there is to read; None where no router of the model reads it.

        Returns:
            The pairs, weights in float32 (float64 for float64 input) and scaled by R.
        """
        raise NotImplementedError

    @torch.no_grad()
    def end_step_(self, bias_speed: float) -> None:
        """Called once after every optimizer step. What a router changes by itself, it changes here and keeps in buffers:
        forward may run twice (activation checkpointing), and a resumed run has to go on exactly."""

    def even(self, expert_TK: Tensor, dtype: torch.dtype = torch.float32) -> Routing:
        """The routing to these experts with weights R/a each."""
        # R/a each: they sum to R, as normalised gates do (docs/why/index.md#gates)
        weight_TK = expert_TK.new_full(
            expert_TK.shape, self.route_scale / self.active, dtype=torch.promote_types(dtype, torch.float32)
        )
        return self.routing(expert_TK, weight_TK)

    def routing(self, expert_TK: Tensor, weight_TK: Tensor) -> Routing:
        """The routing to (T, K) experts with these weights (R included), with its statistics."""
        return with_stats(
            Routing.from_topk(expert_TK, weight_TK, self.experts, route_scale=self.route_scale, stats=False)
        )

    def extra_repr(self) -> str:
        """The numbers, in the order of the signature."""
        return (
            f"width={self.width}, experts={self.experts}, active={self.active}, groups={self.groups},"
            f" route_scale={self.route_scale:g}"
        )


class Common(nn.ModuleDict):
    """What the routers of a model share, by their kinds' names; a model holds one only where there is something."""

    @torch.no_grad()
    def end_step_(self, bias_speed: float) -> None:
        """After every optimizer step, when all routers have had theirs."""
        for module in self.values():
            module.end_step_(bias_speed)  # type: ignore[operator]


def share(routers: Sequence[BaseRouter]) -> Common | None:
    """Make what a model's routers share (:meth:`BaseRouter.shared`), and tell each of them.

    Args:
        routers: of all layers, in order.

    Returns:
        The module that the model has to hold; None where no router shares anything.
    """
    classes: dict[type[BaseRouter], list[BaseRouter]] = {}
    for one in routers:
        classes.setdefault(type(one), []).append(one)
    found: dict[str, nn.Module] = {}
    for cls, own in classes.items():
        if (module := cls.shared(own)) is not None:
            found[own[0].kind.name.replace("-", "_").replace(".", "_")] = module
            for one in own:
                # past nn.Module, which would make it a part of every router: the model alone owns it and has it once
                one.__dict__["common"] = module
    return Common(found) if found else None


def _check_counts(experts: int, active: int, groups: int) -> None:
    if experts < 1 or active < 1 or groups < 1:
        raise ValueError(f"experts={experts}, active={active}, groups={groups} must all be at least 1")
    if active > experts:
        raise ValueError(f"active={active} exceeds experts={experts}: use at most {experts} active, or more experts")
    for name, number in (("experts", experts), ("active", active)):
        if number % groups:
            raise ValueError(
                f"groups={groups} does not divide {name}={number}: each group selects active/groups of its "
                f"experts/groups; use a divisor of {math.gcd(experts, active)}"
            )


ROUTER_CLASSES: Registry[type[BaseRouter]] = Registry("router", home="mue.moe.routers")


def router(name: str, place: float = 100.0, **facts: Any) -> Callable[[_Router], _Router]:
    """A decorator that makes a class the router ``name``: shapes may then name it, and the lab trains it.

    Args:
        place: where tables list it.
        facts: fields of :class:`mue.shapes.routers.RouterKind`.

    Raises:
        ValueError: the name is another router's.
    """

    def add(cls: _Router) -> _Router:
        ROUTER_CLASSES.register(name, place)(cls)
        cls.kind = RouterKind(name=name, defined_in=f"{cls.__module__}.{cls.__qualname__}", **facts)
        # under both registries: the facts without torch for shapes, the class for models
        ROUTERS.register(name, place)(cls.kind)
        return cls

    return add


def build(block: Block, width: int, options: RouterOptions) -> BaseRouter:
    """The router that a block names.

    Args:
        block: with routed experts. width: D. options: what the plan (R) and the run say to it.

    Raises:
        ValueError: an unknown name, with the nearest known one; settings beside the block's; what the router refuses.
    """
    if options.settings and dict(options.settings) != dict(block.router_settings):
        raise ValueError(
            f"the block says its router's settings ({dict(block.router_settings)}), and RouterOptions others"
            f" ({dict(options.settings)}): give them as the block's router_settings"
        )
    options = replace(options, settings=block.router_settings)
    return ROUTER_CLASSES.lookup(block.router).from_block(block, width, options)


@contextmanager
def active_experts(model: nn.Module, active: int | None, scale: str = "mean") -> Iterator[None]:
    """A model whose routers all use ``active`` experts per token in evaluation, as a context; afterwards they are as before.

    Args:
        model: with routers anywhere in it. active, scale: see :meth:`BaseRouter.set_active`.

    Raises:
        ValueError: what a router refuses, or there is none; no router is changed then.
    """
    routers = [module for module in model.modules() if isinstance(module, BaseRouter)]
    if not routers:
        raise ValueError("the model has no router, and so no number of active experts")
    before = [router._in_evaluation for router in routers]
    try:
        for each in routers:
            each.set_active(active, scale)
        yield
    finally:
        for each, state in zip(routers, before, strict=True):
            each._in_evaluation = state
