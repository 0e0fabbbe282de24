"""What a rule is: one row per role, each cell a monomial in the ratios, each row with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mue.rules.algebra import ONE, Monomial
from mue.shapes import Block

# Every role a parameter can have, in the order of the forward pass. One parameter, one role.
ROLES: tuple[str, ...] = (
    "embedding",
    "attention_q",
    "attention_k",
    "attention_v",
    "attention_o",
    "ffn_up",
    "ffn_gate",
    "ffn_down",
    "expert_up",
    "expert_gate",
    "expert_down",
    "shared_up",
    "shared_gate",
    "shared_down",
    "router",
    "router_bias",
    "norm",
    "qk_norm",
    "bias",
    "final_norm",
    "head",
)
# Gains start at 1 and biases at 0, neither is decayed: their tables have no init std and weight decay 0.
VECTORS = frozenset({"norm", "qk_norm", "bias", "final_norm"})
# Moved by load statistics, never by the optimizer.
BUFFERS = frozenset({"router_bias"})
# Where a role's tuned value comes from when it has none of its own (a dense base has no experts).
FALLBACK: dict[str, str] = {
    f"{kind}_{part}": f"ffn_{part}" for kind in ("expert", "shared") for part in ("up", "gate", "down")
}

PUBLISHED = "published"
AUTHORS_CODE = "authors' code"
INFERRED = "inferred"


@dataclass(frozen=True)
class Row:
    """Factors on the base's values for one role.

    Attributes:
        source: paper, table or equation of each cell. status: :data:`PUBLISHED`, :data:`AUTHORS_CODE` or
            :data:`INFERRED`, of the row's weakest cell.
    """

    source: str
    init_std: Monomial = ONE
    lr: Monomial = ONE
    weight_decay: Monomial = ONE
    eps: Monomial = ONE
    status: str = INFERRED


@dataclass(frozen=True)
class Rule:
    """A published transfer rule as data.

    Attributes:
        rows: role → :class:`Row`; a role without a row is one the rule has no answer for.
        output_multiplier: of the feed-forward branch, on the base's own A*.
        residual_multiplier, head_multiplier: of both residual branches, of the logits.
        one_minus_beta: factor on 1-β1 and 1-β2.
        routed: R follows the block (``a`` on the normalised routed sum) if true, 1 otherwise.
        refuses: axis → reason, for the changes the rule has no answer to (``width depth moe batch duration``).
        notes: what a reader of a plan must know, always printed.
    """

    name: str
    title: str
    source: str
    rows: Mapping[str, Row]
    output_multiplier: Monomial = ONE
    residual_multiplier: Monomial = ONE
    head_multiplier: Monomial = ONE
    one_minus_beta: Monomial = ONE
    routed: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        missing = [role for role in ROLES if role not in self.rows and "moe" not in self.refuses]
        assert not missing, f"rule {self.name} has no row for {missing}"


def present(role: str, block: Block) -> bool:
    """Whether a block holds this role (roles outside the feed-forward are in every block)."""
    kind = role.split("_")[0]
    if kind == "ffn":
        return not block.is_moe
    if kind in ("expert", "router"):
        return block.experts > 0
    if kind == "shared":
        return block.shared_experts > 0
    return True
