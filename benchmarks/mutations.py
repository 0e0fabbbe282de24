"""The mutation table: every fault of tests/support/wiring_faults.py in every family, and right models over 20 seeds.

    python benchmarks/mutations.py [--quick] [--out docs/results/checks.json]

Families of transformers are left out, and said so, where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mue.checks import Report  # noqa: E402
from mue.lab.train.provenance import provenance  # noqa: E402
from mue.util.files import write_json  # noqa: E402
from support.wiring_cases import FAMILIES, OURS, right  # noqa: E402
from support.wiring_faults import broken, load  # noqa: E402

FAULTS = load()


def families() -> tuple[str, ...]:
    return FAMILIES if importlib.util.find_spec("transformers") else tuple(OURS)


def row(name: str, family: str) -> dict[str, Any]:
    """One fault in one family: was it caught, was the culprit named, by which check, in how many seconds."""
    made = broken(name, family)
    start = time.perf_counter()
    report = made.check()
    seconds = time.perf_counter() - start
    named = [f.check for f in report.failures if re.search(FAULTS[name].culprit, f.where)]
    return {
        "fault": name,
        "family": family,
        "caught": not report.ok,
        "named": bool(named),
        "by": (named or [f.check for f in report.failures] or [""])[0],
        "also": sorted({f.check for f in report.failures} - set(named[:1])),
        "where": next((f.where for f in report.failures if re.search(FAULTS[name].culprit, f.where)), ""),
        "seconds": round(seconds, 3),
    }


def run(seeds: int = 20, only: str = "") -> dict[str, Any]:
    """The whole table.

    Args:
        seeds: of right models of each family, in which every finding is a false alarm. only: a pattern of fault names.
    """
    here = families()
    rows = [row(n, f) for n, fault in FAULTS.items() for f in fault.families if f in here and re.search(only, n)]
    alarms: list[dict[str, Any]] = []
    clean = 0
    for family, seed, report in right(here, range(seeds)):
        clean += 1
        alarms += [{"family": family, "seed": seed, "finding": f.to_dict()} for f in _alarms(report)]
    caught, named = sum(r["caught"] for r in rows), sum(r["named"] for r in rows)
    return {
        "faults": len({r["fault"] for r in rows}),
        "families": list(here),
        "runs": len(rows),
        "caught": caught / max(1, len(rows)),
        "caught_and_named": named / max(1, len(rows)),
        "right_models": clean,
        "false_alarms": alarms,
        "rows": rows,
        "command": "python benchmarks/mutations.py",
        **provenance(),
    }


def _alarms(report: Report) -> list[Any]:
    return [*report.failures, *report.warnings]


def markdown(result: dict[str, Any]) -> str:
    """One line per fault: families, caught, named, by which check, seconds."""
    head = (
        f"{result['faults']} faults, {result['runs']} runs in {len(result['families'])} families:"
        f" {100 * result['caught']:.1f} % caught, {100 * result['caught_and_named']:.1f} % caught and named;"
        f" {len(result['false_alarms'])} false alarms on {result['right_models']} right models (20 seeds of each family).\n"
    )
    lines = [head, "| fault | families | caught | named | by | seconds |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(r["fault"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["fault"] == name]
        by = ", ".join(dict.fromkeys(r["by"] for r in rows))
        counts = [f"{sum(r[k] for r in rows)}/{len(rows)}" for k in ("caught", "named")]
        where = ", ".join(r["family"] for r in rows)
        lines.append(f"| {name} | {where} | {counts[0]} | {counts[1]} | {by} | {max(r['seconds'] for r in rows):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/checks.json")
    parser.add_argument("--quick", action="store_true", help="three seeds, nothing written")
    parser.add_argument("--only", default="", help="a pattern of fault names; nothing written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = run(3 if given.quick else 20, given.only)
    for r in result["rows"]:
        if not r["named"]:
            print("NOT NAMED" if r["caught"] else "MISSED", r["fault"], "|", r["family"], "|", r["by"])
    for alarm in result["false_alarms"]:
        print("FALSE ALARM", alarm)
    print({k: v for k, v in result.items() if k not in ("rows", "false_alarms")})
    if not (given.quick or given.only):
        write_json(given.out, result)
        page = ROOT / "docs/checks.md"
        if page.exists():
            text = page.read_text(encoding="utf-8")
            head, _, rest = text.partition("<!-- mutations -->\n")
            page.write_text(
                head + "<!-- mutations -->\n" + markdown(result) + "\n" + rest[rest.find("<!-- end -->") :],
                encoding="utf-8",
            )
        print(json.dumps({"written": str(given.out)}))


if __name__ == "__main__":
    main()
