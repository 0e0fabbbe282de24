"""Language modelling: predict each token of the text from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mue.lab.data import Batches, Corpus
from mue.lab.train.run import Run, Settings
from mue.lab.train.task import TASKS, Batch, Task
from mue.plan.plan import PlanData
from mue.shapes import Transformer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mue.lab.models.output import Output


@TASKS.register("language", place=0)
class LanguageTask(Task):
    """Next-token prediction on a corpus, with the lab's decoder. A batch is (tokens (B, T), the tokens that follow (B, T))."""

    unit: ClassVar[str] = "nats per token"
    stackable: ClassVar[bool] = True

    def build(self, plan: PlanData, settings: Settings) -> nn.Module:
        from mue.lab.models.language import LanguageModel

        return LanguageModel(
            plan.target,
            plan.multipliers,
            balance=settings.balance,  # type: ignore[arg-type]
            z_loss=plan.tuned.z > 0,
            consistency=settings.consistency > 0,
            seed=settings.seed,
        )

    def batches(self, run: Run, corpus: Corpus) -> WindowBatches:
        return text_windows(run, corpus)

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        output: Output = model(*batch)
        return output

    def tokens(self, batch: Batch) -> Tensor:
        return batch[0]

    def baseline_loss(self, shape: Transformer) -> float:
        return math.log(shape.vocab)  # of giving each token the same probability


@dataclass(frozen=True)
class WindowBatches:
    """Windows of a corpus: for training in an order drawn by the run's seed, for validation spread over the whole split.

    Attributes:
        train, held_out: of the two splits. validations: how many batches a validation reads, at most.
    """

    train: Batches
    held_out: Batches
    validations: int

    @property
    def tokens_per_step(self) -> int:
        return self.train.tokens_per_step

    def at(self, step: int) -> Batch:
        return self.train.at(step)

    def validation(self) -> list[Batch]:
        return list(self.held_out.fixed(self.validations))


def text_windows(run: Run, corpus: Corpus) -> WindowBatches:
    """The windows of ``run.plan.target.sequence`` tokens that a run on text reads, as many in a step as its batch has tokens for.

    Args:
        run: its seed orders the windows. corpus: the text.

    Raises:
        ValueError: the text has more tokens than the model, or is shorter than a window.
    """
    shape, settings = run.plan.target, run.settings
    assert run.plan.training is not None
    if corpus.vocab > shape.vocab:
        raise ValueError(f"the data has {corpus.vocab} tokens, the model a vocabulary of {shape.vocab}: raise vocab")
    sequences = run.plan.training.batch // shape.sequence
    held = min(sequences, settings.eval_sequences)
    return WindowBatches(
        train=Batches(corpus, "train", shape.sequence, sequences, settings.seed),
        held_out=Batches(corpus, "validation", shape.sequence, held, 0),  # the same windows for every seed
        validations=max(1, settings.eval_sequences // held),
    )
