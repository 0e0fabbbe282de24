"""The multipliers of one watched forward pass: what each branch, the stream, the embedding and the head were multiplied by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.checks.branches import Branch, fit_ratio, fit_sum
from mue.checks.context import Context
from mue.checks.record import Normed, Product
from mue.checks.solve import EVEN, Coefficients, single_multiplier
from mue.checks.stream import ENTERING
from mue.layouts.layout import POSITION, ParamInfo
from mue.plan.fold import unfold
from mue.rules.roles import ROLES

# Of what is fitted, the part that may stay unexplained: bf16 rounds away less, and what is no multiple leaves far more.
UNEXPLAINED = 0.05
EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12)  # the model's own is not known; these are usual, and the better fit is taken


@dataclass(frozen=True)
class Reading:
    """One multiplier of one place: what was planned and what was found, and the factors that make it up.

    ``within``: the relative difference that the planned number itself leaves open.
    """

    where: str
    quantity: str
    expected: float
    measured: float
    factors: Mapping[str, float]
    within: float = 0.0


@dataclass(frozen=True)
class Missed:
    """A multiplier that was planned and could not be read: where, what would have to be so, and what was seen instead."""

    where: str
    expected: str
    measured: str
    causes: tuple[str, ...] = ()


# ---- branches ------------------------------------------------------------------------------------------------------------


def expected_routed(ctx: Context, layer: int, ended_by_norm: bool = False) -> float:
    """What the gates of a layer sum to, as they meet the stream (or the norm that ends the branch): l^-α · A · R · E[Σw]."""
    m = ctx.plan.multipliers
    block = ctx.plan.target.per_layer[layer]
    moment = block.moments[0] if block.moments else 1.0
    return (1.0 if ended_by_norm else m.residual) * m.output[layer] * m.route[layer] * moment


def attention(ctx: Context, b: Branch) -> Iterator[Reading | Missed]:
    """By what each output projection of an attention branch was multiplied."""
    ends = [p for p in b.ends if p.info.role == "attention_o"]
    residual = ctx.plan.multipliers.residual
    outs = [p.out.reshape(-1, p.out.shape[-1]) for p in ends]
    # a projection may be computed as W·xᵀ
    outs = [out if out.shape == b.made.shape else out.T for out in outs]
    cs, residue = fit_sum(b.made, [out for out in outs if out.shape == b.made.shape])
    if residue > UNEXPLAINED or len(cs) != len(ends):
        yield from (_no_multiple(p.info.name, residue) for p in ends)
        return
    for p, c in zip(ends, cs, strict=True):
        planned = 1.0 if b.normed else residual
        yield Reading(p.info.name, "attention branch", planned, c * p.factor, {"residual multiplier": residual})
    yield from after_norm(ctx, b, ends[-1].info.name)


def after_norm(ctx: Context, b: Branch, name: str) -> Iterator[Reading | Missed]:
    """By what the output of the norm that ends a branch was multiplied."""
    if b.normed is None:
        return
    residual = ctx.plan.multipliers.residual
    c, residue = norm_ratio(b.normed)
    out = b.normed.out.reshape(-1, b.normed.out.shape[-1])
    d, other = fit_ratio(b.out, out) if out.shape == b.out.shape else (float("nan"), 1.0)
    where = b.normed.vectors[-1].name if b.normed.vectors else f"the norm after {name}"
    if max(residue, other) > UNEXPLAINED:
        yield _no_multiple(where, max(residue, other))
        return
    yield Reading(where, f"{b.kind} branch after its norm", residual, c * d, {"residual multiplier": residual})


def _no_multiple(where: str, residue: float) -> Missed:
    return Missed(
        where,
        "the branch is a multiple of what its weights give",
        f"{100 * residue:.2g} % of it is something else",
        ("something between the projection and the stream is neither a norm nor a number",),
    )


def feed_forward(ctx: Context, b: Branch, c: Coefficients) -> Iterator[Reading | Missed]:
    """What a branch's coefficients say: for the dense or shared experts A·l^-α, for the routed sum that times R.

    R and a are among the suspects on the shared experts' reading as well: R on both is the likeliest slip of a rule
    that puts it on one (docs/why/index.md#experts).
    """
    m, names = ctx.plan.multipliers, down_names(ctx, b.layer)
    A, residual = m.output[b.layer], 1.0 if b.normed else m.residual
    if c.single is not None:
        kind = "shared" if "shared" in names else "ffn"
        factors = {"output multiplier A": A, "residual multiplier": m.residual}
        if kind == "shared":
            factors["R (meant for the routed sum only)"] = m.route[b.layer]
        quantity = "shared experts" if kind == "shared" else "feed-forward branch"
        single = single_multiplier(b, c.single)
        spread = float(single.std(correction=0) / single.mean().abs()) if single.numel() > 1 else 0.0
        if spread > max(EVEN, ctx.tolerance):
            share = f"it differs from token to token by {100 * spread:.2g} %"
            yield Missed(
                names[kind], "one multiplier for all tokens", share, ("a norm or a gate inside the feed-forward",)
            )
        else:
            yield Reading(names[kind], quantity, A * residual, _median(single), factors)
    if c.routed.shape[1]:
        block = ctx.plan.target.per_layer[b.layer]
        factors = {"output multiplier A": A, "route scale R": m.route[b.layer], "residual multiplier": m.residual}
        # a mean in place of a sum, or of the groups' sums, is off by these
        factors |= {"number of active experts": float(block.active), "number of groups": float(block.groups)}
        planned = expected_routed(ctx, b.layer, b.normed is not None)
        # planned moments are a mean over many routers, and this is one of them, on few tokens; those that a router knows
        # are of independent Gaussian logits besides, as a router of eight experts on real hidden states hardly has them
        within = 0.0 if block.exact_sum else 0.1 if block.gate_moments else 0.25
        sums = c.routed.sum(1)
        measured = float(sums.mean()) if within else _median(sums)
        yield Reading(names["expert"], "routed sum", planned, measured, factors, within)


def down_names(ctx: Context, layer: int) -> dict[str, str]:
    """Kind → the first down projection of a layer."""
    down = [p for p in ctx.placed if layer in p.layers and ROLES[p.role].part == "down"]
    return {ROLES[p.role].kind: p.name for p in reversed(down)}


def _median(x: Tensor) -> float:
    """Over tokens: the multiplier is one for all, and a token with nearly singular equations must not move it."""
    return float(x.median())


# ---- stream and embedding --------------------------------------------------------------------------------------------------


def embedding(ctx: Context) -> Iterator[Reading | Missed]:
    """By what the rows of each table were multiplied on their way into the stream: nothing."""
    record = ctx.seen[0]
    first = ctx.branches[0].added if ctx.branches else None
    c, residue = (1.0, 1.0) if first is None else fit_ratio(first.carried, first.before)
    for p in (p for p in ctx.placed if p.role in ENTERING):
        if p.name not in record.entered or residue > UNEXPLAINED:
            seen = (
                "its rows were not seen to join" if p.name not in record.entered else "the stream was made anew before"
            )
            yield Missed(p.name, "the rows of the embedding become the residual stream", seen)
            continue
        head = {"head multiplier": ctx.plan.multipliers.head}
        yield Reading(p.name, "embedding on its way into the stream", 1.0, record.entered[p.name] * c, head)


def stream(ctx: Context) -> Iterator[Reading | Missed]:
    """The stream itself, which carries no multiplier.

    l^-α belongs on the branch; on the stream it would shrink everything before the block, embedding included.
    """
    factors = {"residual multiplier": ctx.plan.multipliers.residual}
    last = None
    for b in ctx.branches:
        a = b.added
        if (
            last is None or a.carried is last
        ):  # the first one's is the embedding's; two terms of a parallel block are one
            last = a.carried
            continue
        last = a.carried
        c, residue = fit_ratio(a.carried, a.before)
        where = f"blocks {b.layer} ({b.kind})"
        if residue > UNEXPLAINED:
            yield Missed(
                where, "the stream is what the last block left", f"{100 * residue:.2g} % of it is something else"
            )
        else:
            yield Reading(where, "residual stream (not the branch)", 1.0, c, factors)


# ---- head ------------------------------------------------------------------------------------------------------------------


def head(ctx: Context) -> Iterator[Reading | Missed]:
    """By what the product of the head was multiplied, from the final norm to the loss, and to what the model returns."""
    record = ctx.seen[0]
    weight = next((p for p in ctx.placed if p.role == "head"), None)
    tables = [p for p in ctx.placed if p.role == "embedding" and p.layout.role != POSITION]
    weight = weight or (tables[0] if tables else None)
    if weight is None:
        return
    products = [p for p in record.products if p.info.parameter is weight.parameter]
    sinks = {"loss": record.losses, "logits": record.returned}
    mine = {what: [s for s in many if s[0] in products] for what, many in sinks.items()}
    expected = "the loss, or what the model returns, is head(norm(stream)) times one number"
    if not any(mine.values()):
        seen = "no product with it was seen" if not products else "neither is a multiple of its product"
        yield Missed(weight.name, expected, seen, ("logits computed by a fused kernel", "a batch for which none are"))
        return
    factors = {"head multiplier": unfold(ctx.plan).head_multiplier}
    for what, many in mine.items():
        for product, factor in many[:1]:
            c, residue = _before_head(ctx, product)
            if residue > UNEXPLAINED:
                share = f"{100 * residue:.2g} % of what the head was given is something else"
                yield Missed(weight.name, expected, share, ("a norm that is not known here",))
                return
            yield Reading(weight.name, what, ctx.plan.multipliers.head, c * product.factor * factor, factors)


def _before_head(ctx: Context, product: Product) -> tuple[float, float]:
    """(c, residue): what the head was given, against the final norm of the stream."""
    source, factor = product.given_is or (None, 1.0)
    if isinstance(source, Normed):
        c, residue = norm_ratio(source, ctx.tokens)
        return c * factor, residue
    last = ctx.seen[0].stream
    given = product.given.reshape(-1, product.given.shape[-1])
    if last is None or last.numel() != given.numel():
        return float("nan"), 1.0
    gains = [p for p in ctx.placed if p.role == "final_norm"]
    return norm_ratio(Normed(last, given.reshape(last.shape), gains), ctx.tokens)


def norm_ratio(n: Normed, rows: int = 64) -> tuple[float, float]:
    """(c, residue) of a norm's output against the norm of its input with its gain and bias, whichever norm it is."""
    x = n.given.reshape(-1, n.given.shape[-1])[:rows].double()
    out = n.out.reshape(-1, n.out.shape[-1])[:rows]
    gain, bias = _vectors(n.vectors, x)
    scale, shift = (_rows(t, n.given, rows) for t in (n.scale, n.shift))
    fits = []
    for eps in EPSILONS:
        for unit in (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), F.layer_norm(x, x.shape[-1:], eps=eps)):
            fits.append(
                fit_ratio(out, (unit * gain + bias) * (1 if scale is None else scale) + (0 if shift is None else shift))
            )
    return min(fits, key=lambda f: f[1])


def _rows(t: Tensor | None, like: Tensor, rows: int) -> Tensor | None:
    """A scale or a shift for each of the first rows of what was normed."""
    return None if t is None else t.expand(like.shape).reshape(-1, like.shape[-1])[:rows].double()


def _vectors(vectors: Sequence[ParamInfo], x: Tensor) -> tuple[Tensor, Tensor]:
    gain, bias = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    for p in vectors:
        value = p.parameter.detach().double() + p.gain_offset  # such code multiplies by 1 + w
        gain, bias = (gain, bias + value) if p.role == "bias" else (gain * value, bias * value)
    return gain, bias
