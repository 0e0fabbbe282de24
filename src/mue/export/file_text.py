"""What every exported Python file is made of: a head that says what the stack cannot, the table, and code that reads it.

A written file needs its stack and torch, and not mue.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from mue.export.rows import ExportRow
from mue.plan.fold import unfold
from mue.plan.plan import PlanData
from mue.plan.values import Folding
from mue.shapes.routers import LOSSES
from mue.shapes.settings import as_text
from mue.util.text import number

# For files whose patterns are regular expressions; the other reading of ROWS is that of OLMo-core's globs.
REGEX = "re.fullmatch(row[0], _name(name))"
_FROZEN = "(e_score_correction_bias|expert_bias)$"
_MATCH = '''FROZEN = r"{FROZEN}"  # moved by load statistics, never by the optimizer


def _name(name):
    """A parameter's name without what DDP, torch.compile, FSDP and checkpointing put into it."""
    name = re.sub(r"^(module\\.)+", "", name)
    return re.sub(r"(^|\\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\\.", r"\\1", name)


def _rows(model):
    """(row number, parameter) for every trainable parameter; each matches exactly one row{ALL}."""
    found = []
    for name, parameter in model.named_parameters():
        hits = [i for i, row in enumerate(ROWS) if {MATCH}]
        if len(hits) != 1:
            if not parameter.requires_grad or re.search(FROZEN, _name(name)):
                continue
            raise ValueError(f"{name} matches {len(hits)} rows of this plan; it was written for another model")
        found.append((hits[0], parameter))
{UNUSED}    return found
'''
_UNUSED = """    unused = set(range(len(ROWS))) - {i for i, _ in found}
    if unused:
        raise ValueError(f"rows match nothing: {[ROWS[i][0] for i in sorted(unused)]}")
"""
INIT = '''

@torch.no_grad()
def init_(model, seed=0):
    """Draw every parameter as planned. Build the model with its own initialisation first: some rows keep it."""
    torch.manual_seed(seed)
    for i, parameter in _rows(model):
        if parameter.is_meta:
            raise ValueError("a model on the meta device has no values to draw: model.to_empty(device=...) first")
        std, constant = ROWS[i][4:6]
        if std is not None:
            parameter.normal_(0.0, std)
        elif constant is not None:
            parameter.fill_(constant)
'''


def head(
    plan: PlanData,
    model: str,
    use: str,
    cannot: Sequence[str],
    imports: Sequence[str],
    scale: str = "",
    sets: Collection[str] = (),
) -> str:
    """The docstring and the imports: bare names of modules, or whole lines; ``""`` leaves a line free.

    ``scale``: what the forward code has to do about the attention scale, where it has to do anything. ``sets``: what of the base's
    settings the file applies itself, by its word in the last line.
    """
    stays = "the model's forward code stays as it is" + (", but for the attention scale" if scale else "")
    cannot = [*([scale] if scale else []), *cannot, *_losses(plan)]
    lines = "\n".join(textwrap.fill(line, 116, initial_indent=" - ", subsequent_indent="   ") for line in cannot)
    same = ", ".join(
        f"{name} {number(value) if value is not None else 'off'}"
        for name, value in _same(plan).items()
        if name not in sets
    )
    needed = "\n".join(line if " " in line or not line else f"import {line}" for line in imports)
    return f'''"""{plan.target.name}: hyperparameters of plan {unfold(plan).hash} ({plan.rule.name}), written by mue export. Do not edit.
{the_fold(plan)}

For {model}.

{use}

Multipliers are folded into these values; {stays}. What this file cannot say:
{lines}
Taken from the base unchanged, and yours to set: {same}.
"""

{needed}
'''


def the_fold(plan: PlanData) -> str:
    """The sentence on which plan the file's values are, beside the one that was exported: a reader compares hashes."""
    assert plan.folding is not None  # whatever is written is folded
    return f"The values are of its fold, mue.fold.fold(plan, {plan.folding.route!r}), which is itself plan {plan.hash}."


def _losses(plan: PlanData) -> list[str]:
    """The line on auxiliary losses among the settings of the plan's routers: a loop has them, or has not."""
    found = dict.fromkeys(
        f"{block.router}: {as_text(losses)}"
        for block in plan.target.blocks
        if block.experts and (losses := {k: v for k, v in block.all_settings[LOSSES].items() if v})
    )
    return [f"auxiliary losses of the routers, with their coefficients ({'; '.join(found)})"] if found else []


def _same(plan: PlanData) -> dict[str, float | None]:
    t = plan.tuned
    return {
        "clipping": t.clip,
        "warmup": t.warmup,
        "final lr": t.floor,
        "balance loss": t.balance,
        "z-loss": t.z,
        "balance bias speed": t.bias_speed,
    }


def clipping(plan: PlanData, where: str = "global-norm clipping", extra: Mapping[str, float] | None = None) -> str:
    """The line on clipping: what the fold did to the gradients that a global norm sums.

    ``extra``: role → what is folded into it beyond the plan's own fold.
    """
    folded = (plan.folding or Folding("weights")).coefficients
    found = dict(extra or {})
    for role, c in {role: c for block in folded for role, c in block.items()}.items():
        found[role] = found.get(role, 1.0) * c
    if not found:
        return f"{where}: nothing is folded here, it does what it did at the base"
    # the gradient of c·W' is 1/c of that of W
    counts = ", ".join(f"{role.replace('_', ' ')} ×{number(1 / c)}" for role, c in found.items())
    threshold = "off at the base" if plan.tuned.clip is None else f"tuned at {number(plan.tuned.clip)}"
    return (
        f"{where} ({threshold}) and folding do not commute: in its norm these gradients are {counts}; where clipping binds,"
        " weigh them back as mue.fold.clip_grad_norm_ does"
    )


def table(plan: PlanData, rows: Sequence[ExportRow], globs: Callable[[ExportRow], list[str]] | None = None) -> str:
    """BETAS and ROWS; ``globs``: how a row's patterns are written where they are not regular expressions."""
    lines = []
    for row in rows:
        for name in globs(row) if globs else [row.regex]:
            values = ", ".join(map(repr, (*row.setting, row.std, row.constant)))
            lines.append(f'    ({"" if globs else "r"}"{name}", {values}),  # {row.roles}')
    return (
        f"\nBETAS = {plan.betas!r}\n"
        "# (pattern of the whole name, lr, weight decay, eps, std of a normal draw, constant start); None, None: the model's own start\n"
        "ROWS = [\n" + "\n".join(lines) + "\n]\n"
    )


def matching(match: str = REGEX, every_row: bool = True, alone: Sequence[str] = ()) -> str:
    """Code of ``_rows``; ``every_row``: a row that matches nothing is an error too; ``alone``: regexes of what is not planned."""
    frozen = "|".join([_FROZEN, *(f"^{regex}$" for regex in alone)])
    text = (
        _MATCH.replace("{FROZEN}", frozen)
        .replace("{MATCH}", match)
        .replace("{ALL}", ", and each row something" if every_row else "")
    )
    return text.replace("{UNUSED}", _UNUSED if every_row else "")


def commonest(rows: Sequence[ExportRow]) -> ExportRow:
    """A row with the setting that most matrices have: a stack's defaults, so that few parameters need an override.

    Args:
        rows: of one plan, at least one of them a matrix.
    """
    setting = Counter(row.setting for row in rows if row.std is not None).most_common(1)[0][0]
    return next(row for row in rows if row.setting == setting)
