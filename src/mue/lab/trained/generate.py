"""Text drawn from a language model, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mue.lab.models.language import LanguageModel
from mue.lab.trained.tokens import TextTokens
from mue.util.errors import positive, positive_int

_PROBE = 64  # tokens on which computing one at a time is tried


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
        temperature: below 1 likelier tokens are drawn more often; 0 takes the likeliest. top_p: of the likeliest tokens that together have
            this probability (nucleus sampling, 1904.09751). seed: of the draws.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive("temperature", self.temperature, zero=True)
        if positive("top-p", self.top_p) > 1:
            raise ValueError(f"top-p is a probability, above 0 and at most 1, got {self.top_p:g}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")

    def next_token(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """One draw from a model's logits (V,); ``ValueError`` where they are none, as of a run that diverged."""
        logits_V = logits_V.float()
        if not bool(torch.isfinite(logits_V).all()):
            raise ValueError("the model's logits are not finite, so that nothing can be drawn: its run diverged")
        if self.temperature == 0:
            return int(logits_V.argmax())
        chances_V = torch.softmax(logits_V / self.temperature, dim=-1)
        if self.top_p < 1:
            falling_V, order_V = chances_V.sort(descending=True)
            # a token stays while those before it have less than top_p: the likeliest always does
            falling_V = falling_V.masked_fill(falling_V.cumsum(0) - falling_V >= self.top_p, 0.0)
            chances_V = torch.zeros_like(chances_V).scatter_(0, order_V, falling_V)
        return int(torch.multinomial(chances_V, 1, generator=generator))


class NextLogits:
    """The logits of what follows a growing text, computed for the new token alone where that gives the same as the whole text.

    It is tried, not known: a router that chooses by the other tokens of a batch, or by a token's place in it, gives another answer to one
    token than to the same among others. Where the text outgrows the longest sequence that was trained, its later half goes on.

    Args:
        model: in eval mode.

    Attributes:
        one_by_one: whether only new tokens are computed.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.window = model, model.shape.sequence
        self.text: list[int] = []
        self.past = model.no_past()
        self.one_by_one = self._same_one_by_one()

    @torch.no_grad()
    def after(self, tokens: Sequence[int]) -> Tensor:
        """The logits (V,) after the text so far and these tokens."""
        self.text += tokens
        if len(self.text) > self.window:
            self.text = self.text[-max(1, self.window // 2) :]
            self.past = self.model.no_past()
        if not self.one_by_one:
            return self._logits(self.text)
        if len(self.past[0]) == 0:
            return self._logits(self.text, past=self.past)
        logits_V = torch.empty(0)
        for token in self.text[len(self.past[0]) :]:
            logits_V = self._logits([token], past=self.past)
        return logits_V

    def _logits(self, tokens: Sequence[int], **more: Any) -> Tensor:
        place = self.model.head.weight.device
        found: Tensor = self.model(torch.tensor([list(tokens)], device=place), **more).logits
        return found[0, -1]

    @torch.no_grad()
    def _same_one_by_one(self) -> bool:
        length = min(_PROBE, self.window)
        if length < 2:
            return False
        # other tokens beside each other, and the same ones whatever the vocabulary
        probe = [(37 * i + 11) % self.model.shape.vocab for i in range(length)]
        past = self.model.no_past()
        self._logits(probe[:-1], past=past)
        alone, among = self._logits(probe[-1:], past=past), self._logits(probe)
        # far beyond rounding, and far below what another expert changes
        return bool((alone - among).abs().max() <= 1e-3 * among.std())


def generate(
    model: LanguageModel, prompt: Sequence[int], length: int, drawing: Drawing, *, end: int | None = None
) -> Iterator[int]:
    """Draw a continuation, one token after another, as they are asked for.

    Args:
        model: in eval mode. prompt: the tokens it goes on from, at least one. length: how many to draw, at most.
        end: the token that ends a text: drawn, it is given and nothing after it.

    Raises:
        ValueError: a length below 1, or tokens that the model does not have.
    """
    length, vocab = positive_int("tokens", length), model.shape.vocab
    if not prompt or max(prompt) >= vocab:
        raise ValueError(f"a prompt needs tokens, all below the model's vocabulary of {vocab}, got {list(prompt)[:4]}")
    return _drawn(NextLogits(model), prompt, length, drawing, end)


def _drawn(logits: NextLogits, tokens: Sequence[int], length: int, drawing: Drawing, end: int | None) -> Iterator[int]:
    generator = torch.Generator().manual_seed(drawing.seed)
    for _ in range(length):
        token = drawing.next_token(logits.after(tokens).cpu(), generator)
        yield token
        if token == end:
            return
        tokens = [token]


def continued(
    model: LanguageModel, tokens: TextTokens, prompt: str, length: int, drawing: Drawing, *, whole: bool = False
) -> Iterator[str]:
    """The continuation of a text as text, in pieces, as soon as each is known.

    Args:
        prompt: the text's beginning. length: tokens to draw, at most; a token between documents ends it.
        whole: go on behind such a token.
    """
    end = None if whole else tokens.separator
    before = tokens.encode(prompt)
    drawn = generate(model, before, length, drawing, end=end)
    decode = tokens.decoder(before)
    return (decode(token) for token in drawn if token != end)
