"""The table of ``docs/routers.md``: router × claim × measured × verdict, from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from claims.spec import Check
from claims.verdict import NOT_MEASURED, Judged, Outcome
from mue.util.files import read_text, write_text

BEGIN = "<!-- claims: written by benchmarks/router_claims.py --table -->\n"
END = "<!-- /claims -->\n"
_WORDS = {"below": "< {}", "above": "> {}", "within": "within ± {}", "apart": "beyond ± {}"}


def table(judged: Sequence[Judged]) -> str:
    """The table in Markdown, with what it counts.

    Args:
        judged: every claim.
    """
    lines = ["| router | claim | predicted and measured (mean ± 95 %) | seeds | verdict |", "|---|---|---|---|---|"]
    for one in judged:
        claim = one.claim
        source = (
            f"[{claim.source}](https://arxiv.org/abs/{claim.source})" if claim.source[:1].isdigit() else claim.source
        )
        measured = "<br>".join([*map(_line, one.checks), *(f"control: {_line(x)}" for x in one.controls)])
        seeds = min(x.seeds for x in (*one.checks, *one.controls))
        of = len(claim.seeds)
        cells = [
            f"`{claim.router}`, {source}",
            f"`{claim.name}`: {claim.claim}",
            measured,
            str(of) if seeds == of else f"{seeds} of {of}",
        ]
        lines.append("| " + " | ".join([*cells, one.verdict]) + " |")
    verdicts = [one.verdict for one in judged]
    count = ", ".join(f"{v.partition(':')[0]} {verdicts.count(v)}" for v in dict.fromkeys(verdicts))
    return "\n".join(lines) + f"\n\nOf {len(judged)} claims: {count}.\n"


def write_table(page: Path, judged: Sequence[Judged]) -> None:
    """Put the table between its marks in a page, atomically; ``ValueError`` where the page has no marks."""
    text = read_text(page)
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(
            f"{page} needs the lines {BEGIN.strip()} and {END.strip()}, once each, for the table to go between"
        )
    head, rest = text.split(BEGIN)
    write_text(page, head + BEGIN + table(judged) + END + rest.split(END)[1])


def _line(outcome: Outcome) -> str:
    check, mean = outcome.check, outcome.mean
    said = f"{_said(check)} {_WORDS[check.criterion].format(f'{check.bound:g}')}"
    if mean is None:
        return f"{said}: {NOT_MEASURED}"
    return f"{said}: {_number(mean.value)} ± {_number(mean.half)}, {outcome.verdict}"


def _said(check: Check) -> str:
    of = f"`{check.of}`"
    if not check.pair:
        return of
    other = f"{check.other:g}" if isinstance(check.other, float) else f"`{check.other}`"
    return f"{of} {'−' if check.pair == 'minus' else '/'} {other}"


def _number(x: float) -> str:
    """Three digits, and whole numbers as they are."""
    return "∞" if x == float("inf") else f"{x:.3g}" if abs(x) < 1 else f"{x:.4g}"
