"""A run and its tuned values in numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mue.shapes.update_scales import update_scale
from mue.util.errors import explain_calls, nearest, positive, positive_int

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
# Those that users ask for by name, and why a plan has no answer: each paper defines an update, none its scale over a MoE.
NOT_DERIVED = {
    "muonh": 'MuonH is optimizer = "hyperball" with rule = "hyperp" (2603.28743)',
    "normuon": "NorMuon (2510.05491) sets the RMS of an update and not its operator norm, and how that scales nobody derived",
    "scion": "Scion (2502.07529) steps embedding and head by other norms, which a plan does not carry; its hidden part is"
    ' optimizer = "muon" with update_scale = "spectral"',
    "dion": "Dion (2504.05295) steps in a few directions at a time and keeps the rest as an error, and how that scales nobody derived",
}
DECOUPLED = ("adamw", "nadamw", "lion")  # decay as torch's AdamW has it, p *= 1 - lr·wd, in every parameter

ROLE_VALUES = ("lr", "weight_decay", "init_std", "eps")
# What a tuned value was before it could be given: files and hashes leave it out there, so that old ones stay what they are.
_BEFORE: dict[str, Any] = {
    "adamw_lr": None,
    "adamw_weight_decay": None,
    "momentum": None,
    "update_scale": "spectral",
    "muon_moves": ("attention", "ffn", "expert", "router"),
}
# The kinds of matrices that Muon can move. By default all but routers, as in Marin's hybrid (levanter's grug_muon).
MATRICES = ("attention", "ffn", "expert", "shared", "router")
TIMES = "_times"  # what ends the name of a value that multiplies, instead of replacing, what would hold otherwise
# Multipliers by depth are set on the base and go by normalised depth, as in Complete(d)P (2512.22382), in steps.
THIRDS = ("first_third", "middle_third", "last_third")
Roles = dict[str, dict[str, float]]


def third_of(layer: int, layers: int) -> str:
    """The third of the depth in which the middle of a layer lies (never on a border): 4 layers are 1 + 2 + 1.

    Args:
        layer: from 0. layers: how many the model has.

    Returns:
        One of :data:`THIRDS`.
    """
    # by the middle of the layer, (layer + 1/2)/layers, in whole numbers
    return THIRDS[3 * (2 * layer + 1) // (2 * layers)]


def third_and_role(table: str) -> tuple[str, str]:
    """What a stored table of ``tuned.roles`` is for.

    Args:
        table: its name, ``"first_third.ffn_up"`` or ``"ffn_up"``.

    Returns:
        (third, role); the third is ``""`` for the whole depth.
    """
    third, _, role = table.rpartition(".")
    return third, role


@explain_calls
@dataclass(frozen=True)
class Training:
    """A run: ``batch`` in tokens per step, ``steps``; ``tokens`` = D.

    ``critical_batch`` is what was measured for it (``mue noise``), in tokens: plans warn beyond it, and nothing else reads it.
    """

    batch: int
    steps: int
    critical_batch: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, said in (("batch", "training batch (tokens per step)"), ("steps", "training steps")):
            object.__setattr__(self, name, positive_int(said, getattr(self, name)))
        if self.critical_batch is not None:
            whole = positive_int("critical_batch (tokens, as mue noise measures it)", self.critical_batch)
            object.__setattr__(self, "critical_batch", whole)

    def to_dict(self) -> dict[str, int]:
        """Plain numbers under the constructor's names, without what was not measured."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @property
    def tokens(self) -> int:
        """D = B·T."""
        return self.batch * self.steps


