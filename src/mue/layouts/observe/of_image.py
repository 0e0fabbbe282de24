"""From what was observed of a diffusion transformer's parameter to its role: what images add to :mod:`mue.layouts.observe.decide`."""

from __future__ import annotations

import re
from dataclasses import replace

from mue.layouts.observe import names
from mue.layouts.observe.decide import Decision, Facts, decide

# Kinds of inputs that are one vector or number for an image: what a modulation is made of.
_VECTORS = frozenset({"time", "class", "vector"})


def decide_of_image(f: Facts) -> Decision:
    """The role of one pattern of parameters of a model that draws images.

    Patches, conditions, modulations and the head are told apart by which inputs they read and what their axes follow; only then do
    words choose.
    """
    if f.use.looked_up and f.flow.reads == {"class"}:
        return Decision("class_embedding", ("in", "out"), "rows looked up by the class")
    if re.fullmatch(names.MODULATION_TABLE, f.tokens[-1]):
        how = "added to a modulation that all blocks share: a bias that starts as the model's code starts it"
        return Decision("bias", ("vector",) * len(f.shape), how, start="own")
    if len(f.use.summed) != 1 or f.use.looked_up:
        return _vector(f, decide(f))
    inner = next(iter(f.use.summed))
    if f.use.convolved:  # of a filter of one point two axes are seen nowhere
        inner = tuple(range(1, len(f.shape)))
    outs = [i for i in range(len(f.shape)) if i not in inner]
    if len(outs) != 1 or not inner:
        return decide(f)
    axes = tuple("in" if i in inner else "out" for i in range(len(f.shape)))
    return _outside(f, axes, inner, outs[0]) or _inside(f, axes, inner, outs[0]) or decide(f)


def _vector(f: Facts, decision: Decision) -> Decision:
    """What :func:`decide` says of a bias or a gain, with what is otherwise here."""
    if decision.role == "bias" and f.tokens[-1] == "bias" and f.constant is None:
        # drawn by torch as it draws any; a plan starts it at 0 (2212.09748)
        return replace(decision, start=None)
    if decision.role == "final_norm" and "image" not in f.flow.reads:
        return replace(decision, role="norm", how="gain of a norm outside the blocks, of a condition")
    return decision


def _seen(f: Facts, inner: tuple[int, ...]) -> str:
    return f"sums over axis {', '.join(map(str, inner))}"


def _outside(f: Facts, axes: tuple[str, ...], inner: tuple[int, ...], out: int) -> Decision | None:
    """What only images have: patches, conditions, modulations and the head; None for anything else."""
    seen, reads = _seen(f, inner), f.flow.reads
    from_width, to_width = len(inner) == 1 and f.is_width[inner[0]], f.is_width[out]
    grows_in, grows_out = any(f.follows[i] for i in inner), bool(f.follows[out])
    if not grows_in and to_width and not f.layered and reads == {"image"}:
        return Decision("patch_embedding", axes, f"{seen}, pixels of a patch → width")
    if reads == {"time"} and to_width:
        if not grows_in:
            return Decision("time_embedding_in", axes, f"{seen}, sines of the time → width")
        if from_width:
            return Decision("time_embedding_out", axes, f"{seen}, width → width, of the time alone")
    if "time" in reads <= _VECTORS and from_width and grows_out and not to_width and not f.flow.raw:
        many = f.shape[out] // f.shape[inner[0]]
        role, where = ("modulation", "in every block") if f.layered else ("final_modulation", "outside the blocks")
        return Decision(role, axes, f"{seen}, width → {many} times the width, of conditions alone, {where}")
    if from_width and not grows_out and not f.layered:
        return Decision("head", axes, f"{seen}, width → pixels of a patch")
    if reads - {"time"} and grows_out and "image" not in reads and not f.layered:
        what = " and ".join("a caption" if kind == "text" else "a condition" for kind in sorted(reads - {"time"}))
        to = "width" if to_width else "a part of the width"
        if not grows_in:
            return Decision("condition_in", axes, f"{seen}, numbers of {what} → {to}")
        return Decision(
            "condition_out", axes, f"{seen}, {'width' if from_width else 'a part of the width'} → {to}, of {what}"
        )
    return None


def _inside(f: Facts, axes: tuple[str, ...], inner: tuple[int, ...], out: int) -> Decision | None:
    """What attention and feed-forwards of these models have otherwise than others; None for what :func:`decide` knows."""
    seen = _seen(f, inner)
    if not f.layered:
        return Decision(None, axes, f"{seen}; outside the blocks, and neither a condition's nor of patches")
    if f.flow.reads and "image" not in f.flow.reads and not any(f.follows[i] for i in inner):
        return Decision(None, axes, f"{seen}; a block's matrix that reads a width which is not the model's (a text's)")
    if f.use.convolved and any(f.follows[i] for i in inner):
        return Decision(None, axes, f"{seen}; a filter whose fan-in grows is none of the known roles")
    width = f.shape[out]
    if width in f.flow.joined and set(f.flow.joined) - {width} and f.is_width[out]:
        # o and down at once (Flux's single blocks, after 2302.05442): a plan multiplies down's output by A and draws and steps both
        # otherwise as soon as the expansion changes, and a layout cuts along out only
        how = (
            f"{seen}; as many numbers as the width and others side by side: the attention's output projection and the feed-forward's"
            " down projection in one matrix, for which a plan has two rows. Cut it into two whose outputs are added, or leave it alone"
        )
        return Decision(None, axes, how)
    if f.flow.cut > 1 and not f.named(names.FUSED_QKV, 1):
        how = (
            f"{seen}, its output is cut into {f.flow.cut}: say with parts= which matrices it holds, and in which order"
        )
        return Decision(None, axes, how)
    if f.is_width[inner[0]] and re.fullmatch(names.UP_OF_IMAGE, ".".join(f.words)):
        return Decision("ffn_up", axes, f"{seen}, width → hidden, by name")
    return None
