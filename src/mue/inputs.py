"""All that a plan follows from, as plain numbers: shapes, runs, tuned values, the base's habits, the rule's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from mue.shapes import DECOUPLED, HParams, Training, Transformer, positive, shape_from_dict

if TYPE_CHECKING:
    from mue.plan import Plan


@dataclass(frozen=True)
class Convention:
    """The base's own habits, declared and never guessed (``[base.convention]``).

    Attributes:
        attention_scale: ``"1/sqrt(d)"`` (head size), ``"1/d"``, or a number: what the base multiplies its logits by.
        weight_decay: ``"decoupled"`` (torch: ``p *= 1 - lr·wd``) or ``"independent"`` (``p *= 1 - wd``).
        depth_scaled_init: the base draws o and down with std/√(2L*).
    """

    attention_scale: str | float = "1/sqrt(d)"
    weight_decay: str = "decoupled"
    depth_scaled_init: bool = False

    def __post_init__(self) -> None:
        scales = ("1/sqrt(d)", "1/d")
        if isinstance(self.attention_scale, str):
            if self.attention_scale not in scales:
                raise ValueError(f"attention_scale must be one of {scales} or a number, got {self.attention_scale!r}")
        else:
            positive("attention_scale", self.attention_scale)
        forms = ("decoupled", "independent")
        if self.weight_decay not in forms:
            raise ValueError(f"convention weight_decay must be one of {forms}, got {self.weight_decay!r}")
        if not isinstance(self.depth_scaled_init, bool):
            raise ValueError(f"depth_scaled_init must be true or false, got {self.depth_scaled_init!r}")

    def check_optimizer(self, optimizer: str) -> None:
        """``ValueError`` where the form of weight decay and the optimizer contradict each other."""
        if self.weight_decay == "independent" and optimizer not in DECOUPLED:
            raise ValueError(
                f'convention weight_decay = "independent" speaks of torch\'s decoupled decay, but {optimizer!r} has its own'
                " form: leave the convention out"
            )

    def scale(self, head_dim: int) -> float:
        """The base's attention scale as a number."""
        if isinstance(self.attention_scale, str):
            return head_dim**-0.5 if self.attention_scale == "1/sqrt(d)" else 1.0 / head_dim
        return float(self.attention_scale)


@dataclass(frozen=True)
class Inputs:
    """All that a plan follows from. ``depth_exponent`` and ``options`` are the rule's options that were given."""

    base: Transformer | Plan
    target: Transformer
    tuned: HParams | None
    base_training: Training | None
    training: Training | None
    rule: str
    convention: Convention
    depth_exponent: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base.to_dict() if isinstance(self.base, Transformer) else {"plan": self.base.inputs.to_dict()},
            "target": self.target.to_dict(),
            "tuned": None if self.tuned is None else self.tuned.to_dict(),
            "base_training": _training_dict(self.base_training),
            "training": _training_dict(self.training),
            "rule": self.rule,
            "convention": {f.name: getattr(self.convention, f.name) for f in fields(Convention)},
            "depth_exponent": self.depth_exponent,
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Inputs:
        base, tuned = data["base"], data["tuned"]
        return cls(
            base=Inputs.from_dict(base["plan"]).plan() if "plan" in base else shape_from_dict(base),
            target=shape_from_dict(data["target"]),
            tuned=None if tuned is None else HParams(**{**tuned, "betas": tuple(tuned["betas"])}),
            base_training=None if data["base_training"] is None else Training(**data["base_training"]),
            training=None if data["training"] is None else Training(**data["training"]),
            rule=data["rule"],
            convention=Convention(**data["convention"]),
            depth_exponent=data["depth_exponent"],
            options=dict(data.get("options", {})),
        )

    def plan(self) -> Plan:
        """The plan that follows."""
        from mue.plan import transfer

        return transfer(
            self.base,
            self.target,
            self.tuned,
            base_training=self.base_training,
            training=self.training,
            rule=self.rule,
            convention=self.convention,
            depth_exponent=self.depth_exponent,
            **dict(self.options),
        )


def _training_dict(training: Training | None) -> dict[str, int] | None:
    return None if training is None else {"batch": training.batch, "steps": training.steps}
