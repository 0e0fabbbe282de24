"""A plan for readers: the header lines and the table of every parameter."""

from __future__ import annotations

from dataclasses import fields

from mue.plan import assumptions, per_role
from mue.plan.defaults import not_given
from mue.plan.fold import unfold
from mue.plan.notes import warmup_averages
from mue.plan.plan import PlanData
from mue.rules.options import as_json
from mue.rules.roles import ROLES
from mue.rules.table import CELLS, FACTORS, FIELDS, MARKS
from mue.shapes import DEFAULT_HEAD_DIM, HParams, Transformer
from mue.shapes.settings import as_text
from mue.util.text import below_one, number, text_table, wrapped

WIDTH = 120  # columns of a plan that is printed plainly
COLUMNS = ["role", "tensors", *CELLS.values(), *FACTORS.values(), "marks", "source"]


def header(plan: PlanData) -> list[tuple[str, str]]:
    """The plan in a few lines: (what, value)."""
    base = plan.inputs.base
    drift = {
        k: " / ".join(dict.fromkeys("(not derived)" if b.drift[k] is None else number(b.drift[k]) for b in plan.blocks))
        for k in plan.drift
    }
    lines = [
        ("rule", f"{plan.rule.name} ({plan.rule.source})"),
        ("base", base.name if isinstance(base, Transformer) else f"plan {base.hash} ({base.target.name})"),
        *([("taken of the base", _taken(base, plan))] if isinstance(base, Transformer) else []),
        *([("not given, so default", unsaid)] if (unsaid := not_given(plan.inputs)) else []),
        (
            "target",
            f"{plan.target.name}: {plan.target.parameters:,} parameters, {plan.target.active_parameters:,} active",
        ),
        *([("router", routers)] if (routers := _routers(plan.target)) else []),
        ("active width", " / ".join(f"{b.active_width} ({b.notation} × {b.layers})" for b in plan.blocks)),
        ("output multiplier A", " / ".join(number(b.output_multiplier) for b in plan.blocks)),
        ("route scale R", " / ".join(number(b.route_scale) for b in plan.blocks)),
        *_of_routers(plan.target),
        ("residual, head multiplier", f"{number(plan.residual_multiplier)}, {number(plan.head_multiplier)}"),
        ("attention scale", number(plan.attention_scale)),
        ("betas", ", ".join(map(below_one, plan.betas))),
        *_warmup(plan),
        (
            "drift, reported only",
            f"σ0 experts × {drift['sigma0_experts']}, σ0 others × {drift['sigma0_other']}, up/gate update × {drift['up_gate']}",
        ),
        ("unchanged", ", ".join(f"{k} {v}" for k, v in plan.unchanged.items())),
    ]
    lines.append(
        ("tensors", "as in mue's own blocks; in brackets (norms, biases): your model may have others, or none")
    )
    lines.append(("marks", f"of {', '.join(CELLS.values())}: {', '.join(f'{v} {k}' for k, v in MARKS.items())}"))
    if plan.rule.options:
        lines.insert(1, ("options", ", ".join(f"{k} {v}" for k, v in as_json(plan.rule.options).items())))
    if plan.tuned.roles:
        lines.insert(2, ("per role", per_role.summary(plan.tuned)))
    if plan.folding is not None:
        lines.append(("folded", f"multipliers are in the weights; R is in the {plan.folding.route}"))
    return lines + [("note", note) for note in plan.notes] + [("hash", known_by(plan))]


def _warmup(plan: PlanData) -> list[tuple[str, str]]:
    """How long the target's lr warmup is for its run and for Adam's beta2."""
    found = warmup_averages(plan.tuned, plan.betas[1], plan.training)
    if found is None:
        return []
    steps, averages = found
    return (
        [("warmup", f"{steps:,.0f} steps of {plan.training.steps:,}, {number(averages)} × 1/(1-β2)")]
        if plan.training
        else []
    )


def known_by(plan: PlanData) -> str:
    """The hash by which a plan is known in whatever form, and, of a folded one, its own, with who carries R.

    A plan, its fold and the file that is exported of it say the same first word so.
    """
    if plan.folding is None:
        return plan.hash
    return f"{unfold(plan).hash} (folded, R in the {plan.folding.route}: {plan.hash})"


def _of_routers(shape: Transformer) -> list[tuple[str, str]]:
    """What is taken for granted of them; no line where no block has one."""
    blocks = [block for block in shape.blocks if block.experts]
    lines = {
        "gates": dict.fromkeys(map(assumptions.of_gates, blocks)),
        "tokens of an expert": dict.fromkeys(map(assumptions.of_tokens, blocks)),
    }
    return [(what, " / ".join(found)) for what, found in lines.items() if found]


