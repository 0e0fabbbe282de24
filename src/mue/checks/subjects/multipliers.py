"""Is every forward multiplier really applied, and once? Measured on what each branch adds to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.checks.branches import Branch, Coefficients, fit_ratio
from mue.checks.context import Context, logits_of
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, WARN, Finding, several
from mue.layouts.layout import HasLayout, unwrap
from mue.plan.fold import unfold
from mue.rules.roles import ROLES
from mue.util.text import number

NAME = "multipliers"


@dataclass(frozen=True)
class Reading:
    """One multiplier of one place: what was planned and what was found, and the factors that make it up."""

    where: str
    quantity: str
    expected: float
    measured: float
    factors: Mapping[str, float]


@check_of(NAME, place=7, needs=("roles", "values", "batch"))
def multipliers(ctx: Context) -> Iterator[Finding]:
    """A, R and the residual multiplier of every block, the head's, and a stream and an embedding that carry none (C11, C12)."""
    readings: list[Reading] = []
    troubles: list[Finding] = []
    for item in [*_branches(ctx), *_stream(ctx), *_head(ctx)]:
        (readings if isinstance(item, Reading) else troubles).append(item)  # type: ignore[arg-type]
    yield from troubles
    wrong: dict[tuple[str, str, str], list[Reading]] = {}
    for r in readings:
        if not abs(r.measured - r.expected) <= ctx.tolerance * abs(r.expected):
            wrong.setdefault((r.quantity, number(r.expected), number(r.measured)), []).append(r)
    for (quantity, expected, measured), many in wrong.items():
        yield Finding(
            NAME,
            FAIL,
            f"{quantity} of {several([r.where for r in many])}",
            f"multiplier {expected}{_made_of(many[0])}",
            f"{measured}, {number(many[0].measured / many[0].expected)} of it",
            explain(many[0]),
            "build the model with plan.multipliers and apply each once: mue.lab.models.language shows where"
            if isinstance(unwrap(ctx.model), HasLayout)
            else "remove it from the model's code or config; a folded plan has it in the weights",
        )
    if not wrong and readings and not any(t.status == FAIL for t in troubles):
        yield Finding(NAME, PASS, measured=f"{len(readings)} multipliers applied once")


def _made_of(r: Reading) -> str:
    named = [f"{name} {number(f)}" for name, f in r.factors.items() if f != 1]
    return f" ({' · '.join(named)})" if named else ""


def explain(r: Reading) -> tuple[str, ...]:
    """The factors whose absence or repetition would give what was measured, the likeliest first.

    Within 1 %, as wide as the measurement; factors that lie closer together are all named.
    """
    off, found = r.measured / r.expected, []
    candidates = {**r.factors}
    for name, f in candidates.items():
        if f == 1:
            continue
        for power, text in ((-1, "is missing"), (1, "is applied twice"), (-2, "is applied upside down")):
            if abs(off - f**power) < 1e-2 * abs(f**power):
                found.append(f"{name} = {number(f)} {text}")
    for a, f in candidates.items():
        for b, g in candidates.items():
            if a < b and f != 1 and g != 1 and abs(off * f * g - 1) < 1e-2:
                found.append(f"{a} and {b} are both missing")
    return tuple(found) or (
        "a factor of the model's own (a config's scale, a divided sum) joins the planned one",
        "the model was built from another plan's multipliers",
    )


# ---- branches ------------------------------------------------------------------------------------------------------------


def expected_routed(ctx: Context, layer: int) -> float:
    """What the gates of a layer sum to, as they meet the stream: residual · A · R · E[Σw]."""
    m = ctx.plan.multipliers
    block = ctx.plan.target.per_layer[layer]
    moment = block.gate_moments[0] if block.gate_moments else 1.0
    return m.residual * m.output[layer] * m.route[layer] * moment


def _branches(ctx: Context) -> Iterator[Reading | Finding]:
    """A reading for each branch that met the stream.

    Branches that no addition showed are named, for nothing was read of them.
    """
    m = ctx.plan.multipliers
    seen: dict[tuple[int, str], int] = {}
    for b in ctx.branches:
        key = (b.layer, b.kind)
        seen[key] = seen.get(key, 0) + 1
        if b.kind == "attention":
            yield _attention(b, m.residual)
        else:
            yield from _feed_forward(ctx, b, ctx.parts[b.layer])
    layers = range(ctx.plan.target.layers)
    missing = [f"blocks {i} {kind}" for i in layers for kind in ("attention", "feed-forward") if (i, kind) not in seen]
    if missing:
        yield Finding(
            NAME,
            SKIP,
            several(missing),
            "each branch joins the residual stream by an addition",
            "no such addition was seen",
            ("parallel or fused branches, or a family whose blocks are built otherwise",),
        )


