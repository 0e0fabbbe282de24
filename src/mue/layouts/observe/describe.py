"""Describe any model from its config: a layout row for every parameter, how it was decided, and what could not be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mue.layouts.layout import Layout, canonical, pattern_of
from mue.layouts.observe.axis_sizes import Build, Follows, follow, size_of
from mue.layouts.observe.decide import Decision, Facts, decide
from mue.layouts.observe.gates import Gates, watch_gates
from mue.layouts.observe.param_use import Use, watch
from mue.layouts.observe.post_norms import post_norms

TOKENS = (2, 24)  # the tiny forward pass: sequences, tokens


@dataclass(frozen=True)
class Found:
    """One pattern of parameters: its row (None where undecided), and how that was decided."""

    pattern: str
    shape: tuple[int, ...]
    row: Layout | None
    how: str
    axes: tuple[str, ...] = ()  # as far as observed, where there is no row


@dataclass(frozen=True)
class Description:
    """A model family, described at a tiny size; ``rows`` hold for every size of it.

    Attributes:
        found: every pattern of parameters. gates: what each router's weights are, by the module that holds the experts.
        unbuilt: dimensions that could not be varied, with the reason.
        score: ``"sigmoid"`` or ``"softmax"`` where one of them ran over as many numbers as there are experts.
        cancelled: patterns of output projections whose scale changes nothing, with no norm's gain that could take its place.
    """

    found: tuple[Found, ...]
    gates: Mapping[str, Gates] = field(default_factory=dict)
    unbuilt: Mapping[str, str] = field(default_factory=dict)
    score: str | None = None
    cancelled: frozenset[str] = frozenset()

    @property
    def undecided(self) -> list[Found]:
        return [f for f in self.found if f.row is None]

    def layout(self) -> list[Layout]:
        """The table for :func:`mue.layouts.layout.place`.

        Raises:
            ValueError: parameters without a role, each with the reason and the line that settles it.
        """
        if self.undecided:
            raise ValueError(
                "no role could be decided for:\n  "
                + "\n  ".join(map(question, self.undecided))
                + "\n  (rows of your own: model.layout_rows = [...], or mue inspect --rows FILE.py:NAME)"
            )
        return list(dict.fromkeys(f.row for f in self.found if f.row is not None))  # a user's row may serve several


def question(f: Found) -> str:
    """An undecided parameter, why, and the line a user writes."""
    axes = f.axes or ("vector",) if len(f.shape) == 1 else f.axes or ("expert", "out", "in")[-max(len(f.shape), 2) :]
    return f"{f.pattern} {f.shape}: {f.how}; add Layout({f.pattern!r}, ROLE, {axes})"


def describe(
    build: Build,
    tiny: Any,
    rows: Sequence[Layout] = (),
    forward: Callable[[nn.Module], object] | None = None,
) -> Description:
    """Observe the family of ``tiny``, a small config, and give every pattern of parameters a role.

    Args:
        build: makes the model from a config, on the current default device.
        tiny: a config small enough to run.
        rows: the user's own rows; they win, and one that matches nothing is an error.
        forward: runs the model once; default: :func:`ask` with random tokens.

    Raises:
        ValueError: a user's row that matches no parameter or does not fit its axes; a config without a width.
    """
    follows = follow(build, tiny)
    torch.manual_seed(0)
    model = build(tiny).float().eval()
    constants = {canonical(n): _constant(p) for n, p in model.named_parameters()}
    shapes = {canonical(n): tuple(p.shape) for n, p in model.named_parameters()}
    _wake(model)
    gates: dict[str, Gates] = {}
    scores: set[tuple[str, int]] = set()
    top = min((size_of(tiny, "vocabulary") or 90, 90))
    run = forward or (lambda m: ask(m, torch.randint(min(3, top - 1), top, TOKENS)))
    with watch_gates(model, gates):
        uses = {canonical(n): u for n, u in watch(model, lambda: run(model), scores).items()}
    found = []
    for pattern, names in _patterns(shapes).items():
        facts = [_facts(pattern, n, shapes[n], uses, follows, constants[n]) for n in _distinct(names, shapes, uses)]
        found.append(_found(pattern, facts, _final(uses, follows, shapes), rows))
    _check_rows(rows, shapes)
    experts = size_of(tiny, "experts")
    score = {kernel for kernel, size in scores if size == experts}
    after, cancelled = post_norms(model, run, {f.pattern: f.row for f in found if f.row is not None})
    found = [
        replace(f, row=replace(f.row, after=after[f.pattern])) if f.row and f.pattern in after else f for f in found
    ]
    return Description(tuple(found), gates, follows.unbuilt, score.pop() if len(score) == 1 else None, cancelled)


def ask(model: nn.Module, tokens: torch.Tensor) -> Any:
    """Call a language model on tokens, as it wants them: by name, or as the one argument."""
    named = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values())
    extra = {"use_cache": False} if "use_cache" in named or anything else {}
    return model(input_ids=tokens, **extra) if "input_ids" in named or anything else model(tokens, **extra)


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Move every tensor off its start, so that nothing is hidden behind a gain or an output of zero."""
    for p in model.parameters():
        if p.is_floating_point():
            p.add_(torch.randn_like(p), alpha=0.02)


