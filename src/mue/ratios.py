"""The ratios a rule may read, computed from two shapes and two runs. Nobody is ever asked for one."""

from __future__ import annotations

from mue.rules.table import Rule
from mue.shapes import Block, Training, Transformer


def base_block(base: Transformer) -> Block:
    """The block that stands for a base; ``ValueError`` where its blocks differ in what a rule reads."""
    first = base.blocks[0]
    for block in base.blocks[1:]:
        if (block.active_width, block.fan_in, block.kappa) != (first.active_width, first.fan_in, first.kappa):
            raise ValueError(
                f"the base {base.name} has blocks of different active widths ({first.active_width} and {block.active_width}):"
                " there is no single e* to transfer from; tune on a base whose blocks are alike"
            )
    return first


def ratios(
    base: Transformer,
    target: Transformer,
    block: Block,
    base_training: Training | None,
    training: Training | None,
    kind: str = "",
) -> dict[str, float]:
    """Every ratio of :data:`mue.rules.algebra.RATIOS` for one block of the target.

    ``kind`` ("shared" or anything else) picks whose down projection ρ_H speaks of.
    """
    source = base_block(base)
    fan_in = block.shared or block.expert or block.fan_in if kind == "shared" else block.fan_in
    same = base_training is None or training is None
    return {
        "ρ_d": target.width / base.width,
        "ρ_o": target.attention_width / base.attention_width,
        "ρ_H": fan_in / source.fan_in,
        "ρ_L": target.layers / base.layers,
        "ρ_e": (block.active_width * base.width) / (target.width * source.active_width),
        "ρ_κ": block.kappa / source.kappa,
        "ρ_B": 1.0 if same else training.batch / base_training.batch,  # type: ignore[union-attr]
        "ρ_D": 1.0 if same else training.tokens / base_training.tokens,  # type: ignore[union-attr]
    }


def refuse(rule: Rule, base: Transformer, target: Transformer, ratio: dict[str, float]) -> None:
    """``ValueError`` when the change from base to target uses an axis the rule has no answer for."""
    changed = {
        "width": ratio["ρ_d"] != 1,
        "depth": ratio["ρ_L"] != 1,
        "moe": any(block.is_moe for block in (*base.blocks, *target.blocks)),
        "batch": ratio["ρ_B"] != 1,
        "duration": ratio["ρ_D"] != 1,
    }
    for axis, reason in rule.refuses.items():
        if changed[axis]:
            raise ValueError(f"rule {rule.name!r} cannot plan {base.name} → {target.name}: {reason}")