def _attention(b: Branch, residual: float) -> Reading | Finding:
    product = b.last("attention_o")
    assert product is not None
    out = product.out.reshape(-1, product.out.shape[-1])
    # a projection may be computed as W·xᵀ
    c, residue = fit_ratio(b.out, out if out.shape == b.out.shape else out.T)
    if residue > 0.05:
        return _not_a_multiple(product.info.name, residue)
    return Reading(product.info.name, "attention branch", residual, c, {"residual multiplier": residual})


def _not_a_multiple(name: str, residue: float) -> Finding:
    return Finding(
        NAME,
        SKIP,
        name,
        "the branch is a multiple of what its weights give",
        f"{100 * residue:.2g} % of it is something else",
        ("a norm or gate after the projection", "an activation that mue.checks.branches does not know"),
    )


def _feed_forward(ctx: Context, b: Branch, c: Coefficients | None) -> Iterator[Reading | Finding]:
    """What the branch's coefficients say: for the dense or shared experts A·l^-α, for the routed sum that times R.

    R and a are among the suspects on the shared experts' reading as well: R on both is the likeliest slip of a rule
    that puts it on one (transfer-rules 1.1).
    """
    down = [p for p in ctx.placed if p.layer == b.layer and ROLES[p.role].part == "down"]
    names = {ROLES[p.role].kind: p.name for p in reversed(down)}
    if c is None or not c.determined:
        why = "its input was not seen" if c is None else "as many experts as the residual width: too few equations"
        yield Finding(NAME, SKIP, several(names.values()), "", why)
        return
    if not c.fits:
        yield _unfit(ctx, b, c, list(names.values()))
        return
    if c.swapped:
        gate = next(
            p.name
            for p in ctx.placed
            if p.layer == b.layer and any(ROLES[r].part == "gate" for r in (p.role, *p.layout.parts))
        )
        yield Finding(
            NAME,
            FAIL,
            gate,
            f"{c.activation}(gate x) · up x",
            f"{c.activation}(up x) · gate x reproduces the branch",
            (
                "gate and up are swapped in the code",
                "swapped in the layout, or when a fused tensor was split or loaded",
            ),
            "swap the two names in the layout, or the two halves of the tensor",
        )
    m = ctx.plan.multipliers
    A, residual = m.output[b.layer], m.residual
    if c.single is not None:
        kind = "shared" if "shared" in names else "ffn"
        factors = {"output multiplier A": A, "residual multiplier": residual}
        if kind == "shared":
            factors["R (meant for the routed sum only)"] = ctx.plan.multipliers.route[b.layer]
        quantity = "shared experts" if kind == "shared" else "feed-forward branch"
        yield Reading(names[kind], quantity, A * residual, _median(c.single), factors)
    if c.routed.shape[1]:
        factors = {"output multiplier A": A, "route scale R": m.route[b.layer], "residual multiplier": residual}
        block = ctx.plan.target.per_layer[b.layer]
        # a mean in place of a sum, or of the groups' sums, is off by these
        factors["number of active experts"] = float(block.active)
        factors["number of groups"] = float(block.groups)
        yield Reading(names["expert"], "routed sum", expected_routed(ctx, b.layer), _median(c.routed.sum(1)), factors)


def _median(x: Tensor) -> float:
    """Over tokens: the multiplier is one for all, and a token with nearly singular equations must not move it."""
    return float(x.median())


def _unfit(ctx: Context, b: Branch, c: Coefficients, names: list[str]) -> Finding:
    """A branch that its own weights do not explain: a fault where our own layer is, else perhaps an unknown activation."""
    ours = isinstance(unwrap(ctx.model), HasLayout)
    return Finding(
        NAME,
        FAIL if ours else SKIP,
        several(names),
        "the branch is made of its weights, with one of the known activations",
        f"{100 * c.residual:.2g} % of it is unexplained (best: {c.activation})",
        (
            "an axis of a stacked tensor is declared or used the wrong way round",
            "experts in another order than declared",
            "an activation that is not known here",
        ),
        "compare the layout's axes with the code that multiplies",
    )


