"""``open_runner``: the one place that knows every kind of runner."""

from __future__ import annotations

from mue.lab.runners.runner import KINDS, Runner
from mue.lab.train.run import Run, Store


def open_runner(
    kind: str,
    store: Store,
    *,
    workers: int | None = None,
    checkpoint_seconds: float = 10.0,
    example: Run | None = None,
    runs: int = 1,
) -> Runner:
    """Open a runner of a kind. Its processes start when they are first needed, and live until it is closed.

    Args:
        kind: "processes": one run in each of ``workers`` processes (default: one for each core, or for each GPU). "stacked": ``workers``
            runs (default: by measurement) in one program for each device. "auto": what a short calibration finds fastest on this
            machine, for runs like ``example``; measured once and remembered (``mue.lab.runners.calibrate``).
        store: where the runs' folders are. checkpoint_seconds: time between a run's checkpoints.
        runs: how many like ``example`` are to come: what decides whether compiling pays.

    Raises:
        ValueError: an unknown kind; "auto" without an example.
    """
    # Here, because calibrating needs torch: a sweep that only reads what is stored names its runner and starts without.
    from mue.lab.runners.calibrate import choose_layout
    from mue.lab.runners.pool import Pool

    if kind not in KINDS:
        raise ValueError(f"[sweep] runner must be one of {', '.join(KINDS)}, got {kind!r}")
    layout, why = choose_layout(kind, workers, example, runs)
    return Pool(layout, store, checkpoint_seconds, why)