def _constant(p: Tensor) -> float | None:
    first = p.detach().flatten()[0]
    return float(first) if bool((p.detach() == first).all()) else None


def _patterns(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(pattern_of(name), []).append(name)
    return groups


def _distinct(names: list[str], shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, Use]) -> list[str]:
    """Names that stand for the pattern: one for each number of axes and way of being used."""
    chosen: dict[tuple[int, str], str] = {}
    for n in names:
        if uses[n].seen:
            chosen.setdefault((len(shapes[n]), str(sorted(uses[n].summed)) + str(uses[n].looked_up)), n)
    return list(chosen.values()) or names[:1]


def _facts(
    pattern: str, name: str, shape: tuple[int, ...], uses: Mapping[str, Use], follows: Follows, constant: float | None
) -> Facts:
    return Facts(pattern, shape, uses[name], follows.axes[name], follows.is_width[name], constant)


def _final(uses: Mapping[str, Use], follows: Follows, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The gain outside the layers that was used last: the final norm."""
    outside = [n for n in shapes if len(shapes[n]) == 1 and pattern_of(n) == n and uses[n].elementwise]
    gains = [n for n in outside if not n.endswith("bias")]
    return max(gains, key=lambda n: uses[n].order, default=None)


def _found(pattern: str, facts: list[Facts], final: str | None, rows: Sequence[Layout]) -> Found:
    shape = facts[0].shape
    own = [row for row in rows if row.regex.fullmatch(pattern)]
    if own:
        return (
            Found(pattern, shape, own[0], "given by the user")
            if len(own) == 1
            else Found(
                pattern, shape, None, f"matched by {len(own)} of the user's rows ({', '.join(r.pattern for r in own)})"
            )
        )
    decisions = [decide(_with_final(f, final)) for f in facts]
    kinds = {(d.role, d.axes, d.parts) for d in decisions}
    if len(kinds) > 1:
        return Found(pattern, shape, None, "layers differ: " + " / ".join(f"{d.role} {d.axes}" for d in decisions))
    d: Decision = decisions[0]
    row = None if d.role is None else Layout(pattern, d.role, d.axes, d.parts, d.start)
    return Found(pattern, shape, row, d.how, d.axes if row is None else ())


def _with_final(f: Facts, final: str | None) -> Facts:
    return Facts(f.pattern, f.shape, f.use, f.follows, f.is_width, f.constant, f.pattern == final)


def _check_rows(rows: Sequence[Layout], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for row in rows:
        hits = [n for n in shapes if row.regex.fullmatch(n) or row.regex.fullmatch(pattern_of(n))]
        if not hits:
            raise ValueError(
                f"your row {row.pattern!r} ({row.role}) matches no parameter: remove it or correct the pattern"
            )
        for n in hits:
            if len(row.axes) != len(shapes[n]):
                raise ValueError(
                    f"your row {row.pattern!r} declares axes {row.axes}, but {n} has {len(shapes[n])} of them"
                )
