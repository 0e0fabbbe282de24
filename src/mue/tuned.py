"""A run and its tuned values in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from mue.checked import positive, positive_int
from mue.words import nearest

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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
