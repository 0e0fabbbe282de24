"""Roles as data: what each parameter of a transformer is for, in one table that everything else asks.

Rules have one row per role, plans one entry, layouts name one for each parameter. In files and messages a role is its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mue.shapes import Block, Transformer

# The kinds of which a block holds either one or the other: its feed-forward branch, dense or routed, with the router.
FEED_FORWARD = frozenset({"ffn", "expert", "shared", "router"})


@dataclass(frozen=True)
class Role:
    """What one parameter does. One parameter has one role.

    Attributes:
        name: as layouts, plans and files write it.
        kind: ``embedding``, ``attention``, ``ffn`` (dense), ``expert`` (routed), ``shared``, ``router``, ``norm``, ``bias``
            or ``head``; of images also ``patch``, ``condition`` and ``modulation``.
        part: which projection of its kind: ``q, k, v, o``, or ``up, gate, down``; empty where there is one only.
        inside: it belongs to a block, so it has a depth, and depth rules reach it.
        reads_residual: its fan-in is the residual width d. Where a model puts a latent in between (latent attention, a
            router's own MLP), the matrix has its own fan-in f, and f/f* takes the place of the width's ratio.
        writes_residual: its output is added to the residual stream: o and the down projections.
        start: the constant that a gain (1) or a bias (0) starts at; None for a matrix, which is drawn.
        decays: weight decay applies. Gains and biases are not decayed (CompleteP, Table 1).
        trained: the optimizer moves it. Not the router's balance bias, which load statistics move (2408.15664).
        fallback: the role whose tuned values hold where this one has none: a dense base has no experts, and the rule gives
            their projections the dense ones' values.
        task: the field of a shape that brings it, such as ``image``; plans of shapes without that do not name it.
        like: the role of its class of weights (input, hidden), whose row a rule has for it where it has none of its own
            (:meth:`mue.rules.table.Rule.for_roles`).
        zero: it starts at 0 by what it is, whatever the rule: adaLN-zero (2212.09748).
    """

    name: str
    kind: str
    part: str = ""
    inside: bool = True
    reads_residual: bool = False
    writes_residual: bool = False
    start: float | None = None
    decays: bool = True
    trained: bool = True
    fallback: str | None = None
    task: str | None = None
    like: str | None = None
    zero: bool = False

    @property
    def drawn(self) -> bool:
        """It is a matrix that a plan draws at random; all others start at a constant."""
        return self.trained and self.start is None

    @property
    def vector(self) -> bool:
        """It is a gain or a bias: it starts at a constant and is trained."""
        return self.start is not None

    @property
    def gain(self) -> bool:
        """It multiplies what a norm puts out."""
        return self.kind == "norm"

    @property
    def hidden(self) -> bool:
        """It is a matrix inside a block, whose fan-in and fan-out both grow with the model; Muon orthogonalises these."""
        return self.drawn and self.inside

    @property
    def feed_forward(self) -> bool:
        """It belongs to the feed-forward branch, dense or routed, the router included."""
        return self.kind in FEED_FORWARD

    @property
    def tuned_as(self) -> tuple[str, ...]:
        """Roles whose tuned values hold for this one, its own first."""
        return (self.name,) if self.fallback is None else (self.name, self.fallback)

    def present(self, block: Block) -> bool:
        """Whether a block holds this role; those outside the feed-forward branch are in every block."""
        if self.kind == "ffn":
            return not block.is_moe
        if self.kind == "expert":
            return block.experts > 0
        if self.kind == "router":  # not every router has a matrix (hash, random), or a bias that balances
            kind = block.router_kind
            return block.experts > 0 and (kind.balance_bias if self.part == "bias" else kind.matrix)
        return self.kind != "shared" or block.shared_experts > 0

    def planned(self, shape: Transformer) -> bool:
        """Whether plans of a shape have an entry for it, be it with a count of 0."""
        return has_task(shape, self.task)


def _projections(kind: str, fallback: str | None = None) -> tuple[Role, ...]:
    """The three matrices of a feed-forward: up and gate read the residual stream, down writes to it."""
    return tuple(
        Role(
            f"{kind}_{part}",
            kind,
            part,
            reads_residual=part != "down",
            writes_residual=part == "down",
            # on a dense base the rule gives experts the dense projections' values (2605.23893: routed and
            # shared alike)
            fallback=fallback and f"{fallback}_{part}",
        )
        for part in ("up", "gate", "down")
    )


def _vector(name: str, kind: str, start: float, inside: bool = True) -> Role:
    return Role(name, kind, inside=inside, start=start, decays=False)


def _of_image(
    name: str,
    kind: str,
    like: str,
    part: str = "",
    *,
    reads_residual: bool = True,
    inside: bool = False,
    zero: bool = False,
) -> Role:
    """A matrix that only diffusion transformers have; µP holds for them by the classes that it has (2505.15270)."""
    return Role(name, kind, part, inside, reads_residual, task="image", like=like, zero=zero)


# Every role, in the order of the forward pass; iteration is over names.
ROLES: Mapping[str, Role] = MappingProxyType(
    {
        role.name: role
        for role in (
            Role("embedding", "embedding", inside=False),
            # fan-ins that no width changes (a patch's pixels, the sines of the time, a row of a table): input weights, as
            # the embedding is one (2203.03466, Table 8)
            _of_image("patch_embedding", "patch", "embedding", reads_residual=False),
            _of_image("time_embedding_in", "condition", "embedding", "in", reads_residual=False),
            # d → d, but outside the blocks: a hidden weight without a depth
            _of_image("time_embedding_out", "condition", "attention_q", "out"),
            _of_image("class_embedding", "condition", "embedding", "class", reads_residual=False),
            # d → 6d in every block, of the condition: a hidden weight as the block's others (2212.09748)
            _of_image("modulation", "modulation", "attention_q", inside=True, zero=True),
            Role("attention_q", "attention", "q", reads_residual=True),
            Role("attention_k", "attention", "k", reads_residual=True),
            Role("attention_v", "attention", "v", reads_residual=True),
            Role("attention_o", "attention", "o", writes_residual=True),
            *_projections("ffn"),
            *_projections("expert", fallback="ffn"),
            *_projections("shared", fallback="ffn"),
            Role("router", "router", reads_residual=True),
            Role("router_bias", "router", "bias", decays=False, trained=False),
            _vector("norm", "norm", start=1.0),
            _vector("qk_norm", "norm", start=1.0),
            _vector("bias", "bias", start=0.0),
            _vector("final_norm", "norm", start=1.0, inside=False),
            _of_image("final_modulation", "modulation", "attention_q", zero=True),
            Role("head", "head", inside=False, reads_residual=True),
        )
    }
)


def of_kind(*kinds: str) -> tuple[str, ...]:
    """Names of the roles of some kinds, in order."""
    return tuple(name for name, role in ROLES.items() if role.kind in kinds)


def of_part(*parts: str) -> tuple[str, ...]:
    """Names of the roles that are some part of their kind, in order."""
    return tuple(name for name, role in ROLES.items() if role.part in parts)


TASKS = tuple(dict.fromkeys(role.task for role in ROLES.values() if role.task is not None))
"""What shapes may have beyond a language model, as their fields are called."""


def has_task(shape: Transformer, task: str | None) -> bool:
    """Whether a shape has what belongs to one of :data:`TASKS`; to None belongs what all shapes have."""
    return task is None or getattr(shape, task) is not None


def roles_of(shape: Transformer) -> Mapping[str, Role]:
    """The roles that plans of a shape have, by name, in order: all but those of tasks that are not its own."""
    return {name: role for name, role in ROLES.items() if role.planned(shape)}
