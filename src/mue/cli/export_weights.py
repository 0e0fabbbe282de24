"""``mue export-weights``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mue.cli.app import Ema, Tokenizer, Trained, app

FORMATS = ("transformers", "mue")


@app.command("export-weights")
def export_weights(
    run: Trained,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="transformers, or mue: what mue sample, generate and eval read, and no more.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.", show_default=False)],
    tokenizer: Tokenizer = None,
    ema: Ema = None,
) -> None:
    """Write a trained run's weights for use elsewhere: as a checkpoint of another library, whose own code then computes the same logits, or as they are.

    With --to transformers: Qwen3 for dense models, Qwen3-MoE for softmax routers, LFM2-MoE or, with shared experts, GLM-4-MoE for sigmoid
    routers (balance biases with them), in float32 safetensors, with the run's tokenizer. Multipliers are folded into the weights. What was written is read
    back and its logits compared before the folder gets its name; a run that no stock family computes is refused, with what differs.
    With --to mue: the run's config.json and model.safetensors, of any task, the average of its weights that --ema asks for.

    \b
    [bold]Examples[/]
      mue export-weights runs/diffusion --to mue -o weights
      mue export-weights runs/demo --to transformers -o demo-hf
      python -c 'from transformers import pipeline; print(pipeline("text-generation", "demo-hf")("def fib("))'
    """
    from mue.util.errors import nearest

    if to not in FORMATS:
        raise ValueError(f"--to {to!r} is none that weights are written for{nearest(to, FORMATS)}")
    if to == "mue" and tokenizer is not None:
        raise ValueError("--tokenizer is for --to transformers: leave it out")
    if out.exists():
        raise ValueError(f"{out} exists already: give --out a name that is free")
    from mue.lab.trained.find import find
    from mue.lab.trained.to_transformers import to_transformers
    from mue.lab.trained.tokens import tokens_of
    from mue.lab.trained.weights import export_weights as as_they_are
    from mue.lab.trained.weights import with_average

    found = find(run)
    if to == "mue":
        found, weights = with_average(found, ema)
        as_they_are(found, weights, out)
        print(f"{out}: {found.name}, {weights}")
        return
    if ema is not None:
        raise ValueError("--ema is for --to mue: leave it out")
    words = tokens_of(found.run.data, tokenizer)
    family, apart = to_transformers(found, words, out)
    print(f"{out}: {found.name}, as {family}; its logits are ours but for {apart:.1g} of their spread")
    if words is None:
        print(
            f"  no tokenizer: the run read tokens made elsewhere ({found.run.data['tokenizer']}); give it with --tokenizer"
        )
