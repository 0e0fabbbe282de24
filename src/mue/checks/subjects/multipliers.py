"""Is every forward multiplier really applied, and once? Measured on what each branch adds to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

from mue.checks import readings as read
from mue.checks.branches import Branch
from mue.checks.context import Context
from mue.checks.readings import Missed, Reading
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, UNMEASURED, WARN, Finding, several
from mue.checks.solve import Coefficients, as_declared
from mue.layouts.layout import HasLayout, unwrap
from mue.rules.roles import ROLES
from mue.util.text import number

NAME = "multipliers"


@check_of(NAME, place=7, needs=("roles", "values", "batch"))
def multipliers(ctx: Context) -> Iterator[Finding]:
    """A, R and the residual multiplier of every block, the head's, and a stream and an embedding that carry none."""
    readings: list[Reading] = []
    troubles: list[Finding] = []
    for item in [*_branches(ctx), *_embedding(ctx), *read.stream(ctx), *read.head(ctx)]:
        if isinstance(item, Reading):
            readings.append(item)
        else:
            troubles.append(_missed(item) if isinstance(item, Missed) else item)
    troubles += _vectors(ctx)
    yield from troubles
    wrong: dict[tuple[str, str, str], list[Reading]] = {}
    for r in readings:
        if not abs(r.measured - r.expected) <= max(ctx.tolerance, r.within) * abs(r.expected):
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
            len(many),
        )
    if not wrong and readings and not any(t.status == FAIL for t in troubles):
        yield Finding(NAME, PASS, measured=f"{len(readings)} multipliers applied once", count=len(readings))


def _vectors(ctx: Context) -> Iterator[Finding]:
    """Vectors that the code uses as a gain and the layout has as a bias, or the other way round: they start at 1 and at 0."""
    for name, used in ctx.seen[0].vectors.items():
        info = next(p for p in ctx.placed if p.name == name)
        if (used == "gain") == (info.role == "bias") or (used == "bias" and ROLES[info.role].gain):
            yield Finding(
                NAME,
                FAIL,
                name,
                f"a {info.role}, as its layout says",
                f"the code uses it as a {used}",
                ("the row has another role than the tensor", "a pattern that matches gains and biases alike"),
                f"Layout({info.layout.pattern!r}, {'bias' if used == 'bias' else 'norm'!r}, ('vector',))",
            )


def _missed(m: Missed) -> Finding:
    return Finding(NAME, UNMEASURED, m.where, m.expected, m.measured, m.causes)


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


def _branches(ctx: Context) -> Iterator[Reading | Missed | Finding]:
    """What is read of each branch that met the stream; those that no addition showed are named."""
    seen: set[tuple[int, str]] = set()
    for b in ctx.branches:
        seen.add((b.layer, b.kind))
        if b.kind == "attention":
            yield from read.attention(ctx, b)
        else:
            yield from _feed_forward(ctx, b, ctx.parts[b.layer])
    for layer in range(ctx.plan.target.layers):
        for kind in ("attention", "feed-forward"):
            if (layer, kind) not in seen:
                yield Missed(
                    f"blocks {layer} {kind}",
                    "each branch joins the residual stream by an addition",
                    "no such addition was seen",
                    ("several streams, or a family whose blocks are built otherwise",),
                )


def _feed_forward(ctx: Context, b: Branch, c: Coefficients | None) -> Iterator[Reading | Missed | Finding]:
    names = list(read.down_names(ctx, b.layer).values())
    yield from _copies(ctx, b)
    if c is None or not c.determined:
        why = "its input was not seen" if c is None else "as many experts as the residual width: too few equations"
        yield from (Missed(name, "the branch is made of its weights", why) for name in names)
        return
    if not c.fits:
        yield from _unfit(ctx, b, c, names)
        return
    yield from _misused(b, c)
    yield from _swapped(ctx, b, c)
    yield from read.feed_forward(ctx, b, c)
    yield from read.after_norm(ctx, b, names[0])


def _copies(ctx: Context, b: Branch) -> Iterator[Finding]:
    """Weights that another layer multiplies by, and this one should: a copy has the same values, and no optimizer."""
    elsewhere = {p.info.name for p in ctx.seen[0].products} - {p.info.name for p in b.products}
    for p in ctx.placed:
        if b.layer in p.layers and p.name in elsewhere and ROLES[p.role].part == "down":
            yield Finding(
                NAME,
                FAIL,
                p.name,
                f"read by layers {p.layers[0]} to {p.layers[-1]}, as declared",
                f"layer {b.layer} computes with other weights",
                ("a copy in place of the module itself (deepcopy of one layer)", "built without the pool"),
                "give every layer that reads it the same module",
            )


def _swapped(ctx: Context, b: Branch, c: Coefficients) -> Iterator[Finding]:
    """Gate and up in each other's place, in the routed experts, in the dense or shared feed-forward, or in both."""
    kinds = {ROLES[p.role].kind for p in ctx.placed if b.layer in p.layers}
    for own, activation in ((("expert",), c.activation), (("ffn", "shared"), c.shared)):
        gates = [
            p.name
            for p in ctx.placed
            if b.layer in p.layers
            and ROLES[p.role].kind in own
            and any(ROLES[r].part == "gate" for r in (p.role, *p.layout.parts))
        ]
        if not gates or not activation.swapped or not kinds & set(own):
            continue
        yield Finding(
            NAME,
            FAIL,
            gates[0],
            f"{activation.name}(gate x) · up x",
            f"{activation.name}(up x) · gate x reproduces the branch",
            (
                "gate and up are swapped in the code",
                "swapped in the layout, or when a fused tensor was split or loaded",
            ),
            "swap the two names in the layout, or the two halves of the tensor",
        )


def _misused(b: Branch, c: Coefficients) -> Iterator[Finding]:
    """Matrices of a branch whose activation is not known, that were not summed over the axis that was declared."""
    wrong = [p.info.name for p in b.products if as_declared(p) is False] if c.watched or not c.fits else []
    if wrong:
        yield Finding(
            NAME,
            FAIL,
            several(dict.fromkeys(wrong)),
            "the product over the axis that is declared as in",
            "another product was computed",
            ("an axis is declared or used the wrong way round", "experts in another order than declared"),
            "compare the layout's axes with the code that multiplies",
        )


def _unfit(ctx: Context, b: Branch, c: Coefficients, names: list[str]) -> Iterator[Missed | Finding]:
    """A branch that its own weights do not explain: a fault where one is used otherwise than declared, else not known."""
    wrong = list(_misused(b, c))
    yield from wrong
    if not wrong:
        expected = "the branch is made of its weights, with one of the known activations"
        measured = f"{100 * c.residual:.2g} % of it is unexplained (best: {c.activation.name})"
        causes = ("an activation that is not known here", "something inside the feed-forward beside its weights")
        yield from (Missed(name, expected, measured, causes) for name in names)


def _embedding(ctx: Context) -> Iterator[Reading | Missed | Finding]:
    """The embedding's own multiplier; Gemma's code multiplies by √d: the family's habit, and no fault of the wiring."""
    own = ctx.plan.target.width**0.5
    for r in read.embedding(ctx):
        stock = not isinstance(unwrap(ctx.model), HasLayout)
        if stock and isinstance(r, Reading) and abs(r.measured / own - 1) < 1e-2:
            yield Finding(
                NAME,
                WARN,
                r.where,
                "the embedding enters the stream as it is",
                f"multiplied by √width = {number(own)}, in the family's own code",
                ("the family scales its embedding",),
                "tune the base with the same factor, or divide the planned embedding std by it",
            )
        else:
            yield r
