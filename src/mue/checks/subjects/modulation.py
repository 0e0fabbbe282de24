"""adaLN-zero (2212.09748): is every norm scaled and shifted, every branch behind a gate, each by a vector of its own?

At init a block is the identity, so that what comes out of it says nothing: this looks at the branch before its gate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mue.checks.branches import Branch
from mue.checks.context import Context
from mue.checks.readings import UNEXPLAINED, norm_ratio
from mue.checks.record import Normed, Product
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding, several
from mue.rules.roles import ROLES

NAME = "modulation"


@check_of(NAME, place=7.2, needs=("roles", "values", "batch"), task="image")
def modulation(ctx: Context) -> Iterator[Finding]:
    """Gates of all branches, scale and shift of what they and the head are given, and no vector used twice or never."""
    names = [p.name for p in ctx.placed if ROLES[p.role].kind == "modulation"]
    if not names:
        yield Finding(NAME, SKIP, measured="no modulations")
        return
    found = [*_gates(ctx), *_norms(ctx), *_vectors(ctx, names)]
    yield from found
    if not found:
        yield Finding(NAME, PASS, measured=f"{len(ctx.branches)} branches behind gates, {len(names)} modulations")


def _gates(ctx: Context) -> Iterator[Finding]:
    bare = [_where(b) for b in ctx.branches if b.added.term.gate is None]
    if bare:
        yield Finding(
            NAME,
            FAIL,
            several(bare),
            "x + gate · branch, so that the block starts as the identity",
            "the branch joins the stream as it is",
            ("the gate is missing, or is made of something else than the modulation",),
            "mue.lab.models.diffusion shows where each of the six vectors goes",
        )


def _where(b: Branch) -> str:
    return f"blocks {b.layer} {b.kind}"


def _norms(ctx: Context) -> Iterator[Finding]:
    """What reads the stream is given norm(x) · (1 + scale) + shift, which at init is norm(x)."""
    plain: dict[str, Normed | None] = {}
    for b in ctx.branches:
        for p in b.products:
            if (
                ROLES[p.info.role].reads_residual
                and p.info.role != "modulation"
                and ROLES[p.info.role].kind != "expert"
            ):
                plain.setdefault(_where(b), _given(p))
    for p in ctx.seen[0].products:
        if p.info.role == "head":
            plain.setdefault(p.info.name, _given(p))
    bare = [where for where, n in plain.items() if n is not None and (n.scale is None or n.shift is None)]
    if bare:
        yield Finding(
            NAME,
            FAIL,
            several(bare),
            "norm(x) · (1 + scale) + shift",
            "the norm's output, or only one of scale and shift",
            ("a line is missing: time and class reach this place through the stream alone",),
            "modulated(norm(x), shift, scale)",
        )
    wrong = [
        where
        for where, n in plain.items()
        if n is not None and n.scale is not None and n.shift is not None and _not_one(n)
    ]
    if wrong:
        yield Finding(
            NAME,
            FAIL,
            several(wrong),
            "norm(x) · (1 + scale) + shift, which is norm(x) while the modulation is 0",
            "0 while the modulation is 0: norm(x) · scale",
            ("the 1 beside the scale is missing, so that the branch starts dead",),
            "n * (1 + scale) + shift",
        )


def _given(p: Product) -> Normed | None:
    """The norm whose output, rescaled or not, a product was given; the last one before it where that is not known."""
    source = p.given_is[0] if p.given_is is not None else p.normed
    return source if isinstance(source, Normed) else None


def _not_one(n: Normed) -> bool:
    assert n.scale is not None
    return not bool(n.scale.any()) and not norm_ratio(n)[1] < UNEXPLAINED


def _vectors(ctx: Context, names: list[str]) -> Iterator[Finding]:
    """Each vector of a modulation is used once."""
    uses = Counter((name, place) for name, place, _ in ctx.seen[0].modulated)
    width = ctx.plan.target.width
    for p in ctx.placed:
        if p.name not in names or not any(name == p.name for name, _ in uses):
            continue  # one that is used nowhere at all gets no gradient, and "moved" names it
        many = p.fan_out // width
        twice = [i for i in range(many) if uses[p.name, i] > 1]
        never = [i for i in range(many) if not uses[p.name, i]]
        if twice and never:
            how = [use for name, place, use in ctx.seen[0].modulated if (name, place) == (p.name, twice[0])]
            yield Finding(
                NAME,
                FAIL,
                p.name,
                f"each of its {many} vectors in one place",
                f"vector {twice[0]} is used as {' and as '.join(how)}, vector {never[0]} nowhere",
                ("two vectors were mixed up where the product is cut",),
                "shift, scale, gate of attention, then of the feed-forward, each once",
            )