# ---- stream, embedding, head -----------------------------------------------------------------------------------------------


def _stream(ctx: Context) -> Iterator[Reading | Finding]:
    """The stream itself: it carries no multiplier, nor does the embedding on its way into it (C12).

    l^-α belongs on the branch; on the stream it would shrink everything before the block, embedding included.
    """
    record = ctx.seen[0]
    added = [a for a in record.added if any(p.info.layer is not None for p in a.products)]
    if record.lookup is None or not added:
        yield Finding(NAME, SKIP, "residual stream", "", "no residual stream was recognised")
        return
    table = next((p.name for p in ctx.placed if p.role == "embedding"), "embedding")
    start = added[0].before if added[0].before.shape == record.lookup.shape else record.lookup
    c, residue = fit_ratio(added[0].carried, start)
    # Gemma's code multiplies its embedding by √d: the family's habit, and no fault of the wiring
    own = ctx.plan.target.width**0.5
    if residue < 0.05 and abs(c / own - 1) < 1e-2 and not isinstance(unwrap(ctx.model), HasLayout):
        yield Finding(
            NAME,
            WARN,
            table,
            "the embedding enters the stream as it is",
            f"multiplied by √width = {number(own)}, in the family's own code",
            ("the family scales its embedding",),
            "tune the base with the same factor, or divide the planned embedding std by it",
        )
    elif residue < 0.05:
        yield Reading(
            table, "embedding on its way into the stream", 1.0, c, {"head multiplier": ctx.plan.multipliers.head}
        )
    for b, a in zip(ctx.branches[1:], (x.added for x in ctx.branches[1:]), strict=True):
        c, residue = fit_ratio(a.carried, a.before)
        if residue < 0.05:
            yield Reading(
                f"blocks {b.layer} ({b.kind})",
                "residual stream (not the branch)",
                1.0,
                c,
                {"residual multiplier": ctx.plan.multipliers.residual},
            )


def _head(ctx: Context) -> Iterator[Reading | Finding]:
    """Logits against head(norm(stream)), for each kind of norm and epsilon that the model may have.

    Their ratio is the head multiplier.
    """
    record, out = ctx.seen
    logits = logits_of(out)
    weight = next((p for p in ctx.placed if p.role == "head"), None)
    weight = weight or next((p for p in ctx.placed if p.role == "embedding"), None)
    if logits is None or record.stream is None or weight is None:
        yield Finding(NAME, SKIP, "head", "", "the model returned no logits")
        return
    last = record.stream.reshape(-1, record.stream.shape[-1])[: ctx.tokens].double()
    given = logits.reshape(-1, logits.shape[-1])[: ctx.tokens].double()
    matrix = weight.parameter.detach().double()
    if weight.role == "head" and weight.layout.axes[0] == "in":
        matrix = matrix.T
    fits = (
        [fit_ratio(given, normed @ matrix.T) for normed in _normed(ctx, last)]
        if given.shape[0] == last.shape[0]
        else []
    )
    c, residue = min(fits, key=lambda f: f[1], default=(float("nan"), 1.0))
    if residue > 0.02:
        yield Finding(
            NAME,
            SKIP,
            weight.name,
            "logits are head(norm(stream)) times one number",
            f"{100 * residue:.2g} % of them is something else",
            ("softcapping, or a norm that is not known here",),
        )
        return
    yield Reading(
        weight.name, "logits", ctx.plan.multipliers.head, c, {"head multiplier": unfold(ctx.plan).head_multiplier}
    )


def _normed(ctx: Context, x: Tensor) -> Iterator[Tensor]:
    last = [p for p in ctx.placed if p.role == "final_norm"]
    gains = [p.parameter.detach().double() + float(p.layout.start == 0) for p in last]  # such code multiplies by 1 + w
    gain = gains[0] if gains else x.new_ones(x.shape[-1])
    # the model's own epsilon is not known; these two are the usual ones, and the better fit is taken
    for eps in (1e-6, 1e-5):
        unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        yield unit * gain
        yield F.layer_norm(x, (x.shape[-1],), gain, gains[1] if len(gains) > 1 else None, eps)
