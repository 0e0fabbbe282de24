"""A process that trains the runs it is told to: JSON lines in on stdin, JSON lines out on stdout.

In: a job ``{"id", "run", "store", "threads", "checkpoint_seconds"}``, or ``{"stop": id}`` to give one up. Out: ``{"id", "step", "loss"}``,
then ``{"id", "result"}`` or ``{"id", "error", "kind", "type"}``.

It ends when stdin closes, so that it cannot outlive the process that started it, however that one died.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO


def main() -> None:
    """Serve jobs until stdin closes."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not end up between our lines
    jobs: SimpleQueue[dict[str, Any]] = SimpleQueue()
    stopped: set[str] = set()
    threading.Thread(target=_listen, args=(jobs, stopped), daemon=True).start()
    from mue.lab.data import Corpus
    from mue.lab.experiment import open_corpus
    from mue.lab.run import BusyError

    corpora: dict[str, Corpus] = {}
    while True:
        job = jobs.get()
        try:
            spec = json.dumps(job["run"]["data"]["source"], sort_keys=True)
            if spec not in corpora:
                corpora[spec] = open_corpus(job["run"]["data"]["source"])
            _serve(job, corpora[spec], out, stopped)
        except Exception as error:  # reported to the parent, which decides; the worker itself stays usable
            kind = "user" if isinstance(error, ValueError | OSError) else "internal"
            kind = "busy" if isinstance(error, BusyError) else kind
            _say(out, id=job["id"], error=f"{error}", kind=kind, type=type(error).__name__)


def _listen(jobs: SimpleQueue[dict[str, Any]], stopped: set[str]) -> None:
    for line in sys.stdin:
        said = json.loads(line)
        if "stop" in said:
            stopped.add(said["stop"])
        else:
            stopped.discard(said["id"])  # a stop that came too late was for an earlier turn
            jobs.put(said)
    os._exit(0)  # the parent is gone: leave now, the checkpoint on disk is whole


def _serve(job: dict[str, Any], corpus: Any, out: TextIO, stopped: set[str]) -> None:
    import torch

    from mue.lab.run import Run, Store
    from mue.lab.train import train

    torch.set_num_threads(job["threads"])
    run = Run.from_dict(job["run"])
    if corpus.hash != run.data["hash"]:
        raise ValueError(
            f"the text changed: the run was planned on {run.data['hash'][:12]}, it is now {corpus.hash[:12]}"
        )
    result = train(
        run,
        Store(Path(job["store"])),
        corpus,
        progress=lambda step, loss: _say(out, id=job["id"], step=step, loss=loss),
        checkpoint_seconds=job["checkpoint_seconds"],
        stop=lambda: job["id"] in stopped,
    )
    _say(out, id=job["id"], result=result)


def _say(out: TextIO, **message: Any) -> None:
    out.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    main()
