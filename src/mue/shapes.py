"""A model and a run in numbers: no modules, no torch.

A base model is numbers, so dense → MoE, another depth or another expert count need no name matching. The symbols are
those of the paper: d ``width``, L ``layers``, H_act ``active_width`` (the sum of the down-projection fan-ins that one
token passes through; gate and up are never counted twice), N ``experts``, a ``active``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from mue.words import nearest

NORMALISED = "unit-sum"
MEASURED = "measured"
ROUTERS = ("sigmoid", "softmax")
# Optimizers whose transfer is derived for at least one rule (mue.rules.optimizers says what holds for which).
OPTIMIZERS = (
    "adamw",
    "adamw-independent",
    "adam-l2",
    "nadamw",
    "lion",
    "sgd",
    "muon",
    "lamb",
    "adafactor",
    "hyperball",
)
DECOUPLED = ("adamw", "nadamw", "lion")  # decay as torch's AdamW has it, p *= 1 - lr·wd, in every parameter


def positive_int(name: str, value: object) -> int:
    """``value`` as a positive whole number, or a ``ValueError`` that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def positive(name: str, value: object, *, zero: bool = False, below: float = math.inf) -> float:
    """``value`` as a finite number above 0 (or ≥ 0) and below ``below``, or a ``ValueError`` that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value < 0 or (value == 0 and not zero) or value >= below:
        limit = f" and below {below:g}" if below < math.inf else ""
        raise ValueError(f"{name} must be {'at least 0' if zero else 'greater than 0'}{limit}, got {value!r}")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Block:
    """``layers`` equal blocks: a dense feed-forward of width ``ffn``, or experts.

    Attributes:
        layers: how many consecutive blocks look like this.
        ffn: hidden width of a dense feed-forward; None for experts.
        expert: hidden width h of one routed expert.
        experts, active, groups: N routed experts, a of them per token, a/g from each of g groups.
        shared_experts, shared: number and width of the always-on experts (width: ``expert`` unless given).
        router: ``"sigmoid"`` or ``"softmax"`` scores.
        normalize: the weights sum to one over the active experts. The rule needs it, or ``gates="measured"``.
        gates: ``"unit-sum"`` or ``"measured"``; the latter with ``gate_moments`` = (E[Σw], E[Σw²]) over tokens at
            init, coefficient scale included.
    """

    layers: int
    ffn: int | None = None
    expert: int | None = None
    experts: int = 0
    active: int = 0
    groups: int = 1
    shared_experts: int = 0
    shared: int | None = None
    router: str = "sigmoid"
    normalize: bool = True
    gates: str = NORMALISED
    gate_moments: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        positive_int("layers", self.layers)
        if self.ffn is not None:
            positive_int("ffn", self.ffn)
            if self.expert is not None or self.experts or self.active or self.shared_experts:
                raise ValueError("a block is dense (ffn) or a MoE (moe, expert), not both")
            return
        self._check_experts()
        self._check_gates()

    def _check_experts(self) -> None:
        N, a, g = self.experts, self.active, positive_int("groups", self.groups)
        if self.expert is None:
            raise ValueError("a block needs ffn (dense) or moe and expert (experts and the width of one)")
        positive_int("expert", self.expert)
        if self.shared is not None:
            positive_int("shared", self.shared)
            if not self.shared_experts:
                raise ValueError(
                    f"shared = {self.shared} is the width of shared experts, but there are none: add e.g. 1s"
                )
        if N == 0 and a == 0 and self.shared_experts > 0:
            return  # shared experts only: a dense feed-forward by another name
        positive_int("experts", N)
        positive_int("active", a)
        if a > N:
            raise ValueError(f"{a} active of {N} experts: a token cannot use more experts than there are")
        if N % g or a % g:
            raise ValueError(f"{g} groups must divide both the {N} experts and the {a} active ones")

    def _check_gates(self) -> None:
        if self.router not in ROUTERS:
            raise ValueError(
                f"router must be one of {', '.join(ROUTERS)}, got {self.router!r}{nearest(self.router, ROUTERS)}"
            )
        if self.gates not in (NORMALISED, MEASURED):
            raise ValueError(f"gates must be {NORMALISED!r} or {MEASURED!r}, got {self.gates!r}")
        if self.gates == NORMALISED:
            if not self.normalize and self.router == "softmax":
                raise ValueError(
                    "a softmax over all experts that is not renormalised over the active ones sums to about a/N, not 1, and"
                    ' breaks the rule: set normalize = true, or gates = "measured" with gate_moments'
                )
            if not self.normalize:
                raise ValueError('gates that do not sum to one need gates = "measured" with gate_moments')
            if self.gate_moments is not None:
                raise ValueError('gate_moments are read only with gates = "measured"')
            return
        if self.gate_moments is None or len(self.gate_moments) != 2:
            raise ValueError(
                'gates = "measured" needs gate_moments = [E[Σw], E[Σw²]], measured over tokens at init'
                " (mue.moe.gate_moments does it)"
            )
        m1, m2 = (positive("gate_moments", m) for m in self.gate_moments)
        if not m1 * m1 / self.active * (1 - 1e-9) <= m2:
            raise ValueError(
                f"gate_moments ({m1:g}, {m2:g}): E[Σw²] cannot be below E[Σw]²/a = {m1 * m1 / self.active:g}"
            )

    @property
    def is_moe(self) -> bool:
        """Whether the block has experts."""
        return self.ffn is None

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together, n_s·h_s."""
        return self.shared_experts * (self.shared or self.expert or 0)

    @property
    def routed_width(self) -> int:
        """Width of the active routed experts together, a·h."""
        return self.active * (self.expert or 0)

    @property
    def active_width(self) -> int:
        """H_act: the sum of the down-projection fan-ins that one token passes through."""
        return self.ffn if self.ffn is not None else self.routed_width + self.shared_width

    @property
    def fan_in(self) -> int:
        """Fan-in of one down projection: H, or h."""
        return self.ffn if self.ffn is not None else self.expert or 0

    @property
    def share(self) -> float:
        """Share of the tokens that one routed expert sees: a/N; 1 where every token passes."""
        return self.active / self.experts if self.experts else 1.0

    @property
    def gate_variance(self) -> float:
        """F = a·E[Σw²]/E[Σw]²: 1 for uniform weights, a for one-hot ones (transfer-rules 1.3)."""
        if self.gate_moments is None:
            return 1.0
        m1, m2 = self.gate_moments
        return self.active * m2 / m1**2

    @property
    def kappa(self) -> float:
        """(F·a·h + n_s·h_s)/H_act: init variance of the branch against uniform weights; 1 for normalised gates."""
        if self.gate_moments is None:
            return 1.0
        return (self.gate_variance * self.routed_width + self.shared_width) / self.active_width

    @property
    def route_scale(self) -> float:
        """R of the rule: a on the normalised routed sum (ā/m1 where the gates are measured); 1 without a router."""
        if not self.experts:
            return 1.0
        return self.active / (self.gate_moments[0] if self.gate_moments else 1.0)

    @property
    def notation(self) -> str:
        """``"128e8a4g1s"``, or ``"dense"``."""
        if not self.is_moe:
            return "dense"
        parts = f"{self.experts}e{self.active}a" if self.experts else ""
        return (
            parts
            + (f"{self.groups}g" if self.groups > 1 else "")
            + (f"{self.shared_experts}s" if self.shared_experts else "")
        )