def _routers(shape: Transformer) -> str:
    """Routers that have something to set, with all of it; empty where none has."""
    found = []
    for block in shape.blocks:
        settings = {k: v for k, v in block.all_settings.items() if v != {}} if block.experts else {}
        if settings:
            found.append(f"{block.router}: {as_text(settings)}")
    return " / ".join(dict.fromkeys(found))


def _taken(base: Transformer, plan: PlanData) -> str:
    """The base's numbers that have defaults and that every transfer starts from, with those named that may be no more than that."""
    tuned = plan.tuned
    usual = {f.name: f.default for f in fields(HParams)}
    own = [("head_dim", base.head_dim == DEFAULT_HEAD_DIM)]
    own += [(name, getattr(tuned, name) == usual[name]) for name in ("betas", "eps")]
    defaults = [name for name, same in own if same]
    taken = (
        f"{base.num_heads} heads of {base.head_dim}, {_of_task(base)},"
        f" betas {', '.join(map(below_one, tuned.betas))}, eps {number(tuned.eps)}"
    )
    if plan.inputs.given is not None:  # a file, of which a line of its own says it
        return taken
    return taken + (f" (mue's defaults, if you gave no other: {', '.join(defaults)})" if defaults else "")


def _of_task(shape: Transformer) -> str:
    image = shape.image
    return f"vocab {shape.vocab}, sequence {shape.sequence}" if image is None else f"images of {image.text}"


def table(plan: PlanData) -> tuple[list[str], list[list[str]]]:
    """Header and one line per role present (per block where blocks differ): values, factors, source and its mark."""
    rows = []
    first = plan.blocks[0].roles
    for index, block in enumerate(plan.blocks):
        for role, r in block.roles.items():
            # A line that says the same as the first block's is left out: most roles are alike in all blocks.
            repeated = index > 0 and r.values == first[role].values and first[role].count
            if not r.count or repeated:
                continue
            name = _name(plan, index, role)
            std = r.init if r.init in ("zero", "shared") else ""
            values = [number(v) for _, v in r.values.items()]
            values[0] = std if std == "zero" else f"{values[0]} {std}".rstrip()
            marks = " ".join(MARKS[r.marks[f]] if f in r.marks else "–" for f in FIELDS)
            formulas = [r.formula.get(f, "–") for f in FIELDS]
            # gains and biases are not asked for when a plan meets a model (mue.model.match): it has what it has
            count = str(r.count) if ROLES[role].drawn else f"({r.count})"
            rows.append([name, count, *values, *formulas, marks, r.source])
    return list(COLUMNS), rows


def _name(plan: PlanData, index: int, role: str) -> str:
    """The role, and which blocks the row is of where that makes a difference."""
    block, tags = plan.blocks[index], []
    own = ROLES[role].feed_forward  # the rest is in every block
    if own and len({b.notation for b in plan.blocks}) > 1:
        tags.append(block.notation)
    alike = [b for b in plan.blocks if not own or b.notation == block.notation]
    if any(b.roles[role].values != block.roles[role].values for b in alike):
        tags.append(plan.layers_of(index))
    return f"{role} [{', '.join(tags)}]" if tags else role


def split(plan: PlanData) -> tuple[tuple[list[str], list[list[str]]], tuple[list[str], list[list[str]]]]:
    """The same as :func:`table` in two that are narrow enough for a page: most roles share their factors.

    Returns:
        Header and rows of roles with their values, marks and sources; header and rows of (factor of what, factor, roles).
    """
    columns, rows = table(plan)
    factors = list(FACTORS.values())
    kept = [i for i, name in enumerate(columns) if name not in factors]
    of: dict[tuple[str, str], list[str]] = {}
    for name in factors:
        for row in rows:
            if (formula := row[columns.index(name)]) != "–":
                of.setdefault((name, formula), []).append(row[0])
    shared = [[name, formula, ", ".join(roles)] for (name, formula), roles in of.items()]
    return ([columns[i] for i in kept], [[row[i] for i in kept] for row in rows]), (["of", "factor", "roles"], shared)


def text(plan: PlanData) -> str:
    """The plan as plain text of :data:`WIDTH` columns: header, values, factors; sources are long, and their marks stay."""
    head = [wrapped(f"{what:<26} ", value, WIDTH) for what, value in header(plan)]
    (columns, rows), (_, factors) = split(plan)
    wide = max((len(formula) for _, formula, _ in factors), default=0)
    lines = [wrapped(f"{of:<5}  {formula:<{wide}}  ", roles, WIDTH) for of, formula, roles in factors]
    values = text_table(columns[:-1], [row[:-1] for row in rows])
    return "\n".join([*head, "", values, "", "Factors on the base's values:", *lines])
