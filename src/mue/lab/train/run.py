"""One training run as data: what it is keyed by, where it lives, and whether it is done.

The truth of a run is ``<store>/runs/<key>/result.json``, written atomically. The key is a hash of the run's
*effective* values (shape, multipliers, per-role settings, schedule, data, seed), so that two rules which agree share
their runs, and a finished run is never run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mue.lab.train.schedule import SCHEDULES
from mue.plan.plan import PlanData
from mue.plan.replan import inputs_from_dict
from mue.plan.transfer import plan_of
from mue.shapes.block import Block
from mue.shapes.hparams import warmup_steps
from mue.shapes.routers import LOSSES
from mue.util.errors import positive, positive_int
from mue.util.files import FileLock, digest, read_text, remove_unfinished

PRECISIONS = ("fp32", "bf16")
BALANCES = ("bias", "loss", "none")
OPTIMIZERS = ("adamw", "muon")
_ADDED_LATER = {
    "consistency": 0.0,
    "task": "language",
    "shift": 0,
    "ema": (),
}  # what runs do that were keyed before these settings existed
# What a run's folder holds; whoever writes or looks for one of them has its name from here.
CONFIG_FILE, RESULT_FILE, METRICS_FILE, ROUTERS_FILE = "config.json", "result.json", "metrics.jsonl", "routers.json"
TASK_FILE = "task.json"  # what the run's task keeps of the trained model
CHECKPOINT_FILE, WEIGHTS_FILE = "checkpoint.safetensors", "model.safetensors"  # under way; at the end, where kept
AVERAGE_FILES = "ema-*.safetensors"  # a pattern: one for each decay, where weights are kept


@dataclass(frozen=True)
class Settings:
    """What a run needs beyond its plan and its data.

    Attributes:
        task: what is trained on, by its name in ``mue.lab.train.task``.
        seed: of the init and of the order of the batches.
        schedule: of :data:`mue.lab.train.schedule.SCHEDULES`: ``"wsd"`` (warmup, stable, linear decay over the last ``decay`` of the
            steps), ``"cosine"``, ``"linear"`` (from the warmup on), ``"wsqd"`` (``"wsd"`` with a base of 1/√(t + ``shift``)).
        precision: ``"fp32"``, or ``"bf16"`` autocast.
        balance: of experts: ``"bias"`` (aux-loss-free), ``"loss"`` (with the plan's coefficients) or ``"none"``.
        consistency: coefficient α of the consistency loss between two passes over every batch (THOR, 2110.04260; the paper: 5).
        eval_every: steps between validations (0: only at the end). eval_sequences: how many each validation reads.
        log_every: steps between rows of metrics.
        ema: decays of averages of the weights (:mod:`mue.lab.train.averages`); none by default.
    """

    seed: int = 0
    schedule: str = "wsd"
    decay: float = 0.2
    precision: str = "fp32"
    balance: str = "bias"
    eval_every: int = 0
    eval_sequences: int = 128
    log_every: int = 10
    consistency: float = 0.0
    task: str = "language"
    shift: int = 0
    ema: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("schedule", tuple(SCHEDULES)), ("precision", PRECISIONS), ("balance", BALANCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        # True is an int to Python, and would be a key of its own beside 1.
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        positive("decay", self.decay, zero=True, below=1)
        if self.schedule == "wsqd":
            object.__setattr__(
                self, "shift", positive_int("shift of wsqd (the steps of the run it was tuned on)", self.shift)
            )
        elif self.shift:
            raise ValueError(f'shift = {self.shift!r} is read by schedule = "wsqd" alone: leave it out')
        positive("consistency", self.consistency, zero=True)
        if not isinstance(self.ema, list | tuple):
            raise ValueError(f"ema must be a list of decays below 1, such as [0.99, 0.999], got {self.ema!r}")
        decays = sorted({positive("ema", decay, below=1) for decay in self.ema})
        object.__setattr__(self, "ema", tuple(decays))
        for name in ("eval_sequences", "log_every", *(("eval_every",) if self.eval_every else ())):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """The settings for keys and files. Those that came later are left out at their defaults: older runs keep keys and files."""
        return {k: v for k, v in asdict(self).items() if k not in _ADDED_LATER or v != _ADDED_LATER[k]}


def _softmax_bias(block: Block) -> bool:
    """Whether a balance bias moves softmax scores."""
    has = block.experts > 0 and block.router_kind.balance_bias
    return has and block.all_settings.get("score", block.router_kind.score) == "softmax"


@dataclass(frozen=True)
class Run:
    """A plan with its settings on one corpus (``data``: its content hash and how to load it again)."""

    plan: PlanData
    settings: Settings
    data: dict[str, Any]

    def __post_init__(self) -> None:
        if self.plan.training is None:
            raise ValueError("a run needs [training]: batch in tokens per step, and steps")
        tuned = self.plan.tuned
        if tuned.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"the lab trains with {' and '.join(OPTIMIZERS)}, the plan is for {tuned.optimizer}: use another trainer"
                " (plan.param_groups)"
            )
        if tuned.balance and self.settings.balance != "loss" and any(b.experts for b in self.plan.target.blocks):
            raise ValueError(
                f'balance = {tuned.balance:g} is the coefficient of a loss that [run] balance = "loss" turns on: set it, or leave it out'
            )
        if self.settings.balance == "loss" and not tuned.balance:
            raise ValueError('[run] balance = "loss" needs its coefficient: [tuned] balance = 0.01, say')
        routers = [b.router_kind for b in self.plan.target.blocks if b.experts]
        if self.settings.balance == "loss" and routers and not any(kind.matrix for kind in routers):
            raise ValueError(
                f'[run] balance = "loss" trains the matrix of a router, and the {routers[0].name} router of {self.plan.target.name}'
                " has none: leave it out, and [tuned] balance with it"
            )
        if tuned.z and routers and not any(kind.matrix for kind in routers):
            raise ValueError(
                f"z = {tuned.z:g} is the coefficient of a loss on a router's logits, and the {routers[0].name} router of"
                f" {self.plan.target.name} has none: leave it out"
            )
        of_run = {"load_balance": ("balance", tuned.balance), "router_z": ("z", tuned.z)}
        for block in self.plan.target.blocks:
            losses = block.all_settings[LOSSES] if block.experts else {}
            for name, (key, value) in of_run.items():
                if value and losses.get(name):
                    raise ValueError(
                        f"the {block.router} router has {LOSSES} {name} = {losses[name]:g} among its settings, and [tuned] {key} ="
                        f" {value:g} is the coefficient of the same loss: leave one of them out"
                    )
        if self.settings.consistency and not any(kind.stochastic for kind in routers):
            raise ValueError(
                f"consistency = {self.settings.consistency:g} compares two draws of the experts, and no router of"
                f' {self.plan.target.name} draws any: leave it out, or plan router = "thor" or "random"'
            )
        if warmup_steps(tuned.warmup, self.plan.training.steps) >= self.plan.training.steps > 1:
            raise ValueError(
                f"warmup = {tuned.warmup:g} steps is the whole run of {self.plan.training.steps}: give fewer, or a fraction below 1"
            )
        sequence, batch = self.plan.target.sequence, self.plan.training.batch
        if batch % sequence:
            raise ValueError(f"batch = {batch} tokens per step is not a whole number of sequences of {sequence} tokens")

    @property
    def effective(self) -> dict[str, Any]:
        """Everything that decides the run's numbers, and nothing else: the rule has no name here.

        Two rules that come to the same values so share their runs.
        """
        plan = self.plan
        blocks = [
            {
                "layers": block.layers,
                # A role that the model lacks has values in every plan, and decides nothing here.
                "roles": {role: dict(p.values.items()) for role, p in block.roles.items() if p.count},
            }
            for block in plan.blocks
        ]
        unchanged = plan.to_dict()["unchanged"]
        moe = any(block.is_moe for block in plan.target.blocks)
        if not moe:  # a dense model reads none of these
            unchanged = {k: v for k, v in unchanged.items() if k not in ("balance", "z", "bias_speed")}
        shape = plan.target.to_dict()
        shape.pop("output_multiplier")  # a base's habit A*; what the forward pass applies is in the multipliers
        settings = self.settings.to_dict()
        if not moe:
            settings.pop("balance")
        elif settings["balance"] == "bias" and any(map(_softmax_bias, plan.target.blocks)):
            # Their step is in proportion to the score; runs from before it was have other keys, for they are other runs.
            settings["bias_step"] = "of the score"
        kinds = [block.router_kind for block in plan.target.blocks if block.experts]
        if revised := {kind.name: kind.revision for kind in kinds if kind.revision}:
            settings["router_revisions"] = revised
        return {
            "shape": shape,
            "multipliers": asdict(plan.multipliers),
            "blocks": blocks,
            "betas": list(plan.betas),
            **({"momentum": plan.momentum} if plan.tuned.optimizer == "muon" else {}),
            "unchanged": unchanged,
            "training": {"batch": plan.training.batch, "steps": plan.training.steps} if plan.training else None,
            "settings": settings,
            "data": self.data["hash"],
        }

    @cached_property
    def key(self) -> str:
        """16 hex digits over :attr:`effective`."""
        return digest(self.effective)

    def to_dict(self) -> dict[str, Any]:
        """The run for JSON; :meth:`from_dict` reads it back."""
        return {"plan": self.plan.inputs.to_dict(), "settings": self.settings.to_dict(), "data": self.data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        """The run that :meth:`to_dict` wrote, planned anew from its inputs."""
        return cls(plan_of(inputs_from_dict(data["plan"])), Settings(**data["settings"]), data["data"])


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run (a checkpoint of ``transformers`` has a ``config.json``, too)."""
    try:
        found = json.loads(read_text(folder / CONFIG_FILE))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"key", "plan", "settings", "data"} <= found.keys()


