"""A rate of Muon from a base's matrix to a target's, where it is stated in another convention than the rule's spectral one.

Rules say what happens to the operator norm lr·s/√(out/in); a tuned lr is in the user's convention (``tuned.update_scale``), and so
are a plan's. So lr takes κ = (s/√(out/in))* / (s/√(out/in)) of the two matrices, and weight decay 1/κ.
"""

from __future__ import annotations

from mue.rules.optimizers import of_tuned
from mue.rules.roles import ROLES, Role
from mue.shapes import Block, HParams, Transformer
from mue.shapes.update_scales import lr_ratio


def matrix_shape(role: Role, shape: Transformer, block: Block) -> tuple[int, int]:
    """(out, in) of one matrix of a hidden role: of one expert, of one projection.

    Args:
        role: one that is ``hidden``. block: of the shape; of a kind that it does not hold, what the rule has in its place: a
            dense feed-forward for an expert, and the other way round.

    Raises:
        ValueError: a router of a block that has none.
    """
    d = shape.width
    if role.kind == "attention":
        heads = shape.num_heads if role.part in ("q", "o") else shape.num_kv_heads
        out, fan_in = heads * shape.head_dim, d
    elif role.kind == "router":
        if not block.experts:
            raise ValueError(
                f"{shape.name} has no router to take a rate over from in the convention of update_scale: give"
                ' update_scale = "spectral", or leave routers out of muon_moves'
            )
        out, fan_in = block.experts, d
    else:
        hidden = block.shared or block.fan_in if role.kind == "shared" else block.fan_in
        out, fan_in = hidden, d
    return (fan_in, out) if role.writes_residual else (out, fan_in)


def lr_factor(role: str, tuned: HParams, base: tuple[Transformer, Block], target: tuple[Transformer, Block]) -> float:
    """κ of a role, also of one that the target lacks, for plans go on from its value; 1 where Muon does not move it.

    Args:
        role: by name. base, target: the shapes, each with the block that is spoken of.

    Raises:
        ValueError: as :func:`matrix_shape`.
    """
    if tuned.update_scale == "spectral" or of_tuned(tuned, role) != "muon":
        return 1.0
    if ROLES[role].kind == "router" and not target[1].experts:
        return 1.0
    before, after = (matrix_shape(ROLES[role], *one) for one in (base, target))
    if before == after:
        return 1.0  # exactly, and not by two roundings
    return lr_ratio(tuned.update_scale, "spectral", *before) * lr_ratio("spectral", tuned.update_scale, *after)
