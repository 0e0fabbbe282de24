"""``precision = "auto"``: fp32 or bf16, whichever trains faster here; decided once, kept in the folder, the same for all who take part.

Precision is a part of a run's key and of what a sweep is a sweep of. So it is decided before there is a run, of a file's tables, and nobody
who goes on with a folder or takes part in a shared sweep measures again. Without "auto" it is fp32, on every machine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mue.lab.data import Data
from mue.lab.runners.calibrate import MEASURED_SECONDS, MEASURED_STEPS, endless
from mue.lab.train.provenance import provenance
from mue.lab.train.run import PRECISIONS, Run
from mue.lab.train.session import TrainingSession
from mue.lab.train.spec import AUTO
from mue.lab.train.task import task_of
from mue.util.files import FileLock, write_json

PRECISION_FILE = "precision.json"
CLEARLY = 0.95  # of fp32's time: bf16 costs digits, and what is within the noise of a measurement is no gain
_ROUNDS = 2 * MEASURED_STEPS + 1  # medians of at least so many pairs

Tables = dict[str, Any]


def settle_precision(
    tables: Tables,
    folder: Path,
    example: Callable[[Tables], tuple[Run, Data]],
    *,
    decided: Callable[[Callable[[str], Tables]], str | None] | None = None,
) -> tuple[Tables, str | None]:
    """Put a precision in the place of ``[run] precision = "auto"``.

    Args:
        tables: of the file. folder: where the answer is kept, in ``precision.json``; what stands there is not measured again.
        example: a run of the file's tables (with the precision they say) and its data: what is measured. decided: given what makes the
            tables of a precision, says which others who take part have decided on; None: nobody has.

    Returns:
        The tables, and a sentence that says what was decided and why; the same tables and None where they do not say "auto".

    Raises:
        ValueError: the folder's answer is damaged.
    """
    if (tables.get("run") or {}).get("precision") != AUTO:
        return tables, None

    def of(precision: str) -> Tables:
        return {**tables, "run": {**tables["run"], "precision": precision}}

    run, corpus = example(of("fp32"))
    task_of(run.settings).batches_of(run, corpus)  # what cannot be a run is said before its folder is made
    path = folder / PRECISION_FILE
    with FileLock(folder / f"{PRECISION_FILE}.lock"):  # two that measure at once would each find half the machine
        if path.exists():
            return of(found := _read(path)), f"precision: {found}, as decided when {folder} was begun"
        if decided is not None and (theirs := decided(of)) is not None:
            write_json(path, {"precision": theirs, "from": "the sweep in the shared storage"})
            return of(theirs), f"precision: {theirs}, as the sweep in the storage has it"
        seconds = _measure(run, corpus)
        faster = "bf16" if seconds["bf16"] < CLEARLY * seconds["fp32"] else "fp32"
        write_json(path, {"precision": faster, "seconds a step": seconds, **provenance()})
    told = ", ".join(f"{name} {1e3 * took:.3g} ms a step" for name, took in seconds.items())
    return of(faster), f"precision: {faster} ({told}), kept in {path}"


def _read(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["precision"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to measure again") from error
    if found not in PRECISIONS:
        raise ValueError(
            f"{path} says {found!r}, and a precision is {' or '.join(PRECISIONS)}: remove it to measure again"
        )
    return str(found)


def _measure(run: Run, corpus: Data) -> Mapping[str, float]:
    """Median seconds of a training step in each precision, taken in turn, so that what else the machine does meets both."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as opened:
        sessions = {}
        for precision in PRECISIONS:
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="mue-precision-"))
            settings = replace(run.settings, precision=precision)
            one = endless(Run(run.plan, settings, run.data), run.settings.seed)
            sessions[precision] = opened.enter_context(TrainingSession(one, Path(folder), corpus, device))
        for session in sessions.values():
            session.train_step()  # the caches fill, and what is chosen by measurement is chosen
        took: dict[str, list[float]] = {precision: [] for precision in sessions}
        until = time.monotonic() + len(sessions) * MEASURED_SECONDS
        while time.monotonic() < until or len(took["fp32"]) < _ROUNDS:
            for precision, session in sessions.items():
                started = time.perf_counter()
                session.train_step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                took[precision].append(time.perf_counter() - started)
    return {precision: statistics.median(times) for precision, times in took.items()}
