"""Describe any model from its config: a layout row for every parameter, how it was decided, and what could not be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mue.layouts.layout import UNPLANNED, Layout, canonical, pattern_of
from mue.layouts.observe.axis_sizes import Build, axis_sizes
from mue.layouts.observe.config import find_integer, size_of
from mue.layouts.observe.decide import UNNAMED, Decision, Facts, decide
from mue.layouts.observe.gates import Gates, record_gates
from mue.layouts.observe.module_flow import UNWATCHED, ModuleFlow
from mue.layouts.observe.names import ACTIVE_EXPERTS, KV_HEADS
from mue.layouts.observe.param_use import ParamUse, param_use
from mue.layouts.observe.part_order import part_orders
from mue.layouts.observe.post_norms import post_norms
from mue.layouts.observe.run import perturb, run_tokens
from mue.rules.roles import of_part

TINY_BATCH = (2, 24)  # of the tiny forward pass: sequences, tokens


@dataclass(frozen=True)
class ParamPattern:
    """Parameters whose names differ in numbers only: their row (None where undecided), and how that was decided."""

    pattern: str
    shape: tuple[int, ...]
    row: Layout | None
    how: str
    axes: tuple[str, ...] = ()  # as far as observed, where there is no row

    def question(self) -> str:
        """An undecided parameter, why, and the line a user writes to settle it."""
        axes = self.axes or (
            ("vector",) if len(self.shape) == 1 else ("expert", "out", "in")[-max(len(self.shape), 2) :]
        )
        return f"{self.pattern} {self.shape}: {self.how}; add Layout({self.pattern!r}, ROLE, {axes})"


@dataclass(frozen=True)
class Description:
    """A model family, described at a tiny size; its rows hold for every size of it.

    Attributes:
        patterns: every pattern of parameters. gates: what each router's weights are, by the module that holds the experts.
        unbuilt: dimensions that could not be varied, with the reason.
        score: ``"sigmoid"`` or ``"softmax"`` where one of them ran over as many numbers as there are experts.
        cancelled: patterns of output projections whose scale changes nothing, with no norm's gain that could take its place.
        names: of parameters whose pattern is not their name with a star for every number → that pattern.
    """

    patterns: tuple[ParamPattern, ...]
    gates: Mapping[str, Gates] = field(default_factory=dict)
    unbuilt: Mapping[str, str] = field(default_factory=dict)
    score: str | None = None
    cancelled: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)

    def pattern(self, name: str) -> str:
        """Of which of the patterns a parameter is."""
        return self.names.get(canonical(name)) or pattern_of(name)

    @property
    def undecided(self) -> list[ParamPattern]:
        return [p for p in self.patterns if p.row is None]

    def layout(self) -> list[Layout]:
        """The table for :func:`mue.layouts.place.place`.

        Raises:
            ValueError: parameters without a role, each with the reason and the line that settles it.
        """
        if self.undecided:
            raise ValueError(
                "no role could be decided for:\n  "
                + "\n  ".join(p.question() for p in self.undecided)
                + "\n  (rows of your own: model.layout_rows = [...], or mue inspect --rows FILE.py:NAME)"
            )
        return list(dict.fromkeys(p.row for p in self.patterns if p.row is not None))  # a user's row may serve several


def describe(
    build: Build,
    tiny: Any,
    rows: Sequence[Layout] = (),
    forward: Callable[[nn.Module], object] | None = None,
    known: Sequence[Layout] = (),
    decide: Callable[[Facts], Decision] = decide,
    watch: Callable[[nn.Module], Mapping[str, ModuleFlow]] | None = None,
) -> Description:
    """Observe the family of ``tiny``, a small config, and give every pattern of parameters a role.

    Args:
        build: makes the model from a config, on the current default device.
        tiny: a config small enough to run.
        rows: the user's own rows; they win, and one that matches nothing is an error.
        forward: runs the model once; default: :func:`mue.layouts.observe.run.run_tokens` on random tokens.
        known: rows that are known of the family, for what cannot be decided; those that match nothing here do nothing.
        decide: from what was observed to a role. watch: what each module is given (:func:`mue.layouts.observe.module_flow.module_flows`),
            for models whose inputs are of several kinds.

    Raises:
        ValueError: a user's row that matches no parameter or does not fit its axes; a config without a width.
    """
    sizes = axis_sizes(build, tiny)
    # the same description every time
    torch.manual_seed(0)
    model = build(tiny).float().eval()
    # before the model is moved off its start: a plan wants to know what a gain starts at
    constants = {canonical(n): _constant(p) for n, p in model.named_parameters()}
    shapes = {canonical(n): tuple(p.shape) for n, p in model.named_parameters()}
    perturb(model)
    gates: dict[str, Gates] = {}
    scores: set[tuple[str, int]] = set()
    top = min((size_of(tiny, "vocabulary") or 90, 90))
    # no ids below 3: families give them to padding and the like, whose rows their code may leave out
    run = forward or (lambda m: run_tokens(m, torch.randint(min(3, top - 1), top, TINY_BATCH)))
    flows = {} if watch is None else watch(model)
    with record_gates(model, gates):
        uses = {canonical(n): u for n, u in param_use(model, lambda: run(model), scores).items()}
    last_gain = _last_gain(uses, shapes)
    patterns = []
    for pattern, names in _by_pattern(shapes).items():
        facts = [
            Facts(
                pattern,
                shapes[n],
                uses[n],
                sizes.axes[n],
                sizes.is_width[n],
                constants[n],
                pattern == last_gain,
                _of_module(flows, n),
            )
            for n in _distinct(names, shapes, uses)
        ]
        patterns.append(_given(pattern, facts[0].shape, rows, known) or _decided(pattern, facts, decide))
    patterns = _doubted(patterns, [*rows, *known])
    _check_rows(rows, shapes)
    measured = {p.pattern: p.row for p in patterns if p.row is not None}
    orders = part_orders(model, run, measured, size_of(tiny, "heads"), find_integer(tiny, KV_HEADS))
    patterns = [_ordered(p, orders, [*rows, *known]) for p in patterns]
    after, cancelled = post_norms(model, run, {p.pattern: p.row for p in patterns if p.row is not None})
    patterns = [
        replace(p, row=replace(p.row, after=after[p.pattern])) if p.row and p.pattern in after else p for p in patterns
    ]
    experts = size_of(tiny, "experts")
    active = find_integer(tiny, ACTIVE_EXPERTS)
    # over all experts, or, where none ran over as many numbers, over those that were picked
    score = {kernel for kernel, size in scores if size == experts} or {k for k, size in scores if size == active}
    # two kernels over as many numbers as there are experts (a gate beside the router): which one scores is not known
    return Description(tuple(patterns), gates, sizes.unbuilt, score.pop() if len(score) == 1 else None, cancelled)


def _of_module(flows: Mapping[str, ModuleFlow], parameter: str) -> ModuleFlow:
    return flows.get(parameter.rpartition(".")[0], UNWATCHED)


def _constant(p: Tensor) -> float | None:
    """The one value that a tensor is filled with, None where it is not."""
    first = p.detach().flatten()[0]
    return float(first) if bool((p.detach() == first).all()) else None


def _by_pattern(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(pattern_of(name), []).append(name)
    return groups


def _distinct(names: list[str], shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, ParamUse]) -> list[str]:
    """Names that stand for the pattern: one for each number of axes and way of being used."""
    chosen: dict[tuple[int, str], str] = {}
    for n in names:
        if uses[n].seen:
            chosen.setdefault((len(shapes[n]), str(sorted(uses[n].summed)) + str(uses[n].looked_up)), n)
    return list(chosen.values()) or names[:1]


def _last_gain(uses: Mapping[str, ParamUse], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The gain outside the layers that was used last: the final norm."""
    outside = [n for n in shapes if len(shapes[n]) == 1 and pattern_of(n) == n and uses[n].elementwise]
    gains = [n for n in outside if not n.endswith("bias")]
    return max(gains, key=lambda n: uses[n].order, default=None)


