"""Order: say what was done to a window of bytes. A tiny classification task, learnt in minutes, that is not language modelling.

Shape suffixes: B windows, T tokens of a window.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mue.lab.data import Corpus
from mue.lab.tasks.language import LanguageTask, WindowBatches, text_windows
from mue.lab.train.run import Run
from mue.lab.train.task import TASKS, Batch
from mue.shapes import Transformer

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = ("in order", "reversed", "halves swapped", "shuffled")
SHORTEST = 8  # tokens: below, too many windows look the same whatever was done to them


@TASKS.register("order")
class OrderTask(LanguageTask):
    """Which of :data:`CLASSES` a window is, read off the last position, where a causal decoder has seen all of it.

    A batch is (windows (B, T), classes (B, 1)). A class is predicted as the token of its number, so that the decoder of the language task serves
    as it is, and with it its stacks. The kinds are not equally hard: a shuffled window shows in every pair of neighbours, a swapped one at
    a single seam.
    """

    unit: ClassVar[str] = "nats per window"

    def batches(self, run: Run, corpus: Corpus) -> OrderBatches:  # type: ignore[override]
        shape = run.plan.target
        for name, least in (("sequence", SHORTEST), ("vocab", len(CLASSES))):
            if (value := getattr(shape, name)) < least:
                raise ValueError(f"the task order needs {name} of at least {least}, got {value}: raise it")
        return OrderBatches(text_windows(run, corpus), run.settings.seed)

    def baseline_loss(self, shape: Transformer) -> float:
        return math.log(len(CLASSES))


@dataclass(frozen=True)
class OrderBatches:
    """Windows of a corpus, each in an order drawn by (seed, step).

    Attributes:
        windows: of the text as it stands.
    """

    windows: WindowBatches
    seed: int

    @property
    def tokens_per_step(self) -> int:
        return self.windows.tokens_per_step

    def at(self, step: int) -> Batch:
        return reordered(self.windows.at(step)[0], f"train {self.seed} {step}")

    def validation(self) -> list[Batch]:
        return [reordered(batch[0], f"validation {i}") for i, batch in enumerate(self.windows.validation())]


def reordered(window_BT: Tensor, draw: str) -> tuple[Tensor, Tensor]:
    """Put each window into an order of a class drawn for it.

    Args:
        window_BT: tokens. draw: names the draw: what comes out is a function of the two alone.

    Returns:
        The windows (B, T) in their new order, and their classes (B, 1).
    """
    import torch

    number = hashlib.blake2b(f"order {draw}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)
    B, T = window_BT.shape
    class_B1 = torch.randint(len(CLASSES), (B, 1), generator=generator)
    here_T = torch.arange(T)
    shuffled_BT = torch.rand(B, T, generator=generator).argsort(1)
    fixed = here_T, here_T.flip(0), here_T.roll(T // 2)
    order_CBT = torch.stack([*(order_T.expand(B, T) for order_T in fixed), shuffled_BT])
    order_BT = order_CBT.gather(0, class_B1.expand(B, T)[None])[0]
    return window_BT.gather(1, order_BT), class_B1
