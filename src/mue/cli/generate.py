"""``mue generate``."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from mue.cli.app import Tokenizer, Trained, app


@app.command()
def generate(
    run: Trained,
    prompt: Annotated[str, typer.Argument(help="The text that it goes on from; may be empty.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="How many tokens to draw, at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="Below 1 likelier tokens are drawn more often; 0 takes the likeliest.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens that together have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    tokenizer: Tokenizer = None,
) -> None:
    """Let a trained model write on, token by token as they are drawn, to the end of a text or so many tokens.

    Where a model's answer to one new token is that to the whole text (all but routers that look at other tokens, or draw), only new tokens
    are computed. A text that outgrows the sequence it was trained on goes on from its later half.

    \b
    [bold]Examples[/]
      mue generate runs/demo "def fib("
      mue generate runs/train/runs/190d621c6abf3a31 "import " --temperature 0.9 --top-p 0.95 --seed 1
      mue generate runs/s/runs/KEY/checkpoint.safetensors "The "     # a run under way
    """
    from mue.lab.models.language import LanguageModel
    from mue.lab.trained.find import find
    from mue.lab.trained.generate import Drawing, continued
    from mue.lab.trained.tokens import tokens_of

    drawing = Drawing(temperature, top_p, seed)
    found = find(run)
    words = tokens_of(found.run.data, tokenizer)
    if words is None:
        raise ValueError(
            f"{run} was trained on tokens made elsewhere ({found.run.data['tokenizer']}): name their tokenizer with --tokenizer"
        )
    model = found.model()
    if not isinstance(model, LanguageModel):
        raise ValueError(f"{run} learnt the task {found.run.settings.task!r}: only language models write")
    print(found.name, file=sys.stderr)
    pieces, started, count = continued(model, words, prompt, tokens, drawing), time.monotonic(), 0
    print(prompt, end="", flush=True)
    for piece in pieces:
        # what a model draws may hold anything: a terminal's control characters are shown, not obeyed
        print("".join(c if c.isprintable() or c in "\n\t" else "�" for c in piece), end="", flush=True)
        count += 1
    print(flush=True)
    print(f"{count} tokens, {count / max(time.monotonic() - started, 1e-9):,.0f} a second", file=sys.stderr)
