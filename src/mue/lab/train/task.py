"""What a run trains on, and the seam for another problem: a task is one file, of ``mue.lab.tasks`` or of a package of yours.

    @TASKS.register("mine")
    class Mine(Task):
        unit = "nats per token"
        def build(self, plan, settings): ...      # the module that the plan initialises and the session trains
        def batches(self, run, corpus): ...       # what it reads, as a pure function of (seed, step)
        def loss(self, model, batch): ...         # what a step minimises
        def baseline_loss(self, shape): ...       # what guessing would cost

``[run] task = "mine"`` then trains it; ``mue.lab.tasks.order`` is a whole one. Sessions, stacks, sweeps and reports ask the task; none
of them names a model.

Neither this file nor those of ``mue.lab.tasks`` import torch before they need it: a sweep's own process names tasks and starts without.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mue.lab.data import Corpus, Data
from mue.lab.train.run import TASK_FILE, Run, Settings
from mue.plan.plan import PlanData
from mue.shapes import Transformer
from mue.util.files import write_text
from mue.util.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mue.lab.models.output import Output

Batch = tuple["Tensor", ...]
"""Tensors on the CPU, all with the examples first; what they are is between a task's ``batches`` and its ``loss``."""


class TaskBatches(Protocol):
    """What a run reads."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that go through the model in a step: what the metrics count."""

    def at(self, step: int) -> Batch:
        """The training batch of a step, counted from 0: a function of the run's seed and of ``step`` alone.

        Nothing is remembered between calls. A resumed run reads what it would have read, and a stack draws a batch once for all its runs of
        one seed.
        """

    def validation(self) -> list[Batch]:
        """The batches that a validation reads: the same for every run, whatever its seed."""


class Task(ABC):
    """A problem that the lab trains models on. It has no state: what a run has, it is given.

    Attributes:
        unit: of its loss, as reports and axes say it.
        reads: the kind of data it is trained on: ``Corpus.kind`` ("text") or ``ImageSet.kind`` ("images").
        stackable: what :meth:`build` makes broadcasts over a leading axis of variants in weights and inputs, and :meth:`loss` then gives one
            loss for each (``mue.lab.train.stacked_session``). Otherwise its runs are trained in processes of their own.
    """

    unit: ClassVar[str]
    reads: ClassVar[str] = Corpus.kind
    stackable: ClassVar[bool] = False

    @abstractmethod
    def build(self, plan: PlanData, settings: Settings) -> nn.Module:
        """The model of ``plan.target``, with the plan's forward multipliers; the session initialises it by the plan.

        Its parameters have to be known to the plan: by a ``layout`` method, or as ``mue inspect`` finds them. Blocks with experts are
        ``mue.moe.MoELayer``, wherever they stand.

        Args:
            plan: of the run. settings: what a model may need beyond it (how experts are balanced, the seed of random
                routers).
        """

    def batches_of(self, run: Run, corpus: Data) -> TaskBatches:
        """:meth:`batches` of data that are of the kind that the task reads; ``ValueError`` where they are of another."""
        if corpus.kind != self.reads:
            raise ValueError(
                f"the task {run.settings.task} reads {self.reads}, and the data are {corpus.kind}: take another [run] task or [data] source"
            )
        return self.batches(run, corpus)

    @abstractmethod
    def batches(self, run: Run, corpus: Any) -> TaskBatches:
        """What ``run`` reads of ``corpus``. It is asked before a folder is made, so nothing may be written.

        Args:
            corpus: of the type that :attr:`reads` names, a :class:`~mue.lab.data.corpus.Corpus` or an
                :class:`~mue.lab.data.images.ImageSet`.

        Raises:
            ValueError: the run's shape, batch or data do not suit the task; the text names the fix.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Output:
        """A forward pass.

        Args:
            model: as :meth:`build` made it, or a stack of such. batch: on the model's device; of a stack with a leading
                axis of variants.

        Returns:
            With ``loss`` the mean over the batch, in :attr:`unit`, a scalar; of a stack of V variants (V,).
        """

    def tokens(self, batch: Batch) -> Tensor | None:
        """The id of the token at each place that the model routes, in the order in which it does; None where a place is no token.

        What the reports then say of experts by classes of tokens needs no more.
        """
        return None

    def watch(self, model: nn.Module) -> dict[str, Any]:
        """What a row of metrics keeps of a model on its way beside the loss, as JSON; asked at each validation of a run that has some.

        Args:
            model: in eval mode, without gradients.
        """
        return {}

    def at_end(self, model: nn.Module, batches: TaskBatches) -> dict[str, Any] | None:
        """What a run keeps of its trained model in ``task.json``, as JSON; None: nothing.

        Args:
            model: as of :meth:`watch`. batches: what the run read.
        """
        return None

    @abstractmethod
    def baseline_loss(self, shape: Transformer) -> float:
        """The loss of guessing: a run that ends above it has learnt nothing."""


TASKS: Registry[type[Task]] = Registry("task", home="mue.lab.tasks")


def task_of(settings: Settings) -> Task:
    """The task that ``settings`` name; ``ValueError`` with the nearest known name for one that nobody registered."""
    return TASKS.lookup(settings.task)()


def write_of_task(folder: Path, found: dict[str, Any] | None) -> None:
    """Write what :meth:`Task.at_end` gives into a run's folder, atomically; nothing where it is nothing."""
    if found is not None:
        write_text(folder / TASK_FILE, json.dumps(found, separators=(",", ":")) + "\n")
