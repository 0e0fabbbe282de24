"""From what was observed of a diffusion transformer's parameter to its role: what images add to :mod:`mue.layouts.observe.decide`."""

from __future__ import annotations

import re

from mue.layouts.observe import names
from mue.layouts.observe.decide import Decision, Facts, decide


def decide_of_image(f: Facts) -> Decision:
    """The role of one pattern of parameters of a model that draws images.

    Patches, conditions, modulations and the head are told apart by what their axes follow; only then do words choose.
    """
    if f.use.looked_up and f.named(names.CLASS, 2):
        return Decision("class_embedding", ("in", "out"), "rows looked up, classes by name")
    if re.fullmatch(names.MODULATION_TABLE, f.tokens[-1]):
        how = "added to a modulation that all blocks share: a bias that starts as the model's code starts it"
        return Decision("bias", ("vector",) * len(f.shape), how, start="own")
    if len(f.use.summed) != 1 or f.use.looked_up:
        return decide(f)
    inner = next(iter(f.use.summed))
    outs = [i for i in range(len(f.shape)) if i not in inner]
    if len(outs) != 1 or not inner:
        return decide(f)
    axes = tuple("in" if i in inner else "out" for i in range(len(f.shape)))
    return _matrix(f, axes, inner, outs[0]) or decide(f)


def _matrix(f: Facts, axes: tuple[str, ...], inner: tuple[int, ...], out: int) -> Decision | None:
    """What only images have, or None: a matrix that attention or a feed-forward has as well."""
    seen = f"sums over axis {', '.join(map(str, inner))}"
    from_width, to_width = len(inner) == 1 and f.is_width[inner[0]], f.is_width[out]
    fixed_in, fixed_out = not any(f.follows[i] for i in inner), not f.follows[out]
    if fixed_in and to_width and not f.layered and (f.use.convolved or f.named(names.PATCHES)):
        return Decision("patch_embedding", axes, f"{seen}, pixels of a patch → width")
    if f.named(names.TIME, 2):
        if fixed_in and to_width:
            return Decision("time_embedding_in", axes, f"{seen}, sines of the time → width")
        if from_width and to_width:
            return Decision("time_embedding_out", axes, f"{seen}, width → width, of the time by name")
    if from_width and "width" in f.follows[out] and not to_width and f.named(names.MODULATION, 2):
        many = f.shape[out] // f.shape[inner[0]]
        if f.layered:
            return Decision("modulation", axes, f"{seen}, width → {many} times the width, in every block")
        return Decision("final_modulation", axes, f"{seen}, width → {many} times the width, outside the blocks")
    if from_width and fixed_out and not f.layered:
        return Decision("head", axes, f"{seen}, width → pixels of a patch")
    if f.layered and from_width and re.fullmatch(names.UP_OF_IMAGE, ".".join(f.words)):
        return Decision("ffn_up", axes, f"{seen}, width → hidden, by name")
    if not f.layered:  # captions, pooled texts, sizes of the picture: no plan's shape has any of these
        return Decision(None, axes, f"{seen}; a condition other than time and class, which has no role in a plan")
    if fixed_in:
        return Decision(None, axes, f"{seen}; a block's matrix that reads a width which is not the model's (a text's)")
    return None