def read_run(folder: Path, *, same: bool = False) -> Run:
    """The run of a folder, planned anew from its inputs.

    Args:
        same: it has to be the very run that was trained there, whose key is a hash of all its values. A report only reads what is left of it.

    Raises:
        ValueError: the folder is none of a run, or its run is planned otherwise now.
    """
    if not is_run(folder):
        raise ValueError(f"{folder} is no run: expected a {CONFIG_FILE} as mue train writes it")
    config = json.loads(read_text(folder / CONFIG_FILE))
    run = Run.from_dict({name: config[name] for name in ("plan", "settings", "data")})
    if same and run.key != config["key"]:
        raise ValueError(
            f"{folder} was trained as run {config['key']}, and what its {CONFIG_FILE} says is run {run.key} now: the file was changed, or is of a"
            " version of mue that planned other values; train it anew from a file"
        )
    return run


class BusyError(RuntimeError):
    """Another process is training this run right now."""


class Store:
    """A folder of runs: ``runs/<key>/{config,result,routers}.json, metrics.jsonl, checkpoint.safetensors``.

    Processes share one without asking each other: a file is replaced whole, and who trains a run holds its lock.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: str) -> Path:
        """Where a run's files are, whether it exists yet or not."""
        return self.root / "runs" / key

    def result(self, key: str) -> dict[str, Any] | None:
        """The run's result, or None while it has none.

        Raises:
            ValueError: the file is damaged or another run's; the text names the folder to remove.
        """
        path = self.folder(key) / RESULT_FILE
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a result ({error}): remove that folder to run it again") from error
        if not isinstance(result, dict) or result.get("key") != key:
            raise ValueError(f"{path} belongs to another run: remove that folder to run it again")
        return result

    def run(self, key: str) -> Run | None:
        """The run that a folder is of, or None where it has none yet."""
        folder = self.folder(key)
        return read_run(folder) if (folder / CONFIG_FILE).exists() else None

    def metrics(self, key: str) -> list[dict[str, Any]]:
        """The run's metric rows so far, also while it trains; [] of one that has none yet.

        Returns:
            A dictionary for each row: ``step``, ``tokens``, ``loss`` and ``lr_factor``, and where there were any
            ``val_loss``, ``grad_norm`` (before clipping), ``load`` (each block's shares of the experts) and at evaluations ``routers``
            (:func:`mue.moe.diagnostics.measure` of each block with experts).
        """
        path = self.folder(key) / METRICS_FILE
        if not path.exists():
            return []
        # Whole rows only: the last one may be half written.
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]

    def routers(self, key: str) -> dict[str, Any] | None:
        """What was seen of the run's routers at its end (``mue.lab.train.router_record``); None where it has no experts, has not
        ended, or is from before that was kept.

        Raises:
            ValueError: the file is damaged; the text names it.
        """
        return self._kept(key, ROUTERS_FILE)

    def of_task(self, key: str) -> dict[str, Any] | None:
        """What the run's task keeps of the trained model (``mue.lab.train.task.Task.at_end``); None where it keeps nothing.

        Raises:
            ValueError: as :meth:`routers`.
        """
        return self._kept(key, TASK_FILE)

    def _kept(self, key: str, name: str) -> dict[str, Any] | None:
        path = self.folder(key) / name
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and reports go without") from error
        return found

    @contextmanager
    def locked(self, key: str) -> Iterator[Path]:
        """The run's folder, made where it is missing and held by this process alone, as a context.

        The lock is the kernel's (flock) and dies with the process. What a killed one had half written beside its files is removed.

        Raises:
            BusyError: another process holds it.
        """
        busy = BusyError(f"run {key} is being trained by another process")
        folder = self.folder(key)
        with FileLock(folder / "lock", busy=busy):
            for name in (
                CONFIG_FILE,
                RESULT_FILE,
                METRICS_FILE,
                ROUTERS_FILE,
                TASK_FILE,
                CHECKPOINT_FILE,
                WEIGHTS_FILE,
            ):
                remove_unfinished(folder / name)
            remove_unfinished(folder / AVERAGE_FILES, pattern=True)
            yield folder
