"""The work of a worker process (``mue.lab.runners.worker``): it takes jobs as they come, trains them alone or in stacks, and answers."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any, TextIO

import torch

from mue.lab.data import Data
from mue.lab.data.spec import open_data
from mue.lab.runners.stacked_runs import StackedRuns
from mue.lab.train.run import BusyError, Run, Store
from mue.lab.train.session import train
from mue.lab.train.stacked_session import stack_kind
from mue.util.registry import PLUGINS, UnknownNameError

Job = dict[str, Any]
# Whoever submitted the run had the name from a module that it had imported, and this process has not.
_OURS_ALONE = (
    "; that is all a worker process finds: name the module that registers it under the entry point group"
    f" {PLUGINS!r} of an installed package"
)


class Jobs:
    """What is open in this process: corpora by their source, and stacks under way by their kind.

    Args:
        out: where messages go, a line of JSON each. stopped: keys of the runs to give up; another thread adds to it.
    """

    def __init__(self, out: TextIO, stopped: Container[str]) -> None:
        self.out, self.stopped = out, stopped
        self.corpora: dict[str, Data] = {}
        self.stacks: dict[str, StackedRuns] = {}

    def begin(self, job: Job) -> None:
        """Train a job to its end, or let it join the stack of its kind."""
        try:
            torch.set_num_threads(job["threads"])
            run = Run.from_dict(job["run"])
            do = self._train if job["stack"] == 1 else self._join
            result = do(job, run, Store(Path(job["store"])), self._corpus(run))
            if result is not None:
                self._send(job["id"], result=result)
        except Exception as error:  # reported to the parent, which decides; the worker itself stays usable
            self._send_error(job["id"], error)

    def advance(self) -> None:
        """One step of every stack."""
        for kind, stack in list(self.stacks.items()):
            try:
                for session, result in stack.advance(self.stopped):
                    self._send(session.key, step=session.step, loss=session.loss)
                    if result is not None:
                        self._send(session.key, result=result)
            except Exception as error:  # of one program: nobody can say whose run it was
                for key in stack.sessions:
                    self._send_error(key, error)
                stack.close()
            if not stack.sessions:
                del self.stacks[kind]

    def _corpus(self, run: Run) -> Data:
        """The run's corpus, opened once in this process; ``ValueError`` where it is not that which the run was planned on."""
        source = json.dumps(run.data["source"], sort_keys=True)
        if source not in self.corpora:
            self.corpora[source] = open_data(run.data["source"])
        corpus = self.corpora[source]
        if corpus.hash != run.data["hash"]:
            raise ValueError(
                f"the {corpus.kind} changed: the run was planned on {run.data['hash'][:12]}, now the hash is {corpus.hash[:12]}"
            )
        return corpus

    def _train(self, job: Job, run: Run, store: Store, corpus: Data) -> dict[str, Any]:
        """Train a run alone, to its end."""
        return train(
            run,
            store,
            corpus,
            progress=lambda step, loss: self._send(job["id"], step=step, loss=loss),
            checkpoint_seconds=job["checkpoint_seconds"],
            stop=lambda: job["id"] in self.stopped,
            compiled=job["compiled"],
            keep_weights=job["keep_weights"],
        )

    def _join(self, job: Job, run: Run, store: Store, corpus: Data) -> dict[str, Any] | None:
        """Put a run into the stack of its kind; its result where it has one already."""
        kind = stack_kind(run)
        stack = self.stacks.get(kind) or StackedRuns(
            compiled=job["compiled"], checkpoint_seconds=job["checkpoint_seconds"]
        )
        result = stack.join(run, store, corpus, keep_weights=job["keep_weights"])
        if stack.sessions:
            self.stacks[kind] = stack
        return result

    def _send_error(self, key: str, error: Exception) -> None:
        """Tell the parent that a run ended in an error, and whose it is: the user's, ours, or nobody's (busy)."""
        kind = "user" if isinstance(error, ValueError | OSError) else "internal"
        kind = "busy" if isinstance(error, BusyError) else kind
        text = f"{error}{_OURS_ALONE if isinstance(error, UnknownNameError) else ''}"
        self._send(key, error=text, kind=kind, type=type(error).__name__)

    def _send(self, key: str, **message: Any) -> None:
        self.out.write(json.dumps({"id": key, **message}) + "\n")
