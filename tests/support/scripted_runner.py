"""A runner that does as it is told, in place of one that trains, and a listener that notes what it hears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mue.lab.runners.runner import Done, Message, Progress
from mue.lab.sweep.listener import SweepListener
from mue.lab.train.run import Run


class Scripted:
    """A runner that answers each ``wait`` with what ``script`` returns for the runs in flight."""

    slots, why = 2, "a script"

    def __init__(self, script: Callable[[Scripted], list[Message]]) -> None:
        self.script = script
        self.flying: dict[str, Run] = {}
        self.submitted: list[str] = []
        self.stopped: list[str] = []
        self.turns = 0

    def submit(self, run: Run, *, keep_weights: bool = False) -> None:
        assert run.key not in self.flying, "one key is in flight only once"
        self.flying[run.key] = run
        self.submitted.append(run.key)

    def wait(self, timeout: float | None = None) -> list[Message]:
        self.turns += 1
        messages = self.script(self) if self.flying else []
        for message in messages:
            if not isinstance(message, Progress):
                del self.flying[message.run.key]
        return messages

    def stop(self, key: str) -> None:
        self.stopped.append(key)

    def close(self) -> None:
        self.flying.clear()


def done(run: Run, status: str = "finished") -> Done:
    """A run's end, with a loss where it has one."""
    loss = 2.5 if status == "finished" else None
    return Done(run, {"key": run.key, "status": status, "val_loss": loss, "loss": loss, "step": 1, "seconds": 1.0})


class Heard(SweepListener):
    """Notes what was said, and each run that was counted with how it ended."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.counted: list[tuple[str, str]] = []

    def say(self, text: str) -> None:
        self.words.append(text)

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        self.counted.append((run.key, result["status"]))
