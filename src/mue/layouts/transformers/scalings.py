"""Scaling factors that a stock model already has, by the names its config gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mue.layouts.transformers.tiny import text_config


@dataclass(frozen=True)
class Scaling:
    """One factor of a config: ``what`` it multiplies, ``value``, and ``neutral``, with which it would do nothing.

    ``neutral`` is None where no number switches it off, or where nothing has to.
    """

    attribute: str
    what: str
    value: float
    neutral: float | None

    @property
    def active(self) -> bool:
        return self.neutral is not None and self.value != self.neutral


_KNOWN: tuple[tuple[str, str, float | None], ...] = (
    (r"routed_scaling_factor|moe_routed_scaling_factor|router_scaling_factor|route_scale", "routed sum", None),
    (r"embedding_multiplier|scale_emb|embedding_scale|embed_scale", "embedding", 1.0),
    (r"residual_multiplier|residual_scale|scale_depth", "residual branches", 1.0),
    (r"attention_multiplier|attention_scaling", "attention logits", None),
    (r"query_pre_attn_scalar", "attention logits (as 1/√x)", None),
    (r"logits_scaling", "logits (as 1/x)", 1.0),
    (r"logit_scale|lm_head_multiplier|logits_multiplier|output_multiplier_scale", "logits", 1.0),
    (r"\w*_multiplier", "other", 1.0),
)
_ATTENTION = 2


def scalings(config: Any) -> list[Scaling]:
    """Every scaling factor of a config, with whether it does anything."""
    found = []
    for key, value in vars(text_config(config)).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or key.startswith("_"):
            continue
        for pattern, what, neutral in _KNOWN:
            if re.fullmatch(pattern, key):
                found.append(Scaling(key, what, float(value), neutral))
                break
    return found


def refuse_scaled(config: Any) -> None:
    """``ValueError`` for a model that is already scaled: a plan's multipliers on top would scale twice.

    Names every factor and the value that switches it off.
    """
    active = [s for s in scalings(config) if s.active]
    if active:
        raise ValueError(
            f"{type(config).__name__} is already scaled, and a plan on top would scale twice:\n  "
            + "\n  ".join(
                f"{s.attribute} = {s.value:g} on the {s.what}: set {s.attribute} = {s.neutral:g}" for s in active
            )
        )
