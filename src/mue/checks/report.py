"""What a check found: one finding per thing looked at, and the report that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from mue.util.text import text_table

PASS, FAIL, WARN = "pass", "fail", "warn"
SKIP = "left out"  # nobody asked for it: no batch, no optimizer, nothing of the kind in the plan
SHOWN = 12  # findings of one check that are printed
UNMEASURED = "not measured"  # planned, looked for, and not to be seen: no pass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: its subject (``"init"``, ``"groups"`` …). status: :data:`PASS`, :data:`FAIL`, :data:`WARN`, :data:`SKIP` or
            :data:`UNMEASURED`, the last of one quantity each.
        where: the tensor or module, by canonical name. expected, measured: in words and numbers.
        causes: the likeliest first. mend: the line that mends it. count: how many planned quantities it speaks for.
    """

    check: str
    status: str
    where: str = ""
    expected: str = ""
    measured: str = ""
    causes: tuple[str, ...] = ()
    mend: str = ""
    count: int = 1

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
    """All findings of one run of :func:`mue.check`; prints as a table, failures and what was not measured below it.

    Attributes:
        plan: hash of the plan. seconds: wall time by check.
        allowed: what may stay unmeasured: names of checks, or places (``*`` stands for anything).
    """

    findings: tuple[Finding, ...]
    plan: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.status == FAIL)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.status == WARN)

    @property
    def unmeasured(self) -> tuple[Finding, ...]:
        """What was planned and could not be seen, but for what was allowed to stay so."""
        return tuple(f for f in self.findings if f.status == UNMEASURED and not self._allows(f))

    @property
    def ok(self) -> bool:
        """Nothing failed, and everything planned was measured. A warning is no failure."""
        return not self.failures and not self.unmeasured

    def _allows(self, f: Finding) -> bool:
        return any(name == f.check or fnmatchcase(f.where, name) for name in self.allowed)

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
        rows = [row for name in order for row in self._rows(name, [f for f in self.findings if f.check == name])]
        parts = [text_table(["check", "result", "seconds", "what"], rows)]
        shown = in_full(f for f in self.findings if f.status in (FAIL, WARN))
        return "\n\n".join([*parts, *shown, *map(str, grouped(self.unmeasured))])

    def _rows(self, name: str, found: Sequence[Finding]) -> list[list[str]]:
        """One line for the worst of what was measured, and one of its own for what was not."""
        seconds, rows = f"{self.seconds.get(name, 0.0):.2f}", []
        status = next((s for s in (FAIL, WARN, PASS, SKIP) if any(f.status == s for f in found)), None)
        if status is not None:
            worst = [f for f in found if f.status == status]
            text = worst[0].measured
            if status in (FAIL, WARN):
                text = worst[0].where + (f" and {len(worst) - 1} more" if len(worst) > 1 else "")
            rows.append([name, status, seconds, text])
        missed = [f for f in found if f.status == UNMEASURED]
        if missed:
            allowed = " (allowed)" if all(map(self._allows, missed)) else ""
            text = several([f.where for f in missed], 1)
            rows.append([name, UNMEASURED + allowed, "" if rows else seconds, f"{text}: {missed[0].measured}"])
        return rows


class CheckError(ValueError):
    """Something is wired wrong, or could not be looked at; the message names it, ``report`` holds everything that was found."""

    def __init__(self, report: Report) -> None:
        self.report = report
        failed, missed = report.failures, report.unmeasured
        lines = []
        if failed:
            lines.append(
                f"{len(failed)} thing{'s are' if len(failed) > 1 else ' is'} wired wrong (plan {report.plan}):"
            )
            lines += in_full(failed)
        if missed:
            checks = ", ".join(f'"{name}"' for name in dict.fromkeys(f.check for f in missed))
            lines.append(
                f"{len(missed)} planned thing{'s' if len(missed) > 1 else ''} could not be measured (plan {report.plan}), which is"
                f" no pass; to take that as it is, name the checks or the places: allow_unmeasured=[{checks}]"
            )
            lines += map(str, grouped(missed))
        super().__init__("\n".join(lines))


def in_full(found: Iterable[Finding]) -> list[str]:
    """The text of each finding, :data:`SHOWN` a check: a model of another size is wrong in each of its hundreds of tensors."""
    checks: dict[str, list[Finding]] = {}
    for f in found:
        checks.setdefault(f.check, []).append(f)
    texts: list[str] = []
    for name, many in checks.items():
        texts += map(str, many[:SHOWN])
        if len(many) > SHOWN:
            texts.append(f"{name}: {len(many) - SHOWN} more, all of them in report.findings and in mue check --json")
    return texts


def grouped(missed: Iterable[Finding]) -> list[Finding]:
    """What was not measured for one reason, as one finding that names the first places."""
    places: dict[tuple[str, str, str], list[Finding]] = {}
    for f in missed:
        places.setdefault((f.check, f.expected, f.measured), []).append(f)
    return [replace(many[0], where=several([f.where for f in many])) for many in places.values()]


def several(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + rest
