"""The mutation table: every possible fault of tests/support/wiring in every family, and every right model in each of its forms.

    python benchmarks/mutations.py [--families qwen3_moe,gpt2] [--workers 2] [--out docs/results/checks.json]
    python benchmarks/mutations.py --missing --families qwen3_moe,gpt2   # only faults that the table has no row of
    python benchmarks/mutations.py --right --families qwen3_moe,gpt2     # only right models; the rows of faults are kept
    python benchmarks/mutations.py --seeds 20 --families qwen3_moe,gpt2  # right optimizers over so many seeds
    python benchmarks/mutations.py --listing   # which faults are impossible where, and why; committed before the run

Families of transformers need the hf extra. With --families, the rows of those alone are made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LONG = (
    "named",
    "not_named",
    "right",
    "families",
    "unmeasured_why",
    "notices",
    "right_optimizers",
)  # not for a terminal
sys.path.insert(0, str(ROOT / "tests"))

from mue.checks.report import FAIL, PASS, UNMEASURED, WARN, Report  # noqa: E402
from mue.lab.train.provenance import provenance  # noqa: E402
from mue.util.files import write_json  # noqa: E402
from support.wiring.case import OURS, forms, right, runs_in_bf16  # noqa: E402
from support.wiring.families import LISTING, accepted  # noqa: E402
from support.wiring.fault import broken, load, names_it, possible  # noqa: E402
from support.wiring.muons import right_optimizers  # noqa: E402


def row(name: str, family: str) -> dict[str, Any]:
    """One fault in one family: was it caught, was the culprit named, by which check, in how many seconds.

    Only those checks run that are meant to name it, so that none other can take the credit.
    """
    made, culprit = broken(name, family)
    start = time.perf_counter()
    report = made.check(only=load()[name].checks)
    seconds = time.perf_counter() - start
    found = names_it(report, culprit, load()[name].warns)
    return {
        "fault": name,
        "family": family,
        "form": made.form,
        "caught": bool(report.warnings if load()[name].warns else report.failures),
        "named": bool(found),
        "by": found[0].check if found else next((f.check for f in report.failures), ""),
        "where": found[0].where if found else "",
        "seconds": round(seconds, 3),
    }


def judged(report: Report) -> dict[str, Any]:
    """What a right model's report says: alarms, notices of the family's own factors, and what was not measured.

    A warning on a right model is a notice: each says what the family's own code does beside the plan.
    """
    of = {status: [f for f in report.findings if f.status == status] for status in (PASS, FAIL, WARN, UNMEASURED)}
    return {
        "alarms": [f.to_dict() for f in of[FAIL]],
        "notices": [f"{f.check}: {f.measured}" for f in of[WARN]],
        "measured": sum(f.count for f in (*of[PASS], *of[WARN])),
        "unmeasured": [
            {"check": f.check, "where": f.where, "why": f.measured, "count": f.count} for f in of[UNMEASURED]
        ],
    }


def family(name: str) -> dict[str, Any]:
    """All rows of a family, and its right models."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    rows = [row(fault, name) for fault, _ in possible((name,))]
    models = right_models(name)["right"]
    return {"rows": rows, "right": models, "seconds": round(time.process_time() - start, 1)}


def right_models(name: str) -> dict[str, Any]:
    """What the checks as they are now say of a family's right models."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    models = [
        {"family": name, "form": c.form, "precision": "autocast bf16" if c.autocast else "float32", **judged(c.check())}
        for c in right(name)
    ]
    return {"rows": [], "right": models, "seconds": round(time.process_time() - start, 1)}


def missing(name: str, done: frozenset[str]) -> dict[str, Any]:
    """The rows of a family that an earlier run has not: of faults that came later."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    rows = [row(fault, name) for fault, _ in possible((name,)) if fault not in done]
    return {"rows": rows, "right": [], "seconds": round(time.process_time() - start, 1)}


def seeded(name: str, seeds: int) -> list[dict[str, Any]]:
    """Right optimizers of a family, by seed: what is alarmed of them, or could not be measured."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return [
        {
            "family": name,
            "seed": seed,
            "optimizer": optimizer,
            "alarms": [f.to_dict() for f in report.failures],
            "unmeasured": [f"{f.check}: {f.where}: {f.measured}" for f in report.unmeasured],
        }
        for seed in range(seeds)
        for optimizer, report in right_optimizers(name, seed)
    ]


def facts(name: str) -> dict[str, Any]:
    """What decides a family's part of the listing: its forms, whether its code runs in bf16, and why faults are impossible."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    why = {fault: reason for fault, one in load().items() if (reason := one.impossible(name))}
    return {"forms": forms(name), "autocast": runs_in_bf16(name), "impossible": why}


