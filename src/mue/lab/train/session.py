"""The training loop: AdamW from a plan's groups, warmup and decay, divergence as a result, exact resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mue.lab.data import Corpus
from mue.lab.models.language import LanguageModel
from mue.lab.train import checkpoint
from mue.lab.train.provenance import provenance
from mue.lab.train.run import Run, Store
from mue.lab.train.schedule import lr_factor
from mue.lab.train.spec import batches_of
from mue.lab.train.step import autocast, compile_blocks, objective, uncompiled
from mue.model.apply import init_, param_groups
from mue.util.files import write_json

# A run has diverged when its loss is not finite, or stays this many nats above its start for this many steps.
DIVERGED_NATS, DIVERGED_STEPS = 1.0, 20

Progress = Callable[[int, float], None]


def train(
    run: Run,
    store: Store,
    corpus: Corpus,
    *,
    progress: Progress | None = None,
    checkpoint_seconds: float = 10.0,
    keep_weights: bool = False,
    stop: Callable[[], bool] = lambda: False,
    compiled: bool = False,
) -> dict[str, Any]:
    """Train ``run`` to its end and return its result; a finished run is read, an interrupted one goes on exactly.

    Args:
        progress: called with (step, loss) after every logged step.
        checkpoint_seconds: time between checkpoints. keep_weights: leave ``model.safetensors`` in the run's folder.
        stop: asked after every step; true gives the run up: a checkpoint is left, and the result has status "stopped"
            and is not stored.
        compiled: compile the blocks first (seconds to a minute), which pays for long runs; the numbers differ in rounding.

    Raises:
        mue.lab.train.run.BusyError: another process trains it. ValueError: the folder holds a checkpoint of something else.
        OSError: the disk is full; the last good checkpoint stays.
    """
    with ExitStack() as opened:
        session = open_session(run, store, corpus, opened)
        if not isinstance(session, TrainingSession):
            return session
        session.compiled = compiled
        if compiled:
            compile_blocks(session.model)
        while session.status is None:
            session.train_step()
            if progress and session.logged:
                progress(session.step, session.loss)
            session.maybe_checkpoint(checkpoint_seconds, stop())
        return session.end(keep_weights)


def open_session(run: Run, store: Store, corpus: Corpus, opened: ExitStack) -> TrainingSession | dict[str, Any]:
    """Begin a run or go on with it: its session, held in ``opened`` with the lock of its folder. Or its result, where it has one.

    Raises:
        BusyError, ValueError: as :func:`train`.
    """
    done = store.result(run.key)
    if done is not None:
        return done
    batches_of(run, corpus)  # before the folder is made
    folder = opened.enter_context(store.locked(run.key))
    done = store.result(run.key)  # another process may have finished it while we waited
    return done if done is not None else opened.enter_context(TrainingSession(run, folder, corpus))


class TrainingSession:
    """One run on its way: its model, optimizer and data, its files, and where it stands. Use it as a context.

    :meth:`train_step` computes its steps alone. Where several are computed at once (``mue.lab.train.stacked_session``), each has its own session, told of
    every step by :meth:`advance` and :meth:`record`.

    Attributes:
        step: steps done. loss: of the last one. status: None under way, else "finished", "diverged" or "stopped".
        seconds: training time over all sessions; of stacked runs, this one's share.
        stacked, compiled: how it is trained, for the result.
    """

    def __init__(self, run: Run, folder: Path, corpus: Corpus) -> None:
        assert run.plan.training is not None
        self.run, self.folder, self.settings, self.plan = run, folder, run.settings, run.plan
        self.key, self.steps, self.tuned = run.key, run.plan.training.steps, run.plan.tuned
        self.batches, held = batches_of(run, corpus)
        self.validation = held.fixed(max(1, self.settings.eval_sequences // held.batch_sequences))
        self.model = LanguageModel(
            run.plan.target,
            run.plan.multipliers,
            balance=self.settings.balance,  # type: ignore[arg-type]
            z_loss=self.tuned.z > 0,
            consistency=self.settings.consistency > 0,
            seed=self.settings.seed,
        )
        init_(run.plan, self.model, self.settings.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(param_groups(run.plan, self.model), fused=True)
        self.step, self.loss, self.val_loss, self.seconds = 0, math.nan, math.nan, 0.0
        self.status: str | None = None
        self.stacked, self.compiled = 1, False
        self.first: float | None = None
        self.above = 0

    def __enter__(self) -> TrainingSession:
        self._resume()
        write_json(self.folder / "config.json", {"key": self.key, "plan": self.plan.hash, **self.run.to_dict()})
        self.metrics = (self.folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")  # read while it grows
        self.saved = time.monotonic()
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
        """Of the auxiliary losses, by name."""
        return {
            "load_balance": self.tuned.balance, "router_z": self.tuned.z, "consistency": self.settings.consistency
        }  # fmt: skip

    def train_step(self) -> None:
        """One step of this run alone."""
        started = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_factor
        tokens_BT, targets_BT = (x.to(self.device) for x in self.batches.at(self.step))
        with autocast(self.device, self.settings):
            output = self.model(tokens_BT, targets_BT)
        objective(output, self.coefficients).backward()  # type: ignore[no-untyped-call]
        norm = None
        if self.tuned.clip is not None:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.tuned.clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.end_step_(self.tuned.bias_speed)
        self.advance(float(output.loss.detach()))
        self.record(norm, [r.stats["load"] for r in output.routings], self.validate() if self.eval_due else None)
        self.seconds += time.monotonic() - started

    def advance(self, loss: float) -> None:
        """A step was taken, and this was its loss."""
        self.step, self.loss = self.step + 1, loss
        self.first = loss if self.first is None else self.first
        self.above = self.above + 1 if loss > self.first + DIVERGED_NATS else 0
        if not math.isfinite(loss) or self.above >= DIVERGED_STEPS:
            self.status = "diverged"
        elif self.step == self.steps:
            self.status = "finished"

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss on the validation batches."""
        self.model.eval()
        with autocast(self.device, self.settings), uncompiled(self.compiled):
            losses = [float(self.model(x.to(self.device), y.to(self.device)).loss) for x, y in self.validation]
        self.model.train()
        return math.fsum(losses) / len(losses)

    def record(self, norm: float | None, loads: Sequence[Tensor], held: float | None) -> None:
        """A row of metrics for the step just taken, where one is due.

        Args:
            norm: of the gradients before clipping, where the run clips. loads: pairs per expert of each MoE block.
            held: the validation loss, where one was :attr:`due`. One that is not finite ends the run as diverged.
        """
        if held is not None:
            self.val_loss = held
            self.status = self.status if math.isfinite(held) else "diverged"
        if held is None and self.step % self.settings.log_every and self.step != 1:
            return
        # Nothing in a row depends on the clock, so that a resumed run writes the same bytes.
        row: dict[str, Any] = {"step": self.step, "tokens": self.step * self.batch, "loss": self.loss}
        row["lr_factor"] = lr_factor(self.step - 1, self.steps, self.tuned, self.settings)
        if norm is not None:
            row["grad_norm"] = norm
        if held is not None:
            row["val_loss"] = held
        if loads:
            shares = [(load.float() / max(1, int(load.sum()))).tolist() for load in loads]
            row["load"] = [[round(share, 5) for share in layer] for layer in shares]
        self.metrics.write(json.dumps(row) + "\n")

    def maybe_checkpoint(self, checkpoint_seconds: float, stop: bool) -> None:
        """Write a checkpoint if one is due; ``stop``: write it now and give the run up."""
        if self.status is not None or not (stop or time.monotonic() - self.saved > checkpoint_seconds):
            return
        self._flush()
        state = {
            "run": self.key,
            "plan": self.plan.hash,
            "step": self.step,
            "seconds": self.seconds,
            "metrics_bytes": self.metrics.tell(),
            "first": self.first,
            "above": self.above,
        }
        checkpoint.save(self.folder / "checkpoint.safetensors", self.model, self.optimizer, state)
        self.saved = time.monotonic()
        self.status = "stopped" if stop else None

    def end(self, keep_weights: bool = False) -> dict[str, Any]:
        """The result of a run that has ended; it is stored unless the run was stopped."""
        result = self._result()
        if self.status == "stopped":
            return result
        self._flush()
        if keep_weights:
            meta = {"run": self.key, "plan": self.plan.hash}
            checkpoint.save_weights(self.folder / "model.safetensors", self.model, meta)
        write_json(self.folder / "result.json", result)
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return result

    @property
    def batch(self) -> int:
        """Tokens of a step."""
        return self.batches.tokens_per_step

    def _flush(self) -> None:
        self.metrics.flush()
        os.fsync(self.metrics.fileno())

    def _resume(self) -> None:
        """Go on from the checkpoint where there is one; rows of metrics past it are dropped and written again."""
        path, rows = self.folder / "checkpoint.safetensors", self.folder / "metrics.jsonl"
        if not path.exists():
            rows.unlink(missing_ok=True)
            return
        with torch.no_grad():
            state = checkpoint.load(path, self.model, self.optimizer, run=self.key, plan=self.plan.hash)
        self.first, self.above = state["first"], state["above"]
        os.truncate(rows, state["metrics_bytes"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def _result(self) -> dict[str, Any]:
        shape = self.plan.target
        return {
            "key": self.key,
            "plan": self.plan.hash,
            "rule": self.plan.rule.name,
            "name": shape.name,
            "status": self.status,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "val_loss": self.val_loss if self.status == "finished" else None,
            "step": self.step,
            "tokens": self.step * self.batch,
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
