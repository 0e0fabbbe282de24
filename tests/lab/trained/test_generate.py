"""mue.lab.trained.generate: one token at a time is the whole text, draws follow their settings, and long texts go on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.models.language import LanguageModel
from mue.lab.trained.find import find
from mue.lab.trained.generate import Drawing, NextLogits, continued, generate
from mue.lab.trained.tokens import tokens_of

SHAPES = {
    "dense": mue.Dense(32, 64, 2, head_dim=16, kv_heads=1, sequence=24),
    "sigmoid": mue.MoE.parse("8e2a1s", width=32, expert=16, layers=2, head_dim=16, sequence=24),
    "hash": mue.MoE.parse("8e2a", width=32, expert=16, layers=2, head_dim=16, sequence=24, router="hash"),
    "random": mue.MoE.parse("8e2a", width=32, expert=16, layers=2, head_dim=16, sequence=24, router="random"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_one_token_at_a_time_is_the_whole_text(kind: str) -> None:
    """Where a token's experts depend on the other tokens or on its place, that is seen, and the whole text is computed."""
    model = LanguageModel(SHAPES[kind]).eval()
    logits = NextLogits(model)
    assert logits.one_by_one == (kind != "random")
    text = [5, 9, 250, 3]
    after_V = logits.after(text)
    for token in (7, 8, 200, 7, 7):
        text.append(token)
        after_V = logits.after([token])
    with torch.no_grad():
        whole_V = model(torch.tensor([text])).logits[0, -1]
    torch.testing.assert_close(after_V, whole_V, rtol=1e-4, atol=1e-5)


def test_several_tokens_after_others_are_refused() -> None:
    model = LanguageModel(SHAPES["dense"]).eval()
    past = model.no_past()
    model(torch.tensor([[1, 2, 3]]), past=past)
    with pytest.raises(ValueError, match="2 tokens after 3: give one at a time"):
        model(torch.tensor([[4, 5]]), past=past)
    with pytest.raises(ValueError, match="sequence of 25 tokens"):
        model(torch.zeros(1, 22, dtype=torch.int64), past=past)


def test_a_text_that_outgrows_the_sequence_goes_on_from_its_later_half() -> None:
    model = LanguageModel(SHAPES["dense"]).eval()
    logits = NextLogits(model)
    text = [i * 7 % 256 for i in range(24)]
    logits.after(text)
    after_V = logits.after([99])
    assert logits.text == [*text, 99][-12:] and len(logits.past[0]) == 12
    with torch.no_grad():
        torch.testing.assert_close(after_V, model(torch.tensor([logits.text])).logits[0, -1], rtol=1e-4, atol=1e-5)
    drawn = list(generate(model, [1] * 100, 60, Drawing(seed=1)))
    assert len(drawn) == 60


def test_draws_follow_temperature_top_p_and_seed() -> None:
    logits_V = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))

    def shares(drawing: Drawing, draws: int = 4000) -> torch.Tensor:
        generator = torch.Generator().manual_seed(drawing.seed)
        found = torch.tensor([drawing.next_token(logits_V, generator) for _ in range(draws)])
        return torch.bincount(found, minlength=4) / draws

    # three standard errors of a share of 4000 draws are 0.024
    torch.testing.assert_close(shares(Drawing(1.0)), logits_V.exp(), rtol=0, atol=0.024)
    squared = logits_V.exp().square()
    torch.testing.assert_close(shares(Drawing(0.5)), squared / squared.sum(), rtol=0, atol=0.024)
    torch.testing.assert_close(shares(Drawing(1.0, top_p=0.8)), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.024)
    torch.testing.assert_close(
        shares(Drawing(1.0, top_p=0.81)), torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, rtol=0, atol=0.024
    )
    assert shares(Drawing(0.0), 10)[0] == shares(Drawing(1.0, top_p=1e-9), 10)[0] == 1
    model = LanguageModel(SHAPES["dense"]).eval()
    first, again, other = (list(generate(model, [1], 20, Drawing(1.0, seed=s))) for s in (3, 3, 4))
    assert first == again != other


def test_what_cannot_be_drawn() -> None:
    model = LanguageModel(SHAPES["dense"])
    nothing = torch.full((4,), float("nan"))
    for make, words in (
        (lambda: Drawing().next_token(nothing, torch.Generator()), "its run diverged"),
        (lambda: Drawing(-0.1), "temperature"),
        (lambda: Drawing(top_p=0.0), "top-p"),
        (lambda: Drawing(top_p=1.1), "top-p is a probability"),
        (lambda: Drawing(seed=-1), "seed must be a whole number"),
        (lambda: generate(model, [], 3, Drawing()), "a prompt needs tokens"),
        (lambda: generate(model, [256], 3, Drawing()), "vocabulary of 256"),
        (lambda: generate(model, [1], 0, Drawing()), "tokens must be"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.parametrize("which", ["moe_run", "dense_run"])
def test_a_trained_model_writes_like_its_text(which: str, request: pytest.FixtureRequest) -> None:
    """Text streams: a piece is there before the next is asked for. After 20 steps blanks are frequent, as in the code it read."""
    found = find(request.getfixturevalue(which))
    model, tokens = found.model(), tokens_of(found.run.data)
    assert isinstance(model, LanguageModel) and tokens is not None
    pieces = continued(model, tokens, "def fib(", 120, Drawing(0.7), whole=True)
    first = list(islice(pieces, 5))
    text = "".join([*first, *pieces])
    assert len(first) == 5 and text.count(" ") > 5


def test_what_is_drawn_goes_on_from_the_prompt(moe_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's tokens are known to the decoder: else many tokenizers would write the first word without its blank."""
    found = find(moe_run)
    model, tokens = found.model(), tokens_of(found.run.data)
    assert isinstance(model, LanguageModel) and tokens is not None
    seen: list[list[int]] = []
    real = tokens.decoder
    monkeypatch.setattr(tokens, "decoder", lambda after=(): (seen.append(list(after)), real(after))[1])
    list(continued(model, tokens, "def", 2, Drawing()))
    assert seen == [[100, 101, 102]]


def test_a_text_ends_where_a_document_does(moe_run: Path) -> None:
    found = find(moe_run)
    model, tokens = found.model(), tokens_of(found.run.data)
    assert isinstance(model, LanguageModel) and tokens is not None and tokens.separator == 0
    with torch.no_grad():
        model.head.weight[0] = 0
        model.final_norm.weight.zero_()  # every token is as likely: 1/256
    drawn = list(generate(model, [65], 5000, Drawing(1.0), end=0))
    assert drawn[-1] == 0 and 0 not in drawn[:-1] and len(drawn) < 5000
    assert len(list(continued(model, tokens, "A", 5000, Drawing(1.0)))) == len(drawn) - 1