@explain_calls
@dataclass(frozen=True)
class HParams:
    """What the one sweep found on the base.

    Attributes:
        lr: peak learning rate. weight_decay: torch's decoupled form, ``p *= 1 - lr·wd``. init_std: of every matrix.
        betas, eps: Adam's; eps is small by default because expert gradients are, and 1e-12 is what
            CompleteP's code has (2505.01618).
        roles: per-role values: ``{"embedding": {"lr": 3e-3}}`` replaces the global one, ``{"head": {"lr_times": 2}}``
            multiplies what it would be otherwise, ``{"first_third": {"ffn_up": {"lr_times": 1.5}}}`` does so in the first
            third of the layers, of the base's as of the target's (``"first_third.ffn_up"`` once it is stored). A role's ``init_std``
            may be 0: a head or queries that start at zero.
        adamw_lr, adamw_weight_decay: with ``optimizer = "muon"``, of all that AdamW moves beside it (embedding, head, routers,
            gains and biases); None: the global ones. momentum: Muon's; None: β1.
        update_scale: the convention that Muon's lr is stated in, of :data:`mue.shapes.update_scales.UPDATE_SCALES`; plans have
            their rates in the same one. muon_moves: the kinds of matrices that Muon moves, of ``"attention"``, ``"ffn"``,
            ``"expert"``, ``"shared"`` and ``"router"``; all but routers by default, and what it does not move is AdamW's.
        optimizer, clip, warmup, floor, balance, z, bias_speed: carried to the target unchanged: optimizer name,
            clipping threshold (None: off), warmup as a fraction of the run or as a number of steps (from 2), lr floor as a
            fraction, balance-loss and z-loss coefficients, speed of the balance bias per step.
    """

    lr: float
    weight_decay: float
    init_std: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    roles: Roles = field(default_factory=dict, hash=False)
    optimizer: str = "adamw"
    clip: float | None = None
    warmup: float = 0.05
    floor: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    bias_speed: float = 1e-3  # the paper's (2408.15664)
    adamw_lr: float | None = None
    adamw_weight_decay: float | None = None
    momentum: float | None = None
    update_scale: str = "spectral"
    muon_moves: tuple[str, ...] = ()

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
        if self.optimizer in NOT_DERIVED:
            raise ValueError(f"optimizer {self.optimizer!r} has no transfer here: {NOT_DERIVED[self.optimizer]}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer {self.optimizer!r} is not understood, and what is not derived is not guessed{nearest(self.optimizer, OPTIMIZERS)}"
            )
        put("clip", None if self.clip is None else positive("clip", self.clip))
        put("warmup", _warmup(self.warmup))
        put("floor", positive("floor", self.floor, zero=True, below=1))
        for name in ("balance", "z", "bias_speed"):
            put(name, positive(name, getattr(self, name), zero=True))
        put("roles", _roles(self.roles))
        self._check_muon(put)

    def _check_muon(self, put: Callable[[str, object], None]) -> None:
        """What only Muon and the AdamW beside it read; with another optimizer it would be ignored, and is refused."""
        if self.optimizer != "muon":
            for name in _BEFORE:
                if getattr(self, name) not in (None, "spectral", ()):
                    raise ValueError(f'{name} goes with optimizer = "muon", not with {self.optimizer!r}: leave it out')
            return
        for name, zero in (("adamw_lr", False), ("adamw_weight_decay", True), ("momentum", True)):
            if (value := getattr(self, name)) is not None:
                put(name, positive(name, value, zero=zero, below=1 if name == "momentum" else math.inf))
        update_scale(self.update_scale)
        put("muon_moves", tuple(self.muon_moves) or MATRICES[:-1])
        for kind in self.muon_moves:
            if kind not in MATRICES:
                raise ValueError(f"muon_moves lists {kind!r}{nearest(kind, MATRICES)}")
        if ("ffn" in self.muon_moves) != ("expert" in self.muon_moves):
            raise ValueError(
                "muon_moves has ffn and expert together or neither: a dense base's feed-forward stands for its experts"
            )

    @property
    def beside_adamw(self) -> dict[str, Any]:
        """What was tuned of Muon beside lr and weight decay, plain, without what says nothing."""
        given = {name: getattr(self, name) for name in _BEFORE}
        return {name: _plain(value) for name, value in given.items() if value not in (None, (), _BEFORE[name])}

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the constructor's names; what came later is left out where it says nothing."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in _BEFORE}
        return values | self.beside_adamw

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HParams:
        """What :meth:`to_dict` wrote, with what it meant when it was written."""
        before = {"muon_moves": _BEFORE["muon_moves"]} if data.get("optimizer") == "muon" else {}
        return cls(**{**before, **data, "betas": tuple(data["betas"])})

    def replace(self, **changes: Any) -> HParams:
        """A copy with some values changed."""
        return replace(self, **changes)


def _warmup(value: object) -> float:
    found = positive("warmup", value, zero=True)
    if found >= 1 and (found == 1 or not found.is_integer()):
        raise ValueError(
            f"warmup must be a fraction of the run (below 1) or a whole number of steps (from 2), got {value!r}"
        )
    return found


def warmup_steps(warmup: float, steps: int) -> float:
    """The steps of a run's warmup, not rounded.

    Args:
        warmup: a fraction of the run below 1, or steps. steps: of the run.
    """
    return warmup if warmup >= 1 else warmup * steps


def _roles(tables: object) -> Roles:
    """Per-role tables as they are stored: thirds as ``"third.role"``, without what multiplies by 1, for it says nothing."""
    if not isinstance(tables, Mapping):
        raise ValueError(f"tuned.roles must be a table of roles, got {tables!r}")
    found: Roles = {}
    for name, table in tables.items():
        nested = isinstance(table, Mapping) and any(isinstance(v, Mapping) for v in table.values())
        if nested and name not in THIRDS:
            raise ValueError(f"unknown third {name!r} in tuned.roles{nearest(name, THIRDS)}")
        found.update(
            {f"{name}.{r}": _role(f"{name}.{r}", t) for r, t in table.items()} if nested else {name: _role(name, table)}
        )
    return {role: values for role, values in found.items() if values}


def _role(role: str, values: object) -> dict[str, float]:
    known = [key for name in ROLE_VALUES for key in (name, name + TIMES)]
    if not isinstance(values, Mapping):
        raise ValueError(f"tuned.roles.{role} must be a table of {', '.join(known)}, got {values!r}")
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in tuned.roles.{role}{nearest(key, known)}")
        if key + TIMES in values:
            raise ValueError(f"tuned.roles.{role} has {key} and {key}{TIMES}: the value is the product, give that")
    checked = {
        k: positive(f"tuned.roles.{role}.{k}", v, zero=k in ("weight_decay", "init_std")) for k, v in values.items()
    }
    return {k: checked[k] for k in known if k in checked and not (k.endswith(TIMES) and checked[k] == 1)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