def _given(
    pattern: str, shape: tuple[int, ...], rows: Sequence[Layout], known: Sequence[Layout]
) -> ParamPattern | None:
    """The row that the user, or else the family's file, has for a pattern; None where neither has one."""
    own, theirs = ([row for row in table if row.regex.fullmatch(pattern)] for table in (rows, known))
    if len(own) > 1:
        why = f"matched by {len(own)} of the user's rows ({', '.join(r.pattern for r in own)})"
        return ParamPattern(pattern, shape, None, why)
    if own:
        return ParamPattern(pattern, shape, own[0], "given by the user")
    return ParamPattern(pattern, shape, theirs[0], "known of this family") if theirs else None


def _decided(pattern: str, facts: list[Facts], decide: Callable[[Facts], Decision]) -> ParamPattern:
    """What the facts of a pattern's parameters agree on."""
    shape = facts[0].shape
    decisions = [decide(f) for f in facts]
    if len({(d.role, d.axes, d.parts) for d in decisions}) > 1:
        why = "layers differ: " + " / ".join(f"{d.role} {d.axes}" for d in decisions)
        return ParamPattern(pattern, shape, None, why)
    d = decisions[0]
    row = None if d.role is None else Layout(pattern, d.role, d.axes, d.parts, d.start)
    return ParamPattern(pattern, shape, row, d.how, d.axes if row is None else ())


def _doubted(patterns: list[ParamPattern], given: Sequence[Layout]) -> list[ParamPattern]:
    """An up projection by name is none where another matrix beside it goes up as well, and says neither: one is the gate (AuraFlow)."""
    unnamed = {_beside(p.pattern): p.pattern for p in patterns if p.row is None and p.how.endswith(UNNAMED)}
    return [
        ParamPattern(
            p.pattern, p.shape, None, f"{unnamed[beside]} beside it goes up as well: which is the gate?", p.row.axes
        )
        if p.row is not None
        and p.row not in given
        and p.row.role in of_part("up")
        and (beside := _beside(p.pattern)) in unnamed
        else p
        for p in patterns
    ]


def _beside(pattern: str) -> str:
    """The module that a matrix's module lies in."""
    return pattern.removesuffix(".weight").rpartition(".")[0]


def _ordered(p: ParamPattern, orders: Mapping[str, str], given: Sequence[Layout]) -> ParamPattern:
    """The row with the measured order of its parts; one that was given says it itself."""
    if p.row is None or p.row in given or p.pattern not in orders:
        return p
    return replace(p, row=replace(p.row, order=orders[p.pattern]))


def _check_rows(rows: Sequence[Layout], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for row in rows:
        hits = [n for n in shapes if row.regex.fullmatch(n) or row.regex.fullmatch(pattern_of(n))]
        if not hits:
            raise ValueError(
                f"your row {row.pattern!r} ({row.role}) matches no parameter: remove it or correct the pattern"
            )
        for n in hits:
            if len(row.axes) != len(shapes[n]) and (row.axes or row.role != UNPLANNED):
                raise ValueError(
                    f"your row {row.pattern!r} declares axes {row.axes}, but {n} has {len(shapes[n])} of them"
                )
