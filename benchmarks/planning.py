"""Time a plan with its table for a model of 128 layers and 256 experts: ``python benchmarks/planning.py``.

Prints JSON: milliseconds for importing mue, for the first plan in a fresh process, and the median of later ones.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time

start = time.perf_counter()
import mue  # noqa: E402

IMPORT = time.perf_counter() - start


def once() -> float:
    """Seconds for one plan and its printed table."""
    start = time.perf_counter()
    base = mue.Dense(width=128, ffn=128, layers=8)
    target = mue.MoE.parse("256e8a1s", width=4096, expert=2048, layers=128)
    plan = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01))
    str(plan)
    return time.perf_counter() - start


if __name__ == "__main__":
    first, later = once(), [once() for _ in range(20)]
    print(
        json.dumps(
            {
                "model": "256e8a1s, 128 layers",
                "import_ms": round(1e3 * IMPORT, 2),
                "first_plan_ms": round(1e3 * first, 2),
                "plan_ms": round(1e3 * statistics.median(later), 2),
                "torch_imported": "torch" in sys.modules,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
            indent=1,
        )
    )
