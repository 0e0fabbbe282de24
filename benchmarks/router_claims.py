"""What papers say of routers, put to the test in the lab: one command trains, measures and writes the table of ``docs/routers.md``.

    python benchmarks/router_claims.py --dry-run                  # what would be trained, and its FLOPs
    python benchmarks/router_claims.py --minutes 60               # train; kill it, start it again: nothing is lost or redone
    python benchmarks/router_claims.py --only elastic             # one claim, or one group (a file of benchmarks/router_claims)
    python benchmarks/router_claims.py --table                    # the table from the rows, without training

Claims are data (``claims.spec``): predictions, power, runs, controls. A run goes through the lab's runners into ``--out``, and a row of what was
measured of it, a line of JSON, into ``--rows`` as it ends. A run that several claims need is trained once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from claims.rows import ClaimFolder, ClaimSchedule, Wanted
from claims.spec import FOLDER, Claims, read_claims
from claims.table import write_table
from claims.verdict import judge
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.report.progress import RunProgress
from mue.lab.runners.runner import FailedError
from mue.lab.study.run import run_study

DOCS = Path(__file__).resolve().parent.parent / "docs"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", action="append", default=[], metavar="CLAIM", help="a claim or a group; may be repeated"
    )
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--workers", type=int, help="training processes (default: one for each core)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and what it costs")
    parser.add_argument(
        "--table", action="store_true", help="write the table from the rows there are, and train nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/router_claims"), help="folder of the runs")
    parser.add_argument("--rows", type=Path, default=DOCS / "results" / "router_claims.jsonl", help="file of the rows")
    parser.add_argument("--page", type=Path, default=DOCS / "routers.md", help="page whose table is written")
    parser.add_argument("--claims", type=Path, default=FOLDER, help="folder of the claims' files")
    parser.add_argument("--base", type=Path, help="file with data, base, tuned and run (default: the house's study)")
    given = parser.parse_args(argv)
    if given.workers is not None and given.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {given.workers}")
    if given.minutes is not None and not given.minutes >= 0:
        raise ValueError(f"--minutes must be at least 0, got {given.minutes}")
    return given


def say(console: Console, missing: Sequence[Wanted], done: int) -> None:
    """What is to be trained: each claim's runs (a shared one at the first that needs it), tokens per parameter, FLOPs."""
    for name in dict.fromkeys(w.claim.name for w in missing):
        mine = [w for w in missing if w.claim.name == name]
        claim, least = mine[0].claim, min(w.arm.tokens_per_parameter for w in mine)
        arms = ", ".join(dict.fromkeys(w.arm.name for w in mine))
        console.print(
            f"{name} ({claim.router}): {len(mine)} runs of {arms}; at least {least:.0f} tokens for each active parameter,"
            f" {sum(w.arm.flops for w in mine) / 1e15:.3g} PFLOPs; expected {claim.effect:g} ± {claim.half_width:g}",
            highlight=False,
            soft_wrap=True,
        )
    total = sum(w.arm.flops for w in missing) / 1e15
    console.print(f"{len(missing)} runs to train ({done} done), {total:.3g} PFLOPs", highlight=False)


def train(given: argparse.Namespace, claims: Claims) -> None:
    """Train and measure what is missing; with --dry-run say what that is."""
    console = Console()
    chosen = claims.only(tuple(given.only))
    corpus = open_corpus(claims.source)
    schedule = ClaimSchedule(claims, chosen, describe_data(claims.source, corpus))
    folder = ClaimFolder(given.out, given.rows, claims, corpus)
    rows = folder.rows()
    missing = schedule.missing(rows)
    say(console, missing, len(rows))
    if given.dry_run or not missing:
        return
    torch.set_num_threads(1)  # measurements stand beside the workers
    label = {w.run.key: w.name for w in missing}
    with RunProgress(console, "claims", [w.run for w in missing], lambda run: label[run.key]) as progress:
        # weights of all runs: of so small models they are a fraction of their metrics
        left = run_study(
            schedule, folder, workers=given.workers, minutes=given.minutes, listener=progress, keep_weights=True
        )
    if left:
        console.print(f"{left} runs are left: start it again with --out {given.out}", highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 where something the user gave is wrong, with one line that says what."""
    try:
        given = arguments(argv)
        claims = read_claims(given.claims, given.base, given.out / "data")
        if given.table:
            rows = ClaimFolder(given.out, given.rows, claims).by_identity()
            write_table(given.page, [judge(claims, claim, rows) for claim in claims.all])
        else:
            train(given, claims)
    except (ValueError, OSError, FailedError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
