"""What a check found: one finding per thing looked at, and the report that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mue.util.text import text_table

PASS, FAIL, WARN, SKIP = "pass", "fail", "warn", "not measured"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: its subject (``"init"``, ``"groups"`` …). status: :data:`PASS`, :data:`FAIL`, :data:`WARN` or :data:`SKIP`.
        where: the tensor or module, by canonical name. expected, measured: in words and numbers.
        causes: the likeliest first. mend: the line that mends it.
    """

    check: str
    status: str
    where: str = ""
    expected: str = ""
    measured: str = ""
    causes: tuple[str, ...] = ()
    mend: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "causes": list(self.causes)}

    def __str__(self) -> str:
        lines = [f"{self.check}: {self.where}" if self.where else self.check]
        lines += [
            f"  {name}: {text}" for name, text in (("expected", self.expected), ("measured", self.measured)) if text
        ]
        if self.causes:
            lines.append("  likeliest cause: " + "; or ".join(self.causes))
        if self.mend:
            lines.append(f"  mend it: {self.mend}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """All findings of one run of :func:`mue.check`; prints as a table, failures below it in full.

    Attributes:
        plan: hash of the plan. seconds: wall time by check.
    """

    findings: tuple[Finding, ...]
    plan: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.status == FAIL)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.status == WARN)

    @property
    def ok(self) -> bool:
        """Nothing failed. A warning, or a thing that could not be measured, is no failure."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """What ``mue check --json`` prints."""
        return {
            "ok": self.ok,
            "plan": self.plan,
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "findings": [f.to_dict() for f in self.findings],
        }

    def json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        order = list(dict.fromkeys(f.check for f in self.findings))
        rows = [self._row(name, [f for f in self.findings if f.check == name]) for name in order]
        parts = [text_table(["check", "result", "seconds", "what"], rows)]
        shown = [str(f) for f in self.findings if f.status in (FAIL, WARN)]
        return "\n\n".join([*parts, *shown])

    def _row(self, name: str, found: Sequence[Finding]) -> list[str]:
        # the worst finding speaks for the check; what was measured of a part counts before what was not
        status = next((s for s in (FAIL, WARN, PASS, SKIP) if any(f.status == s for f in found)), SKIP)
        worst = [f for f in found if f.status == status]
        text = worst[0].measured
        if status in (FAIL, WARN):
            text = worst[0].where + (f" and {len(worst) - 1} more" if len(worst) > 1 else "")
        return [name, status, f"{self.seconds.get(name, 0.0):.2f}", text]


class CheckError(ValueError):
    """Something is wired wrong; the message names it, ``report`` holds everything that was found."""

    def __init__(self, report: Report) -> None:
        self.report = report
        failed = report.failures
        head = f"{len(failed)} thing{'s are' if len(failed) > 1 else ' is'} wired wrong (plan {report.plan})"
        super().__init__("\n".join([f"{head}:", *map(str, failed)]))


def several(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + rest
