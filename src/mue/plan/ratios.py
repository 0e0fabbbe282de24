"""The ratios a rule may read, computed from two shapes and two runs. Nobody is ever asked for one."""

from __future__ import annotations

from mue.rules.roles import ROLES
from mue.rules.table import Rule
from mue.shapes import Block, Training, Transformer

# What a rule may read of a base's block: name in a message → attribute.
_READ = {
    "active width": "active_width",
    "width of one expert": "fan_in",
    "number of experts": "experts",
    "number of active experts": "active",
    "gate moments": "kappa",
}


def base_block(base: Transformer) -> Block:
    """The block that stands for a base, whose blocks must be alike in all that a rule reads.

    Args:
        base: the shape that was tuned.

    Returns:
        Its first block.

    Raises:
        ValueError: its blocks differ in something that a rule reads, so that there is no single number to compare with.
    """
    first = base.blocks[0]
    for block in base.blocks[1:]:
        for quantity, name in _READ.items():
            if getattr(block, name) != getattr(first, name):
                raise ValueError(
                    f"the blocks of the base {base.name} differ in their {quantity} ({getattr(first, name)} and"
                    f" {getattr(block, name)}): there is no single e* to transfer from; tune on a base whose blocks are alike"
                )
    return first


def _down_fan_in(block: Block, kind: str) -> int:
    """Fan-in of one down projection: a shared expert's, or that of a routed expert or a dense feed-forward."""
    # shared experts without a width of their own are as wide as the routed ones (Block.shared)
    return block.shared or block.fan_in if kind == "shared" else block.fan_in


def ratios(
    base: Transformer,
    target: Transformer,
    block: Block,
    base_training: Training | None,
    training: Training | None,
    kind: str = "",
) -> dict[str, float]:
    """Every ratio of :data:`mue.rules.algebra.RATIOS` for one block of the target, 1 where nothing changes.

    A dense block counts as one expert, of which one is active.

    Args:
        base, target: the shapes. block: of the target.
        base_training, training: the runs; where one of them is None, batch and duration count as unchanged.
        kind: ``"shared"`` where ρ_H is to speak of a shared expert's down projection.

    Returns:
        ratio's name → target over base, a pure number.

    Raises:
        ValueError: a base whose blocks differ in something that a rule reads.
    """
    source = base_block(base)
    same = base_training is None or training is None
    return {
        "ρ_d": target.width / base.width,
        # o reads heads·d_head numbers, which need not be d (docs/why/index.md#width)
        "ρ_o": target.attention_width / base.attention_width,
        "ρ_H": _down_fan_in(block, kind) / _down_fan_in(source, kind),
        "ρ_L": target.layers / base.layers,
        "ρ_N": max(block.experts, 1) / max(source.experts, 1),
        "ρ_a": max(block.active, 1) / max(source.active, 1),
        # one quotient of whole numbers: an unchanged expansion gives exactly 1, so that its factors are 1 as well
        "ρ_e": (block.active_width * base.width) / (target.width * source.active_width),
        "ρ_κ": block.kappa / source.kappa,
        "ρ_B": 1.0 if same else training.batch / base_training.batch,  # type: ignore[union-attr]
        "ρ_D": 1.0 if same else training.tokens / base_training.tokens,  # type: ignore[union-attr]
    }


def changes(base: Transformer, target: Transformer, block: Block, ratio: dict[str, float]) -> dict[str, bool]:
    """Which axes of :data:`mue.rules.table.AXES` differ between the base and one block of the target.

    Args:
        ratio: the ratios of that block, of which only batch and duration are read.

    Returns:
        axis → whether it changes. A dense block counts as one expert that sees every token.
    """
    source = base_block(base)
    routed = block.experts > 0, source.experts > 0
    share = (block.readers * block.active, block.experts) if routed[0] else (1, 1)
    share0 = (source.readers * source.active, source.experts) if routed[1] else (1, 1)
    return {
        "width": target.width != base.width,
        "depth": target.layers != base.layers,
        # fractions are compared crosswise, in whole numbers: no rounding decides whether an axis changed
        "expansion": block.active_width * base.width != source.active_width * target.width,
        "moe": block.is_moe or source.is_moe,
        "dense to moe": routed[0] != routed[1],
        "experts": routed[0] and routed[1] and block.experts != source.experts,
        "active": routed[0] and routed[1] and block.active != source.active,
        "sparsity": share[0] * share0[1] != share0[0] * share[1],
        "expert width": block.fan_in != source.fan_in,
        "granularity": block.fan_in * base.width != source.fan_in * target.width,
        "gates": block.moments is not None or source.moments is not None,
        "batch": ratio["ρ_B"] != 1,
        "duration": ratio["ρ_D"] != 1,
        "tied": target.tied,
    }


def refuse(rule: Rule, base: Transformer, target: Transformer, ratio: dict[str, float]) -> None:
    """Refuse a change that the rule has no answer for.

    Args:
        ratio: of any block of the target; only batch and duration are read from it.

    Raises:
        ValueError: an axis that the rule refuses, with its reason, or a role of the target that it has no row for.
    """
    if (base.image is None) != (target.image is None):
        drawing, writing = ("target", "base") if base.image is None else ("base", "target")
        raise ValueError(
            f"the {drawing} draws images and the {writing} is a language model, and no rule transfers between them: tune a base of the"
            f" target's own task, or {'give the base an image, too' if base.image is None else 'leave the image of the base out'}"
        )
    where = f"rule {rule.name!r} cannot plan {base.name} → {target.name}"
    for block in target.blocks:
        changed = changes(base, target, block, ratio)
        for axis, reason in rule.refuses.items():
            if changed[axis]:
                raise ValueError(f"{where}: {reason}")
    for role, count in target.counts().items():
        if count and role not in rule.rows and ROLES[role].trained:
            raise ValueError(f"{where}: {rule.why_not(role)}")
