"""``mue export-weights``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mue.cli.app import Tokenizer, Trained, app

FORMATS = ("transformers",)


@app.command("export-weights")
def export_weights(
    run: Trained,
    to: Annotated[str, typer.Option("--to", help="transformers.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.", show_default=False)],
    tokenizer: Tokenizer = None,
) -> None:
    """Write a trained run's weights as a checkpoint of another library, whose own code then computes the same logits.

    With --to transformers: Qwen3 for dense models, Qwen3-MoE for softmax routers, LFM2-MoE or, with shared experts, GLM-4-MoE for sigmoid
    routers (balance biases with them), in float32 safetensors, with the run's tokenizer. Multipliers are folded into the weights. What was written is read
    back and its logits compared before the folder gets its name; a run that no stock family computes is refused, with what differs.

    \b
    [bold]Example[/]
      mue export-weights runs/demo --to transformers -o demo-hf
      python -c 'from transformers import pipeline; print(pipeline("text-generation", "demo-hf")("def fib("))'
    """
    from mue.util.errors import nearest

    if to not in FORMATS:
        raise ValueError(f"--to {to!r} is none that weights are written for{nearest(to, FORMATS)}")
    if out.exists():
        raise ValueError(f"{out} exists already: give --out a name that is free")
    from mue.lab.trained.find import find
    from mue.lab.trained.to_transformers import to_transformers
    from mue.lab.trained.tokens import tokens_of

    found = find(run)
    words = tokens_of(found.run.data, tokenizer)
    family, apart = to_transformers(found, words, out)
    print(f"{out}: {found.name}, as {family}; its logits are ours but for {apart:.1g} of their spread")
    if words is None:
        print(
            f"  no tokenizer: the run read tokens made elsewhere ({found.run.data['tokenizer']}); give it with --tokenizer"
        )
