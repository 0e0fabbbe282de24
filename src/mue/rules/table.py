"""What a rule is: one row per role, each cell a monomial in the ratios, each row with its source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.options import OptionValue
from mue.rules.roles import ROLES, Role
from mue.rules.sde import RunFactors

PUBLISHED = "published"
AUTHORS_CODE = "authors' code"
INFERRED = "inferred"
NOT_GIVEN = "not given"
# One letter each, as plans print them, one for each cell of a row.
MARKS = {PUBLISHED: "P", AUTHORS_CODE: "C", INFERRED: "I", NOT_GIVEN: "?"}

NORMAL = "normal"
ZERO_INIT = "zero"
SHARED_INIT = "shared"
# The factor of a number that a rule sets to zero (MSSP's router and head, HyperP's weight decay).
ZERO = Monomial(coefficient=ONE.coefficient * 0)

# The four numbers of a role, as code and files name them → as tables print them, and how a column of factors calls them.
CELLS = {"init_std": "init std", "lr": "lr", "weight_decay": "weight decay", "eps": "eps"}
FACTORS = {"init_std": "× std", "lr": "× lr", "weight_decay": "× wd", "eps": "× eps"}
FIELDS = tuple(CELLS)

# What can change between a base and a target; a rule refuses those it has no answer for.
AXES: dict[str, str] = {
    "width": "residual width d",
    "depth": "number of blocks L",
    "expansion": "active expansion H_act/d",
    "moe": "experts at all, in base or target",
    "dense to moe": "a dense feed-forward becomes routed experts, or the other way round",
    "experts": "number of routed experts N",
    "active": "active experts per token a",
    "sparsity": "share of the tokens an expert sees, a/N (1 where dense)",
    "expert width": "width h of one expert (or of the dense feed-forward)",
    "granularity": "width of one expert against the residual width, h/d",
    "gates": "gates that do not sum to one",
    "batch": "tokens per step",
    "duration": "tokens of the run",
    "tied": "a head that is the embedding's matrix",
}


@dataclass(frozen=True)
class Row:
    """Factors on the base's values for one role.

    Attributes:
        source: paper, table or equation of each cell. status: :data:`PUBLISHED`, :data:`AUTHORS_CODE` or
            :data:`INFERRED`, of the row's weakest cell.
        init: how the role is drawn: ``"normal"``, ``"zero"`` (then init_std is :data:`ZERO`), or ``"shared"``: all
            experts start from one and the same draw.
        unknown: cells the source does not give. They stay as tuned, and the plan says so.
        cells: cell → its own source, where they differ. marks: cell → its own mark, where that is stronger.
    """

    source: str
    init_std: Monomial = ONE
    lr: Monomial = ONE
    weight_decay: Monomial = ONE
    eps: Monomial = ONE
    status: str = INFERRED
    init: str = NORMAL
    unknown: tuple[str, ...] = ()
    cells: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)

    def mark(self, cell: str) -> str:
        """:data:`PUBLISHED`, :data:`AUTHORS_CODE` or :data:`INFERRED` of one cell; ``"not given"`` for an unknown one."""
        return NOT_GIVEN if cell in self.unknown else self.marks.get(cell, self.status)


@dataclass(frozen=True)
class Rule:
    """A published transfer rule as data.

    Attributes:
        rows: role → :class:`Row`; a role without a row is one the rule has no answer for, and a target that has it is
            refused. unanswered: role → why, where there is more to say.
        output_multiplier: of the feed-forward branch, on the base's own A*.
        residual_multiplier, head_multiplier: of both residual branches, of the logits.
        one_minus_beta: factor on 1-β1 and 1-β2. betas: ``"linear"``, or ``"power"`` for β^factor.
        run: the factors of batch and duration, in a rule that has the SDE rule.
        attention_exponent: of d_head*/d_head on the attention scale: 1 as µP has it (2203.03466); 1/2 keeps a stock
            model's 1/√d_head.
        routed: R follows the block (``a`` on the normalised routed sum) if true, 1 otherwise.
        refuses: axis of :data:`AXES` → reason, for the changes the rule has no answer to.
        notes: what a reader of a plan must know, always printed.
        up_gate: update of up and gate against the base (reported, not corrected); None where nobody derived it.
        optimizer: the family the table is written for: ``"adam"``, ``"hyperball"``, or ``"any"``.
        gradient: the eps cells (without batch and duration) are the scale of the gradients, so that optimizers which
            do not normalise them can be derived. spectral: its assumptions hold for orthogonalised updates too.
        baseline: it refuses nothing because it answers nothing: what it does not scale stays as tuned.
        options: every option of the rule with its value.
        axes: ratio → source of the axis it stands for, where that is not the row's own (depth, batch, duration).
    """

    name: str
    title: str
    source: str
    rows: Mapping[str, Row]
    output_multiplier: Monomial = ONE
    residual_multiplier: Monomial = ONE
    head_multiplier: Monomial = ONE
    one_minus_beta: Monomial = ONE
    betas: str = "linear"
    run: RunFactors | None = None
    routed: bool = True
    attention_exponent: Fraction = Fraction(1)
    refuses: Mapping[str, str] = field(default_factory=dict)
    unanswered: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    up_gate: Monomial | None = None
    optimizer: str = "adam"
    gradient: bool = False
    spectral: bool = False
    baseline: bool = False
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # our own slips while writing a table, and no user's: hence assertions
        assert set(self.rows) <= set(ROLES), f"rule {self.name} has rows for {set(self.rows) - set(ROLES)}"
        assert set(self.refuses) <= set(AXES), f"rule {self.name} refuses {set(self.refuses) - set(AXES)}"

    def for_roles(self, roles: Iterable[Role]) -> Rule:
        """The rule as it reads for the roles of a task: rows for them, and for no others.

        A role that it has neither a row nor a reason against is answered by the class of weights it belongs to (:attr:`Role.like`), and
        what starts at 0 by what it is, starts there.

        Args:
            roles: of a task's plans (:func:`mue.rules.roles.roles_of`).
        """
        rows = {}
        for role in roles:
            row = self.rows.get(role.name) or (None if role.name in self.unanswered else self._by_class(role))
            if row is not None:
                rows[role.name] = _from_zero(row) if role.zero else row
        return replace(self, rows=rows)

    def _by_class(self, role: Role) -> Row | None:
        """The row of the role that it is like, without a depth where it lies in no block."""
        row = self.rows.get(role.like) if role.like is not None else None
        if row is None or role.like is None:
            return None
        source = f"by its class, as {role.like}: {row.source}"
        made = replace(row, source=source, status=INFERRED, cells={}, marks={})
        if role.inside == ROLES[role.like].inside:
            return made
        cells = {cell: getattr(row, cell) for cell in FIELDS}
        return replace(made, **{cell: value / ratio("ρ_L") ** value.exponent("ρ_L") for cell, value in cells.items()})

    def source_of(self, role: str, cell: str, ratio: str) -> str:
        """The source of one ratio in one cell of a role."""
        row = self.rows[role]
        chosen = self.run.chosen.get(cell) if self.run is not None and ratio in ("ρ_B", "ρ_D") else None
        return chosen or self.axes.get(ratio) or row.cells.get(cell) or row.source

    def why_not(self, role: str) -> str:
        """Why the rule has no row for a role."""
        return self.unanswered.get(role, f"{self.title} says nothing about {role.replace('_', ' ')}")


def _from_zero(row: Row) -> Row:
    """The row of a matrix that starts at 0 by what it is."""
    unknown = tuple(cell for cell in row.unknown if cell != "init_std")
    return replace(
        row, init_std=ZERO, init=ZERO_INIT, unknown=unknown, source=f"{row.source}; start: adaLN-zero, 2212.09748"
    )
