"""The training loop: the plan's optimizer with its groups, a schedule, divergence as a result, exact resume.

:func:`train` is the loop and :meth:`TrainingSession.train_step` its step; all else here is a run's files and its bookkeeping. What is
trained, on what and by which loss, is the run's task (``mue.lab.train.task``).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mue.lab.data import Data
from mue.lab.train import checkpoint
from mue.lab.train.averages import Averages
from mue.lab.train.provenance import provenance
from mue.lab.train.router_record import RouterRecord
from mue.lab.train.run import CHECKPOINT_FILE, CONFIG_FILE, METRICS_FILE, RESULT_FILE, WEIGHTS_FILE, Run, Store
from mue.lab.train.schedule import lr_factor
from mue.lab.train.step import autocast, compile_blocks, moe_layers, objective, planned_optimizer, uncompiled
from mue.lab.train.task import Batch, task_of, write_of_task
from mue.model.apply import init_
from mue.moe import Routing
from mue.moe.layer import self_changing
from mue.util.files import write_json
from mue.util.memory import keep_freed_memory

# A run has diverged when its loss is not finite, or stays this far above its first for this many steps. A spike that
# heals is no divergence; a run that stays there is worse than guessing (its first loss is about that), and its learning
# rate a wall.
DIVERGED_ABOVE, DIVERGED_STEPS = 1.0, 20  # in the task's unit, whichever it is

TOLD_SECONDS = 10.0  # between two words on a run, at most: ten steps of a large model take minutes

OnStep = Callable[[int, float], None]
Answer = TypeVar("Answer")


def train(
    run: Run,
    store: Store,
    corpus: Data,
    *,
    progress: OnStep | None = None,
    checkpoint_seconds: float = 10.0,
    keep_weights: bool = False,
    stop: Callable[[], bool] = lambda: False,
    compiled: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train ``run`` to its end and return its result; a finished run is read, an interrupted one goes on exactly.

    Args:
        store: where the run's folder is. corpus: the text or the images that it is trained on; its hash is part of the run's key.
        progress: called with (step, loss) after every logged step, and where steps are slow every few seconds.
        checkpoint_seconds: time between checkpoints, which is what a kill can cost. keep_weights: leave
            ``model.safetensors`` in the run's folder.
        stop: asked after every step; true gives the run up: a checkpoint is left, and the result has status "stopped"
            and is not stored.
        compiled: compile the blocks first (seconds to a minute), which pays for long runs; the numbers differ in rounding.
        device: None: a GPU where there is one.

    Returns:
        What ``result.json`` holds: status, losses, counts, seconds, provenance.

    Raises:
        mue.lab.train.run.BusyError: another process trains it.
        ValueError: the folder holds a checkpoint of something else, or the data do not suit the run.
        OSError: the disk is full; the last good checkpoint stays.
    """
    with ExitStack() as opened:
        session = open_session(run, store, corpus, opened, device)
        if not isinstance(session, TrainingSession):
            return session
        session.compiled, session.keep_weights = compiled, keep_weights
        if compiled:
            compile_blocks(session.model)
        told = time.monotonic()
        while session.status is None:
            session.train_step()
            if progress and (session.logged or time.monotonic() - told > TOLD_SECONDS):
                progress(session.step, session.loss)
                told = time.monotonic()
            session.maybe_checkpoint(checkpoint_seconds, stop())
        return session.end()


def open_session(
    run: Run, store: Store, corpus: Data, opened: ExitStack, device: torch.device | None = None
) -> TrainingSession | dict[str, Any]:
    """Begin a run or go on with it.

    Args:
        opened: holds the session's files and the lock of its folder until it is closed.

    Returns:
        The run's session, or its result where it has one.

    Raises:
        BusyError, ValueError: as :func:`train`.
    """
    done = store.result(run.key)
    if done is not None:
        return done
    task_of(run.settings).batches_of(run, corpus)  # what does not suit the run is said before its folder is made
    folder = opened.enter_context(store.locked(run.key))
    done = store.result(run.key)  # another process may have finished it while we waited
    return done if done is not None else opened.enter_context(TrainingSession(run, folder, corpus, device))


