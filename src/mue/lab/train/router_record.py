"""What a run keeps of its routers: a row at every evaluation, and at its end the matrices, in ``routers.json``.

Both are of the training batch just taken, as the routers routed it in training: that is what a plan's numbers assume something
of. A training step whose loss is not evaluated measures nothing but the load, which it has anyway.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mue.lab.data.byte_classes import BYTE_CLASSES, byte_class
from mue.lab.train.run import ROUTERS_FILE, Run
from mue.lab.train.task import Batch, Task, TaskBatches
from mue.moe import MoELayer, Routing
from mue.moe import diagnostics as seen
from mue.moe.routing import expert_load
from mue.util.files import write_text


class RouterRecord:
    """The measurements of one run.

    Args:
        run: whose. task, batches: the run's, which say what the tokens are. layers: the blocks with experts of its model.
    """

    def __init__(self, run: Run, task: Task, batches: TaskBatches, layers: Sequence[MoELayer]) -> None:
        self.run, self.task, self.batches = run, task, batches
        self.layers = [layer for layer in layers if layer.router is not None]
        self.at_end: dict[str, Any] | None = None

    def row(self, routings: Sequence[Routing], step: int, *, evaluated: bool, last: bool) -> dict[str, Any]:
        """What a row of metrics has of the step just taken: the load, and where it was evaluated the measurements.

        Args:
            routings: of each block with experts. step: its number, from 1: the first routes as the init does, and is measured too.
            last: the run has ended: look at the matrices, too.
        """
        if not routings:
            return {}
        row: dict[str, Any] = {"load": load_shares(routings)}
        if evaluated or step == 1:
            row["routers"] = [_short(seen.measure(routing)) for routing in routings]
        if last:
            self.at_end = {"key": self.run.key, "step": step, **self._matrices(routings, self.batches.at(step - 1))}
        return row

    def write(self, folder: Path) -> None:
        """Write ``routers.json`` into a run's folder, atomically; nothing of a run without experts."""
        if self.at_end is not None:
            write_text(folder / ROUTERS_FILE, json.dumps(self.at_end, separators=(",", ":"), ensure_ascii=False) + "\n")

    def _matrices(self, routings: Sequence[Routing], batch: Batch) -> dict[str, Any]:
        """Tokens measured, classes with their tokens, and of each block co-activation, overlap, specialisation, active counts and
        what is absent, with the reason."""
        class_T, why = self._classes(batch, routings)
        out: dict[str, Any] = {"tokens": routings[0].num_tokens, "classes": None, "class_tokens": None}
        if class_T is not None:
            out["classes"] = list(BYTE_CLASSES)
            out["class_tokens"] = torch.bincount(class_T, minlength=len(BYTE_CLASSES)).tolist()
        out["layers"] = []
        for i, routing in enumerate(routings):
            down, unlike = self._down(i, len(routings), routing.num_experts)
            absent = {**seen.absent(routing), "overlap": unlike, "specialisation": why}
            layer: dict[str, Any] = {
                "experts": routing.num_experts,
                "active_counts": torch.bincount(seen.active_counts(routing)).tolist(),
                "coactivation": seen.coactivation(routing).tolist(),
                "overlap": None,
                "specialisation": None,
                "absent": {name: reason for name, reason in absent.items() if reason},
            }
            if down is not None:
                layer["overlap"] = [[round(x, 3) for x in row] for row in seen.overlap(down).tolist()]
            if class_T is not None:
                layer["specialisation"] = seen.specialisation(routing, class_T, len(BYTE_CLASSES)).tolist()
            out["layers"].append(layer)
        return out

    def _classes(self, batch: Batch, routings: Sequence[Routing]) -> tuple[Tensor | None, str]:
        """(T,) the class of each token, or why there is none."""
        tokens = self.task.tokens(batch)
        if tokens is None:
            return None, "the task does not say which tokens its batches are"
        if self.run.data.get("tokenizer") != "bytes":
            return None, "tokens are not bytes, and no other classes of them are known"
        if any(routing.num_tokens != tokens.numel() for routing in routings):
            return None, "the model routes another number of tokens than its batch has"
        table_V = torch.from_numpy(byte_class(self.run.plan.target.vocab))
        return table_V[tokens.flatten().cpu()].to(routings[0].expert_P.device), ""

    def _down(self, i: int, routed: int, experts: int) -> tuple[Tensor | None, str]:
        """The down projections of the i-th routed block, or why they are not to be had."""
        if len(self.layers) != routed:
            return None, f"the model has {len(self.layers)} blocks with a router and returns {routed} routings"
        down = self.layers[i].weights.down_NDH
        if down is None or down.shape[0] != experts:
            return None, "the block does not hold one down projection for each expert"
        return down, ""


def load_shares(routings: Sequence[Routing]) -> list[list[float]]:
    """Each expert's share of the pairs, of every block with experts."""
    loads = [(r.stats["load"] if "load" in r.stats else expert_load(r)[: r.num_experts]).float() for r in routings]
    return [[round(share, 5) for share in (load / load.sum().clamp(min=1)).tolist()] for load in loads]


def _short(value: Any) -> Any:
    """Numbers in six digits, wherever they are."""
    if isinstance(value, dict):
        return {name: _short(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
