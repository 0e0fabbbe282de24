"""The training loop: AdamW from a plan's groups, warmup and decay, divergence as a result, exact resume."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mue
from mue.files import write_json
from mue.lab import checkpoint
from mue.lab.data import Batches, Corpus
from mue.lab.model import LanguageModel, Output
from mue.lab.run import Run, Settings, Store
from mue.shapes import HParams

# A run has diverged when its loss is not finite, or stays this many nats above its start for this many steps.
DIVERGED_NATS, DIVERGED_STEPS = 1.0, 20

Progress = Callable[[int, float], None]


def lr_factor(step: int, steps: int, tuned: HParams, settings: Settings) -> float:
    """The schedule as a factor on every group's peak lr; ratios between groups never change.

    Warmup is linear over ``tuned.warmup`` of the steps (a fraction, so that it scales with the duration: SDE time).
    """
    warmup = max(1, round(tuned.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "cosine":
        done = (step + 1 - warmup) / max(1, steps - warmup)
        return tuned.floor + (1 - tuned.floor) * 0.5 * (1 + math.cos(math.pi * done))
    decay = max(1, round(settings.decay * steps))
    left = steps - 1 - step
    return 1.0 if left >= decay else tuned.floor + (1 - tuned.floor) * (left + 1) / (decay + 1)


def train(
    run: Run,
    store: Store,
    corpus: Corpus,
    *,
    progress: Progress | None = None,
    checkpoint_seconds: float = 10.0,
    keep_weights: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train ``run`` to its end and return its result; a finished run is read, an interrupted one goes on exactly.

    Args:
        progress: called with (step, loss) after every logged step.
        checkpoint_seconds: time between checkpoints. keep_weights: leave ``model.safetensors`` in the run's folder.
        stop: asked after every step; true gives the run up: a checkpoint is left, and the result has status "stopped"
            and is not stored.

    Raises:
        mue.lab.run.BusyError: another process trains it. ValueError: the folder holds a checkpoint of something else.
        OSError: the disk is full; the last good checkpoint stays.
    """
    done = store.result(run.key)
    if done is not None:
        return done
    batches_of(run, corpus)  # before the folder is made
    with store.locked(run.key) as folder:
        done = store.result(run.key)  # another process may have finished it while we waited
        if done is not None:
            return done
        return _Trainer(run, folder, corpus).run(progress, checkpoint_seconds, keep_weights, stop)


def batches_of(run: Run, corpus: Corpus) -> tuple[Batches, Batches]:
    """(training, validation) batches of a run; ``ValueError`` where the text does not suit it. Nothing is written."""
    shape, settings = run.plan.target, run.settings
    assert run.plan.training is not None
    if corpus.vocab > shape.vocab:
        raise ValueError(f"the data has {corpus.vocab} tokens, the model a vocabulary of {shape.vocab}: raise vocab")
    sequences = run.plan.training.batch // shape.sequence
    train = Batches(corpus, "train", shape.sequence, sequences, settings.seed)
    return train, Batches(corpus, "validation", shape.sequence, min(sequences, settings.eval_sequences), 0)


