"""How often ``mue inspect --propose`` is right, on ten models of others' code whose parameters were written down before.

    MUE_OTHER_SOURCES=~/clones python benchmarks/propose.py --json docs/results/propose.json

Right is a tensor whose role, parts, the order of their rows, axes and (of a vector) start are as expected. A tensor without a proposal is not right, and one
that is wrong without a mark is what must not happen. A model whose code is not here stands in the result as such.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mue.lab.train.provenance import provenance
from mue.layouts.layout import BLOCKS, Layout
from mue.layouts.propose import LayoutProposal, propose
from mue.rules.roles import ROLES
from mue.util.files import write_json
from other_models.models import MODELS, NotHereError, built

EXPECTED = Path(__file__).parent / "other_models" / "expected.toml"


def expected(model: str) -> Mapping[str, str]:
    """Name of a tensor, with # for any number, → what it is."""
    return tomllib.loads(EXPECTED.read_text())[model]  # type: ignore[no-any-return]


def expected_of(name: str, table: Mapping[str, str]) -> str:
    """The one entry that a tensor's name fits."""
    hits = [text for key, text in table.items() if re.fullmatch(re.escape(key).replace(r"\#", r"\d+"), name)]
    if len(hits) != 1:
        raise ValueError(f"{name} fits {len(hits)} entries of {EXPECTED.name}")
    return hits[0]


def said(row: Layout | None, with_start: bool) -> str:
    """A row as an entry of the expectations."""
    if row is None:
        return "nothing"
    start = ROLES[row.planned].start if row.start is None else row.start
    end = f" | {start:g}" if isinstance(start, float) else f" | {start}"
    what = "+".join(row.parts) or row.role
    what += "" if row.order == BLOCKS else f" in {row.order}"
    return " | ".join((what, " ".join(row.axes))) + (end if with_start else "")


def measured(proposal: LayoutProposal, table: Mapping[str, str]) -> dict[str, Any]:
    """Counts of one model's tensors, and what was not as expected."""
    right = decided = silent = 0
    misses = []
    for row in proposal.rows:
        for name in row.names:
            want = " | ".join(part.strip() for part in expected_of(name, table).split("|"))
            have = said(row.layout, want.count("|") == 2)
            decided += not row.look
            if have == want:
                right += 1
                continue
            silent += not row.look
            misses.append({"tensor": name, "expected": want, "proposed": have, "mark": row.look})
    marked = [row.look for row in proposal.rows if row.look]
    return {
        "tensors": proposal.tensors,
        "rows": len(proposal.rows),
        "right": right,
        "decided": decided,
        "wrong_without_mark": silent,
        "marks": marked,
        "misses": misses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    models: dict[str, Any] = {}
    for name in MODELS:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                model = built(name)
            models[name] = measured(propose(model), expected(name))
        except NotHereError as error:
            models[name] = {"not_here": str(error)}
        except ValueError as error:
            models[name] = {"refused": str(error)}
        print(name, {k: v for k, v in models[name].items() if k not in ("misses", "marks")}, flush=True)
        for miss in models[name].get("misses", ()):
            print("   ", miss)
    known = [m for m in models.values() if "tensors" in m]
    total = {k: sum(m[k] for m in known) for k in ("tensors", "right", "decided", "wrong_without_mark")}
    print(total)
    if args.json:
        write_json(
            args.json, {"command": " ".join(["python", *sys.argv]), **provenance(), "total": total, "models": models}
        )


if __name__ == "__main__":
    main()