def parse_notation(notation: str) -> dict[str, int]:
    """``"128e8a4g1s"`` → ``{"experts": 128, "active": 8, "groups": 4, "shared_experts": 1}``.

    Suffixes: e experts, a active, g groups, s shared; in any order, each at most once. ``ValueError`` otherwise.
    """
    names = {"e": "experts", "a": "active", "g": "groups", "s": "shared_experts"}
    found: dict[str, int] = {}
    if not isinstance(notation, str) or not re.fullmatch(r"(\d+[a-z])+", notation):
        raise ValueError(
            f"cannot read {notation!r} as a MoE; write it like 128e8a4g1s (experts, active, groups, shared)"
        )
    for number, letter in re.findall(r"(\d+)([a-z])", notation):
        if letter not in names:
            raise ValueError(
                f"unknown suffix {letter!r} in {notation!r}: use e (experts), a (active), g (groups), s (shared)"
            )
        if names[letter] in found:
            raise ValueError(f"suffix {letter!r} appears twice in {notation!r}")
        if int(number) == 0:
            raise ValueError(f"0{letter} in {notation!r}: leave the suffix out, or give at least 1")
        found[names[letter]] = int(number)
    if ("experts" in found) != ("active" in found) or not ("experts" in found or "shared_experts" in found):
        raise ValueError(f"{notation!r} needs both e (experts) and a (active per token), as in 8e2a")
    return found


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """What every decoder here shares; use :class:`Dense`, :class:`MoE` or :class:`Mixed`.

    Attributes:
        head_dim, heads, kv_heads: attention heads; ``heads`` defaults to width / head_dim, ``kv_heads`` to ``heads``.
        vocab, sequence: tokens in the vocabulary and in one training sequence.
        gated: SwiGLU (gate, up, down) or a plain GELU pair (up, down).
        tied: the head shares the embedding's matrix.
        output_multiplier: forward multiplier A* of the feed-forward branch of a *base*; 1 is a stock model.
    """

    head_dim: int = 64
    heads: int | None = None
    kv_heads: int | None = None
    vocab: int = 256
    sequence: int = 1024
    gated: bool = True
    tied: bool = False
    output_multiplier: float = 1.0

    kind: ClassVar[str] = ""

    if TYPE_CHECKING:  # fields of the subclasses, or properties computed from them

        @property
        def width(self) -> int: ...
        @property
        def layers(self) -> int: ...
        @property
        def blocks(self) -> tuple[Block, ...]: ...

    def _check(self) -> None:
        for name in ("width", "layers", "head_dim", "vocab", "sequence"):
            positive_int(name, getattr(self, name))
        positive("output_multiplier", self.output_multiplier)
        if self.heads is None and self.width % self.head_dim:
            raise ValueError(
                f"width {self.width} is not divisible by head_dim {self.head_dim}: change one, or give heads"
            )
        if self.heads is not None and self.width % positive_int("heads", self.heads):
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.kv_heads is not None and self.num_heads % positive_int("kv_heads", self.kv_heads):
            raise ValueError(f"{self.kv_heads} kv_heads do not divide the {self.num_heads} heads")
        for name in ("gated", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def num_heads(self) -> int:
        return self.heads if self.heads is not None else self.width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.num_heads

    @property
    def attention_width(self) -> int:
        """heads·head_dim, the fan-in of the attention output projection."""
        return self.num_heads * self.head_dim

    @property
    def active_width(self) -> int | None:
        """H_act; None where blocks differ."""
        widths = {block.active_width for block in self.blocks}
        return widths.pop() if len(widths) == 1 else None

    @property
    def expansion(self) -> float | None:
        """e = H_act/d; None where blocks differ."""
        return None if self.active_width is None else self.active_width / self.width

    def matrices(self) -> Iterator[tuple[str, int, int, int]]:
        """Every weight by role: (role, how many, elements of one, how many of them one token uses).

        Experts count one by one, whatever a model stores them in; a tied head is counted at the embedding.
        """
        d, L = self.width, self.layers
        yield "embedding", 1, self.vocab * d, 0 if not self.tied else 1
        kv = self.num_kv_heads * self.head_dim
        for role, out in (("q", self.attention_width), ("k", kv), ("v", kv), ("o", self.attention_width)):
            yield f"attention_{role}", L, d * out, L
        for block in self.blocks:
            n = block.layers
            if block.ffn is not None:
                yield from self._feed_forward("ffn", n, d * block.ffn, n)
            if block.experts:
                yield from self._feed_forward("expert", n * block.experts, d * (block.expert or 0), n * block.active)
                yield "router", n, d * block.experts, n
                yield "router_bias", n, block.experts, n
            if block.shared_experts:
                many = n * block.shared_experts
                yield from self._feed_forward("shared", many, d * block.shared_width // block.shared_experts, many)
        yield "norm", 2 * L, d, 2 * L
        yield "qk_norm", 2 * L, self.head_dim, 2 * L
        yield "final_norm", 1, d, 1
        if not self.tied:
            yield "head", 1, self.vocab * d, 1

    def _feed_forward(self, kind: str, many: int, size: int, used: int) -> Iterator[tuple[str, int, int, int]]:
        for part in ("up", "gate", "down") if self.gated else ("up", "down"):
            yield f"{kind}_{part}", many, size, used

    def counts(self) -> dict[str, int]:
        """Tensors of the model by role (experts one by one); absent roles are left out."""
        found: dict[str, int] = {}
        for role, many, _, _ in self.matrices():
            found[role] = found.get(role, 0) + many
        return found

    @property
    def parameters(self) -> int:
        """Trainable parameters (the balance bias is a buffer)."""
        return sum(many * size for role, many, size, _ in self.matrices() if role != "router_bias")

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied by (an untied embedding is a look-up and not counted)."""
        return sum(used * size for role, _, size, used in self.matrices() if role != "router_bias")

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of one token: 6 per active matrix element + 12·L·(heads·head_dim)·sequence for attention.

        Source: PaLM (2204.02311) appendix B, with active parameters in place of all; causal masking not discounted.
        """
        vectors = {"norm", "qk_norm", "final_norm", "router_bias"}
        matrices = sum(used * size for role, _, size, used in self.matrices() if role not in vectors)
        return 6.0 * matrices + 12.0 * self.layers * self.attention_width * self.sequence

    @property
    def name(self) -> str:
        """A short name such as ``128e8a1s d1024 L8``."""
        kinds = list(dict.fromkeys(block.notation for block in self.blocks))
        return f"{'+'.join(kinds)} d{self.width} L{self.layers}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers under ``kind`` and the constructor's names; :func:`shape_from_dict` reads them back."""
        out: dict[str, Any] = {"kind": self.kind}
        for f in fields(self):
            if f.init:
                value = getattr(self, f.name)
                out[f.name] = [_block_dict(b) for b in value] if f.name == "blocks" else _plain(value)
        return out


@dataclass(frozen=True)
class Dense(Transformer):
    """A dense decoder: ``Dense(width, ffn, layers)``; the rest as in :class:`Transformer`."""

    width: int
    ffn: int
    layers: int
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        positive_int("ffn", self.ffn)
        self._check()

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (Block(layers=self.layers, ffn=self.ffn),)


@dataclass(frozen=True)
class MoE(Transformer):
    """A decoder whose every block has experts; the fields of :class:`Block` and :class:`Transformer`.

    Examples:
        >>> MoE.parse("128e8a1s", width=1024, expert=1024, layers=8).active_width
        9216
    """

    width: int
    expert: int
    layers: int
    experts: int = 0
    active: int = 0
    groups: int = 1
    shared_experts: int = 0
    shared: int | None = None
    router: str = "sigmoid"
    normalize: bool = True
    gates: str = NORMALISED
    gate_moments: tuple[float, float] | None = None
    kind: ClassVar[str] = "moe"

    def __post_init__(self) -> None:
        if self.gate_moments is not None:
            object.__setattr__(self, "gate_moments", tuple(self.gate_moments))
        self._check()
        _ = self.blocks  # a block checks its own numbers

    @classmethod
    def parse(cls, notation: str, **numbers: Any) -> MoE:
        """``MoE.parse("128e8a1s", width=1024, expert=1024, layers=8)``; ``ValueError`` names what cannot be read."""
        return cls(**{**parse_notation(notation), **numbers})

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (
            Block(
                layers=self.layers,
                **{f.name: getattr(self, f.name) for f in fields(Block) if f.name not in ("layers", "ffn")},
            ),
        )

    @property
    def notation(self) -> str:
        """``"128e8a4g1s"``."""
        return self.blocks[0].notation


@dataclass(frozen=True)
class Mixed(Transformer):
    """Blocks that differ: dense first layers, another number of experts per layer.

    Examples:
        >>> Mixed(1024, (Block(layers=1, ffn=4096), Block(layers=7, experts=64, active=8, expert=512))).layers
        8
    """

    width: int
    blocks: tuple[Block, ...]
    layers: int = field(init=False)
    kind: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise ValueError("blocks is empty: give at least one")
        object.__setattr__(self, "layers", sum(block.layers for block in self.blocks))
        self._check()


def shape_from_dict(data: dict[str, Any]) -> Transformer:
    """The inverse of ``to_dict``; ``ValueError`` for an unknown kind."""
    data = dict(data)
    kind = data.pop("kind", None)
    kinds: dict[str, type[Transformer]] = {"dense": Dense, "moe": MoE, "mixed": Mixed}
    if kind not in kinds:
        raise ValueError(f"unknown kind of shape {kind!r}; known: {', '.join(kinds)}")
    if kind == "mixed":
        data["blocks"] = tuple(Block(**_moments_tuple(b)) for b in data["blocks"])
    return kinds[kind](**_moments_tuple(data))


def _moments_tuple(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if k == "gate_moments" and v is not None else v for k, v in data.items()}


def _block_dict(block: Block) -> dict[str, Any]:
    return {f.name: _plain(getattr(block, f.name)) for f in fields(block)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Training:
    """A run: ``batch`` in tokens per step, ``steps``; ``tokens`` = D."""

    batch: int
    steps: int

    def __post_init__(self) -> None:
        positive_int("training batch (tokens per step)", self.batch)
        positive_int("training steps", self.steps)

    @property
    def tokens(self) -> int:
        """D = B·T."""
        return self.batch * self.steps


@dataclass(frozen=True)
class HParams:
    """What the one sweep found on the base.

    Attributes:
        lr: peak learning rate. weight_decay: torch's decoupled form, ``p *= 1 - lr·wd``. init_std: of every matrix.
        betas, eps: Adam's; eps is small by default because expert gradients are (transfer-rules 1.9).
        roles: per-role values that replace the global ones, ``{"embedding": {"lr": 3e-3}}``.
        optimizer, clip, warmup, floor, balance, z, bias_speed: carried to the target unchanged: optimizer name,
            clipping threshold (None: off), warmup and lr floor as fractions, balance-loss and z-loss coefficients,
            speed of the balance bias per step.
    """

    lr: float
    weight_decay: float
    init_std: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    roles: dict[str, dict[str, float]] = field(default_factory=dict, hash=False)
    optimizer: str = "adamw"
    clip: float | None = None
    warmup: float = 0.05
    floor: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    bias_speed: float = 1e-3

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("lr", positive("lr", self.lr))
        put("weight_decay", positive("weight_decay", self.weight_decay, zero=True))
        put("init_std", positive("init_std", self.init_std))
        put("eps", positive("eps", self.eps))
        if not isinstance(self.betas, list | tuple) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        put("betas", tuple(positive(f"beta{i + 1}", b, zero=True, below=1) for i, b in enumerate(self.betas)))
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer {self.optimizer!r} is not understood, and what is not derived is not guessed{nearest(self.optimizer, OPTIMIZERS)}"
            )
        put("clip", None if self.clip is None else positive("clip", self.clip))
        put("warmup", positive("warmup", self.warmup, zero=True, below=1))
        put("floor", positive("floor", self.floor, zero=True, below=1))
        for name in ("balance", "z", "bias_speed"):
            put(name, positive(name, getattr(self, name), zero=True))
        put("roles", {role: self._role(role, values) for role, values in self.roles.items()})

    @staticmethod
    def _role(role: str, values: object) -> dict[str, float]:
        known = ("lr", "weight_decay", "init_std", "eps")
        if not isinstance(values, dict):
            raise ValueError(f"tuned.roles.{role} must be a table of {', '.join(known)}, got {values!r}")
        for key in values:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in tuned.roles.{role}{nearest(key, known)}")
        return {k: positive(f"tuned.roles.{role}.{k}", v, zero=k == "weight_decay") for k, v in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the constructor's names."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def replace(self, **changes: Any) -> HParams:
        """A copy with some values changed."""
        return replace(self, **changes)