class _Trainer:
    """One run in one process."""

    def __init__(self, run: Run, folder: Path, corpus: Corpus) -> None:
        assert run.plan.training is not None
        self.run_, self.folder, self.settings, self.plan = run, folder, run.settings, run.plan
        self.key, self.steps, self.tuned = run.key, run.plan.training.steps, run.plan.tuned
        shape = run.plan.target
        self.batch = run.plan.training.batch
        self.batches, held = batches_of(run, corpus)
        self.validation = held.fixed(max(1, self.settings.eval_sequences // held.batch_sequences))
        balance, z = self.settings.balance, self.tuned.z > 0
        self.model = LanguageModel(shape, run.plan.multipliers, balance=balance, z_loss=z)  # type: ignore[arg-type]
        run.plan.init_(self.model, self.settings.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(run.plan.param_groups(self.model), fused=True)
        self.first: float | None = None
        self.above = 0

    def run(
        self, progress: Progress | None, checkpoint_seconds: float, keep_weights: bool, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        step, seconds = self._resume()
        write_json(self.folder / "config.json", {"key": self.key, "plan": self.plan.hash, **self.run_.to_dict()})
        started = saved = time.monotonic()
        status, loss, held = "finished", math.nan, math.nan
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            while step < self.steps:
                loss, output, norm = self._step(step)
                step += 1
                diverged = self._diverged(loss)
                last = step == self.steps or diverged
                if last or (self.settings.eval_every and step % self.settings.eval_every == 0):
                    held = self._validate()
                    last = last or not math.isfinite(held)
                    diverged = diverged or not math.isfinite(held)
                    self._log(metrics, step, loss, norm, output, held)
                elif step % self.settings.log_every == 0 or step == 1:
                    self._log(metrics, step, loss, norm, output, None)
                if progress and (last or step % self.settings.log_every == 0):
                    progress(step, loss)
                if diverged:
                    status = "diverged"
                    break
                if step == self.steps:
                    break
                stopped = stop()
                if stopped or time.monotonic() - saved > checkpoint_seconds:
                    self._save(metrics, step, seconds + time.monotonic() - started)
                    saved = time.monotonic()
                if stopped:
                    return self._result("stopped", step, loss, held, seconds + time.monotonic() - started)
            metrics.flush()
            os.fsync(metrics.fileno())
        if keep_weights:
            meta = {"run": self.key, "plan": self.plan.hash}
            checkpoint.save_weights(self.folder / "model.safetensors", self.model, meta)
        result = self._result(status, step, loss, held, seconds + time.monotonic() - started)
        write_json(self.folder / "result.json", result)
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return result

    def _step(self, step: int) -> tuple[float, Output, float | None]:
        factor = lr_factor(step, self.steps, self.tuned, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        tokens_BT, targets_BT = (x.to(self.device) for x in self.batches.at(step))
        with self._autocast():
            output = self.model(tokens_BT, targets_BT)
        total = output.loss
        for name, coefficient in (("load_balance", self.tuned.balance), ("router_z", self.tuned.z)):
            if coefficient:
                total = total + coefficient * sum(r.losses[name] for r in output.routings)
        total.backward()
        norm = None
        if self.tuned.clip is not None:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.tuned.clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.settings.balance == "bias":
            self.model.update_bias_(self.tuned.bias_speed)
        return float(output.loss.detach()), output, norm

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.settings.precision == "bf16" else nullcontext()

    def _diverged(self, loss: float) -> bool:
        self.first = loss if self.first is None else self.first
        self.above = self.above + 1 if loss > self.first + DIVERGED_NATS else 0
        return not math.isfinite(loss) or self.above >= DIVERGED_STEPS

    @torch.no_grad()
    def _validate(self) -> float:
        self.model.eval()
        with self._autocast():
            losses = [float(self.model(x.to(self.device), y.to(self.device)).loss) for x, y in self.validation]
        self.model.train()
        return math.fsum(losses) / len(losses)

    def _log(
        self, metrics: Any, step: int, loss: float, norm: float | None, output: Output, held: float | None
    ) -> None:
        """One row: nothing in it depends on the clock, so that a resumed run writes the same bytes."""
        row: dict[str, Any] = {"step": step, "tokens": step * self.batch, "loss": loss}
        row["lr_factor"] = lr_factor(step - 1, self.steps, self.tuned, self.settings)
        if norm is not None:
            row["grad_norm"] = norm
        if held is not None:
            row["val_loss"] = held
        if output.routings:
            shares = [(r.stats["load"].float() / max(1, r.num_pairs)).tolist() for r in output.routings]
            row["load"] = [[round(share, 5) for share in layer] for layer in shares]
        metrics.write(json.dumps(row) + "\n")

    def _save(self, metrics: Any, step: int, seconds: float) -> None:
        metrics.flush()
        os.fsync(metrics.fileno())
        state = {
            "run": self.key,
            "plan": self.plan.hash,
            "step": step,
            "seconds": seconds,
            "metrics_bytes": metrics.tell(),
            "first": self.first,
            "above": self.above,
        }
        checkpoint.save(self.folder / "checkpoint.safetensors", self.model, self.optimizer, state)

    def _resume(self) -> tuple[int, float]:
        """(step, seconds spent) to go on from; rows of metrics past the checkpoint are dropped and written again."""
        path, rows = self.folder / "checkpoint.safetensors", self.folder / "metrics.jsonl"
        if not path.exists():
            rows.unlink(missing_ok=True)
            return 0, 0.0
        with torch.no_grad():
            state = checkpoint.load(path, self.model, self.optimizer, run=self.key, plan=self.plan.hash)
        self.first, self.above = state["first"], state["above"]
        os.truncate(rows, state["metrics_bytes"])
        return int(state["step"]), float(state["seconds"])

    def _result(self, status: str, step: int, loss: float, held: float, seconds: float) -> dict[str, Any]:
        shape = self.plan.target
        return {
            "key": self.key,
            "plan": self.plan.hash,
            "rule": self.plan.rule.name,
            "name": shape.name,
            "status": status,
            "loss": loss if math.isfinite(loss) else None,
            "val_loss": held if status == "finished" else None,
            "step": step,
            "tokens": step * self.batch,
            "seconds": round(seconds, 3),
            "parameters": shape.parameters,
            "active_parameters": shape.active_parameters,
            "flops_per_token": shape.flops_per_token,
            "data": self.run_.data["hash"],
            "seed": self.settings.seed,
            **provenance(),
        }


def provenance() -> dict[str, Any]:
    """Versions, machine kind and git hash: what a number needs to be believed later."""
    try:
        here = Path(__file__).parent
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        git = ""
    return {
        "git": git or None,
        "mue": mue.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