class TrainingSession:
    """One run on its way: its model, optimizer and data, its files, and where it stands. Use it as a context.

    :meth:`train_step` computes its steps alone. Where several are computed at once (``mue.lab.train.stacked_session``), each has its own
    session, told of every step by :meth:`advance` and :meth:`record`.

    Attributes:
        step: steps done. loss: of the last one. val_loss: the last validation's.
        status: None under way, else "finished", "diverged" or "stopped".
        seconds: training time over all sittings; of stacked runs, this one's share.
        stacked, compiled: how it is trained, for the result. keep_weights: leave ``model.safetensors`` in the run's folder at its end.
    """

    def __init__(self, run: Run, folder: Path, corpus: Data, device: torch.device | None = None) -> None:
        assert run.plan.training is not None
        keep_freed_memory()  # of everybody who trains, those who only measure how fast among them
        self.run, self.folder, self.settings, self.plan = run, folder, run.settings, run.plan
        self.key, self.steps, self.tuned = run.key, run.plan.training.steps, run.plan.tuned
        self.task = task_of(run.settings)
        self.batches = self.task.batches_of(run, corpus)
        self.validation = self.batches.validation()
        self.model = self.task.build(run.plan, run.settings)
        self.moe_layers, self.self_changing = moe_layers(self.model), self_changing(self.model)
        self.routers = RouterRecord(run, self.task, self.batches, self.moe_layers)
        init_(run.plan, self.model, self.settings.seed)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.optimizer = planned_optimizer(run.plan, self.model)
        self.averages = Averages(self.model, self.settings.ema)
        self.step, self.loss, self.val_loss, self.seconds = 0, math.nan, math.nan, 0.0
        self.status: str | None = None
        self.stacked, self.compiled, self.keep_weights = 1, False, False
        self.first_loss: float | None = None
        self.steps_above = 0  # in a row, with a loss DIVERGED_ABOVE above the first

    def __enter__(self) -> TrainingSession:
        self._resume()
        write_json(self.folder / CONFIG_FILE, {"key": self.key, "plan": self.plan.hash, **self.run.to_dict()})
        # Line by line, since it is read while it grows: with rows held back until a checkpoint, early stopping saw
        # empty curves (docs/LOG.md, "Early stopping asks the fit").
        self.metrics = (self.folder / METRICS_FILE).open("a", buffering=1, encoding="utf-8")
        self.saved_at = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()

    @property
    def lr_factor(self) -> float:
        """The schedule's factor for the next step."""
        return lr_factor(self.step, self.steps, self.tuned, self.settings)

    @property
    def logged(self) -> bool:
        """Does the last step have a row in the metrics because of its number, or because it was the last?"""
        return self.status is not None or self.step % self.settings.log_every == 0

    @property
    def eval_due(self) -> bool:
        """Is a validation due after the step just taken?"""
        every = self.settings.eval_every
        return self.status is not None or bool(every and self.step % every == 0)

    @property
    def coefficients(self) -> dict[str, float]:
        """Of the auxiliary losses that the run asks for, by name: load balance (2101.03961), router z (2202.08906), consistency
        (2110.04260). Those among a router's settings have theirs in them already."""
        asked = {
            "load_balance": self.tuned.balance, "router_z": self.tuned.z, "consistency": self.settings.consistency
        }  # fmt: skip
        return {name: coefficient for name, coefficient in asked.items() if coefficient}

    def train_step(self) -> None:
        """One step of this run alone."""
        started = time.monotonic()
        # One factor for all: the plan's ratios between groups hold at every step.
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_factor
        batch = self.to_device(self.batches.at(self.step))
        with autocast(self.device, self.settings):
            output = self.task.loss(self.model, batch)
        objective(output, self.coefficients).backward()  # type: ignore[no-untyped-call]
        norm = None
        # By the norm over all parameters (1211.5063); the metrics have the norm before it.
        if self.tuned.clip is not None:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.tuned.clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.end_moe_step_()
        self.averages.update_(self.step + 1)
        assert output.loss is not None
        self.advance(float(output.loss.detach()))
        self.record(norm, output.routings, self.validate() if self.eval_due else None)
        self.seconds += time.monotonic() - started

    def to_device(self, batch: Batch) -> Batch:
        """A batch where the model is."""
        return tuple(part.to(self.device) for part in batch)

    def end_moe_step_(self) -> None:
        """What blocks with experts change by themselves after a step (balance biases, 2408.15664; the next random draw), and then what
        their routers share."""
        for part in self.self_changing:
            part.end_step_(self.tuned.bias_speed)

    def advance(self, loss: float) -> None:
        """A step was taken, and this was its loss: count it, and see whether the run has ended."""
        self.step, self.loss = self.step + 1, loss
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.steps_above = self.steps_above + 1 if loss > self.first_loss + DIVERGED_ABOVE else 0
        if not math.isfinite(loss) or self.steps_above >= DIVERGED_STEPS:
            self.status = "diverged"
        elif self.step == self.steps:
            self.status = "finished"

    @torch.no_grad()
    def asked(self, question: Callable[[], Answer]) -> Answer:
        """What the model says in eval mode, in the precision of the training."""
        # In eval mode the lab's model leaves the kernels that only training takes: validation alone and in a stack
        # differed in the last bit with them (docs/LOG.md, "A whole step at the machine's limit").
        self.model.eval()
        try:
            with autocast(self.device, self.settings), uncompiled(self.compiled):
                return question()
        finally:
            self.model.train()

    def validate(self) -> float:
        """The mean loss on the validation batches, in the task's unit."""
        found = self.asked(lambda: [self.task.loss(self.model, self.to_device(b)).loss for b in self.validation])
        losses = []
        for loss in found:
            assert loss is not None, f"the task {self.settings.task} gives no loss for a validation batch"
            losses.append(float(loss))
        return math.fsum(losses) / len(losses)  # rounded once, as a stack does it: the same losses give the same mean

    def record(self, norm: float | None, routings: Sequence[Routing], val_loss: float | None) -> None:
        """A row of metrics for the step just taken, where one is due.

        Args:
            norm: of the gradients before clipping, where the run clips. routings: of each block with experts.
            val_loss: the validation loss, where one was :attr:`eval_due`. One that is not finite ends the run as diverged.
        """
        if val_loss is not None:
            self.val_loss = val_loss
            self.status = self.status if math.isfinite(val_loss) else "diverged"
        if val_loss is None and self.step % self.settings.log_every and self.step != 1:
            return
        # Nothing in a row depends on the clock, so that a resumed run writes the same bytes.
        row: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "loss": self.loss}
        row["lr_factor"] = lr_factor(self.step - 1, self.steps, self.tuned, self.settings)
        row |= {} if norm is None else {"grad_norm": norm}
        row |= {} if val_loss is None else {"val_loss": val_loss}
        if val_loss is not None and self.settings.eval_every:
            row |= self.asked(lambda: self.task.watch(self.model))
        row |= self.routers.row(routings, self.step, evaluated=val_loss is not None, last=self.status is not None)
        self.metrics.write(json.dumps(row) + "\n")

    def maybe_checkpoint(self, checkpoint_seconds: float, stop: bool) -> None:
        """Write a checkpoint if one is due.

        Args:
            checkpoint_seconds: time between two. stop: write it now and give the run up.

        Raises:
            OSError: it cannot be written; the last good one stays.
        """
        if self.status is not None or not (stop or time.monotonic() - self.saved_at > checkpoint_seconds):
            return
        self._flush()  # first: the checkpoint counts on so many bytes of metrics
        state = {
            "run": self.key, "plan": self.plan.hash, "step": self.step, "seconds": self.seconds, "threads": torch.get_num_threads(),
            "metrics_bytes": self.metrics.tell(), "first": self.first_loss, "above": self.steps_above,
        }  # fmt: skip
        checkpoint.save(self.folder / CHECKPOINT_FILE, self.model, self.optimizer, state, self.averages.tensors())
        self.saved_at = time.monotonic()
        self.status = "stopped" if stop else None

    def end(self) -> dict[str, Any]:
        """The result of a run that has ended; it is stored unless the run was stopped."""
        result = self._result()
        if self.status == "stopped":
            return result
        result |= self.averages.result(self.validate) if self.status == "finished" else {}
        self._flush()
        if self.keep_weights:
            meta = {"run": self.key, "plan": self.plan.hash}
            checkpoint.save_weights(self.folder / WEIGHTS_FILE, self.model, meta)
            self.averages.save(self.folder, meta)
        # before the result, by which a run is known to be whole
        self.routers.write(self.folder)
        if self.status == "finished":
            write_of_task(self.folder, self.asked(lambda: self.task.at_end(self.model, self.batches)))
        write_json(self.folder / RESULT_FILE, result)
        # Last: killed before it, the run is finished and a checkpoint too many lies about; the other way round it is
        # lost.
        (self.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        return result

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.batches.tokens_per_step

    def _flush(self) -> None:
        """Metrics are on disk before the checkpoint or the result that counts on them."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())

    def _resume(self) -> None:
        """Go on from the checkpoint where there is one; rows of metrics past it are dropped and written again."""
        path, rows = self.folder / CHECKPOINT_FILE, self.folder / METRICS_FILE
        if not path.exists():  # killed before its first checkpoint, it starts anew, and so do its rows
            rows.unlink(missing_ok=True)
            return
        with torch.no_grad():
            own = self.averages.tensors()
            state = checkpoint.load(path, self.model, self.optimizer, own, run=self.key, plan=self.plan.hash)
        self.first_loss, self.steps_above = state["first"], state["above"]
        os.truncate(rows, state["metrics_bytes"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def _result(self) -> dict[str, Any]:
        """What is known of the run at its end; numbers that are not finite are None, since JSON has none."""
        shape = self.plan.target
        return {
            "key": self.key,
            "plan": self.plan.hash,
            "rule": self.plan.rule.name,
            "name": shape.name,
            "status": self.status,
            "loss": self.loss if math.isfinite(self.loss) else None,
            # Of a diverged run the last validation lies before its end, and would make it look like a good one.
            "val_loss": self.val_loss if self.status == "finished" else None,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "parameters": shape.parameters,
            "active_parameters": shape.active_parameters,
            "flops_per_token": shape.flops_per_token,
            "data": self.run.data["hash"],
            "seed": self.settings.seed,
            "stacked": self.stacked,
            "compiled": self.compiled,
            **provenance(),
        }
