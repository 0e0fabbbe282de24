"""What a model predicts of text: loss per token and per byte, next-token accuracy, each with an interval over sequences.

Every window begins without a past, as in training, so that its first tokens are predicted from little. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.lab.trained.held_out import Windows
from mue.util.statistics import Mean, mean_of

Logits = Callable[[Tensor], Tensor]
"""From tokens (B, T) to logits (B, T, V)."""


@dataclass(frozen=True)
class TextScores:
    """A model's predictions of some windows: sums over each window's tokens.

    Attributes:
        nats: the cross-entropy. tokens: how many. correct: how many were the likeliest. bytes: that the tokens stand for; None
            where nobody knows.
    """

    nats: tuple[float, ...]
    tokens: tuple[float, ...]
    correct: tuple[float, ...]
    bytes: tuple[float, ...] | None

    @property
    def per_token(self) -> Mean:
        """Nats per token."""
        return mean_of(self.nats, self.tokens)

    @property
    def per_byte(self) -> Mean | None:
        """Nats per byte of UTF-8: it compares models whatever their tokens are."""
        return None if self.bytes is None else mean_of(self.nats, self.bytes)

    @property
    def accuracy(self) -> Mean:
        """Share of the tokens that were the likeliest."""
        return mean_of(self.correct, self.tokens)

    def above(self, other: TextScores) -> Mean:
        """The loss over that of another model on the same windows, sequence by sequence: per byte, or per token where nobody knows bytes.

        What makes a text easy or hard is common to both, so that this interval is far narrower than either's.
        """
        difference = [a - b for a, b in zip(self.nats, other.nats, strict=True)]
        return mean_of(difference, self.bytes or self.tokens)

    @property
    def loss(self) -> Mean:
        """Per byte, or per token where nobody knows bytes."""
        return self.per_byte or self.per_token

    def to_dict(self) -> dict[str, Any]:
        """For JSON; each value with its interval's ends."""
        return {
            "sequences": len(self.nats),
            "tokens": int(sum(self.tokens)),
            "bytes": None if self.bytes is None else int(sum(self.bytes)),
            "nats_per_token": self.per_token.to_list(),
            "nats_per_byte": None if self.per_byte is None else self.per_byte.to_list(),
            "accuracy": self.accuracy.to_list(),
        }


@torch.no_grad()
def score(logits: Logits, windows: Windows, bytes_of: Sequence[int] | None) -> TextScores:
    """Ask a model about windows.

    Args:
        logits: of the model. windows: what to predict. bytes_of: how many bytes each token stands for; None: nobody knows.

    Raises:
        ValueError: losses that are not finite, as of a run that diverged; a token that ``bytes_of`` does not have.
    """
    sums: dict[str, list[float]] = {"nats": [], "tokens": [], "correct": [], "bytes": []}
    table = None if bytes_of is None else torch.tensor(bytes_of)
    for tokens_BT, following_BT in windows:
        if table is not None and (largest := int(following_BT.max())) >= len(table):
            raise ValueError(
                f"there is token {largest} in the text, and the tokenizer has {len(table)}: it is another than the text's"
            )
        logits_BTV = logits(tokens_BT).float().cpu()
        each_BT = F.cross_entropy(logits_BTV.mT, following_BT, reduction="none")
        if not bool(torch.isfinite(each_BT).all()):
            raise ValueError("the model's loss is not finite: its run diverged")
        sums["nats"] += each_BT.double().sum(1).tolist()
        sums["tokens"] += [float(tokens_BT.shape[1])] * len(tokens_BT)
        sums["correct"] += (logits_BTV.argmax(-1) == following_BT).sum(1).tolist()
        sums["bytes"] += [] if table is None else table[following_BT].sum(1).tolist()
    found = {name: tuple(map(float, values)) for name, values in sums.items()}
    return TextScores(found["nats"], found["tokens"], found["correct"], None if table is None else found["bytes"])
