"""docs/rules.md: every table with its sources, and all of them side by side on the worked example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from mue.plan.compare import all_rules, compare, formulas
from mue.plan.convention import Convention
from mue.plan.explain import why
from mue.plan.fold_table import FOLDS
from mue.plan.plan import Inputs
from mue.plan.transfer import plan_of
from mue.rules import RULES, option_names
from mue.rules.algebra import RATIOS
from mue.rules.laws.law import LAWS, QUANTITIES, Range, get_law, span
from mue.rules.options import OPTIONS, as_json
from mue.rules.roles import ROLES
from mue.rules.sde import INVARIANTS, kept_and_lost, sde
from mue.rules.table import AXES, CELLS, Rule
from mue.shapes import Dense, HParams, MoE, Training, Transformer

INTRO = """\
<!-- Written by `mue rules --markdown` from the tables in src/mue/rules; do not edit. -->
# Transfer rules

Each rule is one file in `src/mue/rules`. A cell is the factor on the value tuned on the base, a monomial in ratios of target
to base. `?` marks what a source does not give: that number stays as tuned, and the plan says so. A rule refuses the changes it
has no answer for, with the reason; it never guesses.

The last columns say how far to trust a number: *published* (printed in the paper, or told by its authors), *authors' code*, or
*inferred* (derived here, or taken from others).
"""

FOLDING = """\
## Folding

A weight used as `c·W` can be stored as `c·W` itself: with these powers of c the training is the same, step by step.
`mue.fold.fold(plan)` does it for a plan, `mue.fold.convert` for a run. Global clipping commutes with it only under the weighted
norm (`mue.fold.clip_grad_norm_`).
"""

LAWS_INTRO = """\
## Fitted laws

What other teams fitted to their sweeps, each one file in `src/mue/rules/laws`: one number for a whole model under standard
parametrization. `mue rules CONFIG.toml` prints beside the rules what each would set for your target; outside the models it was
fitted to a law refuses. A study takes one as a ratio of target to base (`law = "step-law"`).
"""

OTHERS = """\
## Other optimizers

The tables are written for AdamW. What another optimizer takes is derived in `mue.rules.optimizers` from how far one of its
steps moves an element of a weight, or refused.
"""


def markdown() -> str:
    """The whole page."""
    rules = all_rules()
    parts = [INTRO, _ratios(), _options(), _run(), _overview(rules), _examples(), _why()]
    parts += [_rule(rule) for rule in rules]
    parts += [_laws(), OTHERS, FOLDING + "\n" + _folds()]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in line) + " |" for line in lines
        )
        + "\n"
    )


def _ratios() -> str:
    return "## Ratios\n\n" + _table(["ratio", "is"], [[name, text] for name, text in RATIOS.items()])


def _options() -> str:
    rows = []
    for name, option in OPTIONS.items():
        has = [rule for rule, builder in RULES.items() if name in option_names(builder)]
        default: dict[str, list[str]] = {}
        for rule in all_rules():
            if name in rule.options:
                default.setdefault(str(as_json(rule.options)[name]), []).append(rule.name)
        # where rules differ, whose it is
        usual = ", ".join(v if len(default) == 1 else f"{v} ({', '.join(of)})" for v, of in default.items())
        choices = ", ".join(option.choices) or (
            f"[{option.low}, {option.high}]" if option.low is not None else "true, false"
        )
        rows.append([f"`{name}`", option.meaning, choices, usual, ", ".join(has)])
    return "## Options\n\n" + _table(["option", "meaning", "choices", "default", "rules that have it"], rows)


RUN = """\
## Batch and duration

A change of the run moves lr by s = ρ_B^p · ρ_D^-q (p `batch_exponent`, q `duration_exponent`); weight decay, eps and betas follow
by choices of their own. p = q = 1/2 with the rest following is the SDE rule, which `complete-mue-paper` and `complete-d-p` publish.
`complete-mue` has p = 7/20 and q = 0, and leaves weight decay and betas as tuned, as measured (docs/findings/horizon.md, docs/findings/public-runs.md).
The SDE rule in `complete-mue` is `mue.transfer(..., **mue.rules.SDE)`, or in a file
`options = {batch_exponent = 0.5, duration_exponent = 0.5, weight_decay_run = "follows-lr", betas = "linear"}`.