def write_listing(families: list[str], workers: int) -> None:
    """Which faults are impossible in which families, with the reasons, beside the families that are refused."""
    with ProcessPoolExecutor(workers) as pool:
        found = dict(zip(families, pool.map(facts, families), strict=True))
    old = json.loads(LISTING.read_text(encoding="utf-8"))
    kept = {
        fault: {why: set(many) - set(found) for why, many in old["impossible"].get(fault, {}).items()}
        for fault in load()
    }
    for name, fact in found.items():
        for fault, reason in fact["impossible"].items():
            kept[fault].setdefault(reason, set()).add(name)
    old["forms"].update({name: list(fact["forms"]) for name, fact in found.items()})
    dry = {name for name, fact in found.items() if not fact["autocast"]}
    old["no autocast"] = sorted(dry | (set(old["no autocast"]) - set(found)))
    old["impossible"] = {
        fault: {why: sorted(many) for why, many in reasons.items() if many} for fault, reasons in kept.items()
    }
    write_json(LISTING, old)


def summary(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The whole table of all families."""
    rows = [r for part in parts.values() for r in part["rows"]]
    models = [m for part in parts.values() for m in part["right"]]
    caught, named = sum(r["caught"] for r in rows), sum(r["named"] for r in rows)
    unmeasured = Counter({(u["check"], u["why"]): 0 for m in models for u in m["unmeasured"]})
    for m in models:
        for u in m["unmeasured"]:
            unmeasured[u["check"], u["why"]] += u["count"]
    planned = sum(m["measured"] for m in models) + sum(unmeasured.values())
    return {
        "faults": len({r["fault"] for r in rows}),
        "families": list(parts),
        "runs": len(rows),
        "caught": caught / max(1, len(rows)),
        "caught_and_named": named / max(1, len(rows)),
        "right_models": len(models),
        "false_alarms": sum(len(m["alarms"]) for m in models),
        "planned_quantities": planned,
        "unmeasured": sum(unmeasured.values()) / max(1, planned),
        "unmeasured_why": {f"{check}: {why}": n for (check, why), n in unmeasured.most_common()},
        "notices": dict(Counter(n for m in models for n in m["notices"]).most_common()),
        "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
        "right": models,
        "named": _by_check([r for r in rows if r["named"]]),
        "not_named": [r for r in rows if not r["named"]],
        "command": "python benchmarks/mutations.py",
    }


def of_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Right optimizers over seeds, as the table's file has them."""
    return {
        "seeds": len({r["seed"] for r in rows}),
        "families": list(dict.fromkeys(r["family"] for r in rows)),
        "optimizers": dict(Counter(r["optimizer"] for r in rows)),
        "runs": len(rows),
        "false_alarms": sum(len(r["alarms"]) for r in rows),
        "unmeasured": sum(len(r["unmeasured"]) for r in rows),
        "not_right": [r for r in rows if r["alarms"] or r["unmeasured"]],
        "command": "python benchmarks/mutations.py --seeds 20",
        **provenance(),
    }


def _by_check(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Fault → the check that names it → the families: six thousand rows in a file that can be read."""
    found: dict[str, dict[str, list[str]]] = {}
    for r in rows:
        found.setdefault(r["fault"], {}).setdefault(r["by"], []).append(r["family"])
    return found


def markdown(result: dict[str, Any]) -> str:
    """One line per fault: in how many families it was caught and named, by which check, and where not."""
    head = (
        f"{result['faults']} faults, {result['runs']} pairs of fault and family in {len(result['families'])} families:"
        f" {100 * result['caught']:.1f} % caught, {100 * result['caught_and_named']:.1f} % caught and named;"
        f" {result['false_alarms']} false alarms on {result['right_models']} right models; of {result['planned_quantities']:,}"
        f" planned quantities in them {100 * result['unmeasured']:.2f} % could not be measured.\n"
    )
    if "right_optimizers" in result:
        seeds = result["right_optimizers"]
        head += (
            f"\nRight optimizers, {len(seeds['optimizers'])} ways to build one: {seeds['false_alarms']} false alarms in {seeds['runs']} runs of"
            f" {len(seeds['families'])} families with {seeds['seeds']} seeds, {seeds['unmeasured']} quantities not measured.\n"
        )
    lines = [head, "| fault | families | caught | named | by | not named in |", "|---|---|---|---|---|---|"]
    for name in load():
        checks = result["named"].get(name, {})
        left = [r for r in result["not_named"] if r["fault"] == name]
        named = sum(map(len, checks.values()))
        caught = named + sum(r["caught"] for r in left)
        missed = ", ".join(r["family"] for r in left)
        lines.append(f"| {name} | {named + len(left)} | {caught} | {named} | {', '.join(checks)} | {missed} |")
    return "\n".join(lines)


def write_page(result: dict[str, Any]) -> None:
    page = ROOT / "docs/checks.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- mutations -->\n")
    text = head + "<!-- mutations -->\n" + markdown(result) + "\n" + rest[rest.find("<!-- end -->") :]
    page.write_text(text, encoding="utf-8")


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """The parts of an earlier run, by family."""
    parts: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return parts
    old = json.loads(path.read_text(encoding="utf-8"))
    for name in old["families"]:
        mine = [m for m in old["right"] if m["family"] == name]
        parts[name] = {"rows": [r for r in old["not_named"] if r["family"] == name], "right": mine, "seconds": 0.0}
    for fault, checks in old["named"].items():
        for check, many in checks.items():
            for name in many:
                row = {"fault": fault, "family": name, "caught": True, "named": True, "by": check}
                parts[name]["rows"].append(row)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/checks.json")
    parser.add_argument("--families", default="", help="these alone, with commas between them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--listing", action="store_true", help="write which faults are impossible where, and end")
    parser.add_argument(
        "--missing", action="store_true", help="only pairs of fault and family that the table has no row of"
    )
    parser.add_argument("--right", action="store_true", help="only right models; the rows of faults are kept")
    parser.add_argument("--seeds", type=int, default=0, help="right optimizers over so many seeds, and no faults")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    every = (*OURS, *accepted())
    # a name of ours has a comma of its own
    wanted = [name for name in every if not given.families or f",{name}," in f",{given.families},"]
    if given.listing:
        write_listing(wanted, given.workers)
        return
    old = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    with ProcessPoolExecutor(given.workers) as pool:
        if given.seeds:
            made = [r for rows in pool.map(seeded, wanted, [given.seeds] * len(wanted)) for r in rows]
            written(given.out, {**old, "right_optimizers": of_seeds(made)})
        else:
            for result in tables(pool, given, wanted, every):
                written(given.out, result | {k: v for k, v in old.items() if k == "right_optimizers"})


def written(out: Path, result: dict[str, Any]) -> None:
    """The table as a file, and on its page where that is the page's file."""
    write_json(out, result)
    print({k: v for k, v in result.items() if k not in LONG}, flush=True)
    if out == ROOT / "docs/results/checks.json":
        write_page(result)


def tables(
    pool: ProcessPoolExecutor, given: argparse.Namespace, wanted: list[str], every: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The table after each family that is made again, in whole or in part: a run that is cut off keeps what it has."""
    parts, now = kept(given.out), provenance()  # once: what is written below makes the checkout a changed one
    if given.missing:
        done = [frozenset(r["fault"] for r in parts[name]["rows"]) if name in parts else frozenset() for name in wanted]
        found = pool.map(missing, wanted, done)
    else:
        found = pool.map(right_models if given.right else family, wanted)
    for name, part in zip(wanted, found, strict=True):
        bad = [r["fault"] for r in part["rows"] if not r["named"]]
        print(f"{name}: {len(part['rows'])} faults, not named: {', '.join(bad) or 'none'};", end=" ")
        print(f"{len(part['right'])} right models in {part['seconds']} s", flush=True)
        _print(part)
        part["right"] = [{**m, "git": now["git"]} for m in part["right"]]  # families may be judged by different commits
        if given.right and name in parts:
            part = {**part, "rows": parts[name]["rows"]}
        if given.missing and name in parts:
            part = {**part, "rows": parts[name]["rows"] + part["rows"], "right": parts[name]["right"]}
        parts[name] = part
        yield summary({name: parts[name] for name in every if name in parts}) | now


def _print(part: dict[str, Any]) -> None:
    """What a family's right models are alarmed of."""
    for m in part["right"]:
        for f in m["alarms"]:
            text = f"  FALSE ALARM {m['form']}, {m['precision']}: {f['check']}: {f['where']}: {f['measured']}"
            print(text[:300])
        for u in m["unmeasured"]:
            print(f"  unmeasured {m['form']}, {m['precision']}: {u['check']}: {u['where']}: {u['why']}"[:300])


if __name__ == "__main__":
    main()
