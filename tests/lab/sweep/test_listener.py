"""Several listeners of a sweep as one: each is told, opened and closed; those of runs alone hear nothing of trials."""

from __future__ import annotations

from typing import Any, Self

from mue.lab.runners.listener import RunListener
from mue.lab.sweep.listener import Broadcast, SweepListener


class Noting(RunListener):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def moved(self, run: Any, step: int, loss: float) -> None:
        self.heard.append((run, step, loss))

    def ended(self, run: Any, result: dict[str, Any], *, fresh: bool) -> None:
        self.heard.append((run, result, fresh))

    def say(self, text: str) -> None:
        self.heard.append(text)

    def __enter__(self) -> Self:
        self.heard.append("opened")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.heard.append(kind)


class Looking(Noting, SweepListener):
    def look(self, trials: Any) -> None:
        self.heard.append(list(trials))


def test_each_of_them_hears_it() -> None:
    runs, sweep, run = Noting(), Looking(), "a run"
    try:
        with Broadcast(runs, sweep) as listener:
            listener.say("here")
            listener.look([])
            listener.moved(run, 3, 2.5)  # type: ignore[arg-type]
            listener.ended(run, {"val_loss": 2.0}, fresh=True)  # type: ignore[arg-type]
            raise KeyError
    except KeyError:
        pass
    heard = ["opened", "here", (run, 3, 2.5), (run, {"val_loss": 2.0}, True), KeyError]
    assert runs.heard == heard
    assert sweep.heard == [*heard[:2], [], *heard[2:]]
