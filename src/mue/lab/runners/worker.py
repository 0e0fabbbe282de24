"""A process that trains the runs it is told to: JSON lines in on stdin, JSON lines out on stdout.

In: a job ``{"id", "run", "store", "checkpoint_seconds", "threads", "stack", "compiled", "keep_weights"}``, or ``{"stop": id}`` to give one up.
Out: ``{"id", "step", "loss"}``, then ``{"id", "result"}`` or ``{"id", "error", "kind", "type"}``. A job with ``"stack": 1`` is trained alone, others
together with those of their kind.

It ends when stdin closes, so that it cannot outlive the process that started it, however that one died; and on Linux the kernel ends it
then, which reaches one that is stopped (SIGSTOP) too.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; the "parent" is the thread that started us, which lives as long as its process


def main() -> None:
    """Serve jobs until stdin closes."""
    with suppress(OSError, AttributeError):
        # Without it a stopped worker outlived its parent (docs/LOG.md, "Many workers on one storage").
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not end up between our lines
    queue: SimpleQueue[dict[str, Any]] = SimpleQueue()
    stopped: set[str] = set()
    threading.Thread(target=_listen, args=(queue, stopped), daemon=True).start()
    from mue.lab.runners.jobs import Jobs  # torch takes seconds: by now stdin is being read, and its end noticed

    jobs = Jobs(out, stopped)
    while True:
        try:
            job = queue.get(block=not jobs.stacks)  # a run that comes joins its stack before the next step
        except Empty:
            jobs.advance()
        else:
            jobs.begin(job)


def _listen(queue: SimpleQueue[dict[str, Any]], stopped: set[str]) -> None:
    """Read stdin in a thread of its own: the other one trains, and would hear a stop only after its run."""
    for line in sys.stdin:
        message = json.loads(line)
        if "stop" in message:
            stopped.add(message["stop"])
        else:
            stopped.discard(message["id"])  # a stop that came too late was for an earlier turn
            queue.put(message)
    os._exit(0)  # the parent is gone: leave now, the checkpoint on disk is whole


if __name__ == "__main__":
    main()
