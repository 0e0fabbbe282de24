"""The faults of tests/support/wiring/diffusion.py, each caught and named or not, and the right models' alarms.

python benchmarks/diffusion_faults.py [--out docs/results/diffusion_checks.json]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mue.lab.train.provenance import provenance  # noqa: E402
from mue.util.files import write_json  # noqa: E402
from support.wiring.diffusion import FAULTS, SHAPES, case  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/diffusion_checks.json")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    rows = []
    for name, fault in FAULTS.items():
        made, start = case(fault.shape), time.perf_counter()
        fault.apply(made)
        failures = made.check(only=fault.check.split(", ")).failures
        found = [f for f in failures if re.search(fault.where, f.where)]
        rows.append(
            {
                "fault": name,
                "shape": fault.shape,
                "caught": bool(failures),
                "named": bool(found),
                "by": found[0].check if found else "",
                "where": found[0].where if found else "",
                "seconds": round(time.perf_counter() - start, 3),
            }
        )
        print(rows[-1])
    reports = {shape: case(shape).check() for shape in SHAPES}
    alarms = {shape: [f.to_dict() for f in (*r.failures, *r.warnings)] for shape, r in reports.items()}
    plans = {shape: case(shape).plan.hash for shape in SHAPES}
    command = "python benchmarks/diffusion_faults.py"
    write_json(out, {"faults": rows, "alarms": alarms, "plans": plans, "command": command, **provenance()})


if __name__ == "__main__":
    main()