Once p or q is not 1/2, no choice keeps everything. The second table says what each value keeps as it was in the base's run, and by
which factor the rest moves. A plan's notes say it of its own choices, `mue rules CONFIG.toml --why run` step by step.
"""


def _run() -> str:
    kinds = [[f"`{name}`", text] for name, text in INVARIANTS.items()]
    exponents = [tuple(map(Fraction, pair)) for pair in (("1/2", "1/2"), ("1/2", "3/10"), ("7/20", "0"))]
    touched = {"weight_decay_run": ("η·λ·T", "λ/η"), "eps_run": ("η·ε",), "betas": ("(1-β)/η²", "(1-β)·T")}
    rows = [["any", *(kept_and_lost(sde(p, q), among=["T·η²"]) for p, q in exponents)]]
    for name, among in touched.items():
        for choice in OPTIONS[name].choices:
            made = [sde(p, q, **{name: choice}) for p, q in exponents]
            rows.append([f"`{name} = {choice}`", *(kept_and_lost(run, among=among) for run in made)])
    header = ["choice", *(f"p = {p}, q = {q}" for p, q in exponents)]
    return f"{RUN}\n{_table(['quantity', 'is'], kinds)}\n{_table(header, rows)}"


def _overview(rules: list[Rule]) -> str:
    axes = [axis for axis in AXES if axis != "gates"]
    of_experts = ("dense to moe", "experts", "active", "sparsity", "expert width", "granularity")

    def cell(rule: Rule, axis: str) -> str:
        if axis in rule.refuses:
            return "refused"
        if axis in of_experts and "moe" in rule.refuses:
            return "–"
        return "as tuned" if rule.baseline else "yes"

    rows = [[r.name, *(cell(r, axis) for axis in axes), r.source] for r in rules]
    return "## What each rule answers\n\n" + _table(["rule", *axes, "source"], rows)


def _inputs(base: Transformer, target: Transformer, runs: tuple[Training, Training] | None) -> Inputs:
    # the blog's language-model reference (2605.23893)
    tuned = HParams(lr=1e-3, weight_decay=0.1, init_std=0.01)
    before, after = runs or (None, None)
    return Inputs(base, target, tuned, before, after, "complete-mue", Convention())


# The authors' worked example, 128e8a1s (2605.23893): ρ_d = 8, H_act = 9d, ρ_D = 4. Depth and batch do not change
# in it, so 8 layers and 2^19 tokens a step stand for any.
WORKED = _inputs(
    Dense(width=128, ffn=128, layers=8),
    MoE.parse("128e8a1s", width=1024, expert=1024, layers=8),
    (Training(2**19, 25_000), Training(2**19, 100_000)),
)
# Not every rule starts from a dense base: two more, so that each rule answers somewhere.
BETWEEN = _inputs(
    MoE.parse("16e4a", width=128, expert=128, layers=4),
    MoE.parse("16e4a", width=512, expert=512, layers=4),
    None,
)
WIDER = _inputs(Dense(width=128, ffn=512, layers=4), Dense(width=512, ffn=2048, layers=4), None)


def _examples() -> str:
    parts = [
        "## Side by side\n\nFactors on the tuned values; `mue rules CONFIG.toml` prints this for your own target.\n"
    ]
    for title, inputs in (
        ("The worked example: dense d128 → 128e8a1s d1024, four times the steps", WORKED),
        ("Between MoEs: 16e4a d128 → d512", BETWEEN),
        ("Between dense models: d128 → d512", WIDER),
    ):
        made = compare(inputs)
        header, rows = made.table()
        parts.append(f"### {title}\n\n" + _table(header, rows))
        if made.refused:
            parts.append(_table(["refused", "because"], [[k, v] for k, v in made.refused.items()]))
        if inputs is WORKED:
            parts += [
                _table(["fitted law", "sets", "for this target"], made.law_rows()),
                _table(*made.exponent_table()),
            ]
    return "\n".join(parts)


def _why() -> str:
    steps = why(plan_of(WORKED), "expert_down")
    rows = [[s.number, s.text, s.shown, s.source] for s in steps]
    return (
        "### One role step by step\n\n`mue rules CONFIG.toml --why expert_down`, for the worked example:\n\n"
        + _table(["number", "step", "value", "source"], rows)
    )


def _rule(rule: Rule) -> str:
    whole = {
        "output multiplier": str(rule.output_multiplier) + " · A*",
        "route scale": "a of the target, on the normalised routed sum" if rule.routed else "1",
        "residual multiplier": str(rule.residual_multiplier),
        "head multiplier": str(rule.head_multiplier),
        "1-β": str(rule.one_minus_beta),
    }
    lines = [
        f"## {rule.name}",
        f"{rule.title}. {rule.source}.",
        "; ".join(f"{k} `{v}`" for k, v in whole.items()) + ".",
    ]
    if rule.optimizer == "hyperball":
        lines.append('Only for `optimizer = "hyperball"`.')
    lines += [f"Note: {note}." for note in rule.notes]
    rule = rule.for_roles(ROLES.values())
    table = _table(["role", *CELLS.values(), "mark", "source"], formulas(rule))
    refuses = [f"* {axis}: {reason}" for axis, reason in rule.refuses.items()]
    return "\n\n".join([*lines, table.rstrip(), *(["Refuses:\n\n" + "\n".join(refuses)] if refuses else [])]) + "\n"


def _laws() -> str:
    rows = [
        [name if i == 0 else "", sets, f"`{power.formula}`", _ranges(power.ranges), power.note, law.fitted, law.source]
        for name in LAWS
        for law in [get_law(name)]
        for i, (sets, power) in enumerate(law.sets.items())
    ]
    read = [[f"`{name}`", found.meaning] for name, found in QUANTITIES.items()]
    table = _table(["law", "sets", "formula", "fitted for", "note", "runs behind it", "source"], rows)
    return f"{LAWS_INTRO}\n{_table(['number', 'is'], read)}\n{table}"


def _ranges(ranges: Mapping[str, Range]) -> str:
    return ", ".join(f"{name} {span(ends)}" for name, ends in ranges.items())


def _folds() -> str:
    def power(p: int | None) -> str:
        return "–" if p is None else "1" if p == 0 else "c" if p == 1 else f"c^{p}"

    rows = [
        [
            name,
            power(f.lr),
            power(f.weight_decay),
            power(f.eps),
            ", ".join(f"{k} {power(n)}" for k, n in f.state.items()),
            f.why,
        ]
        for name, f in FOLDS.items()
    ]
    return _table(["optimizer", "lr ×", "weight decay ×", "eps ×", "state ×", "why"], rows)
