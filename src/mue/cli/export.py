"""``mue export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mue.cli.app import app
from mue.cli.files import Set, read_plan
from mue.cli.terminal import print_file


@app.command()
def export(
    plan: Annotated[Path, typer.Argument(help="A plan: JSON that was saved, or a TOML file.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="torch (own loop, Accelerate), transformers (Trainer), automodel (NeMo), torchtitan, megatron, olmo-core, optax (JAX);"
            " or a stack of a package of yours. An unknown name lists them all.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="file.py:function or module:function that builds it; a transformers config or family; for torchtitan, megatron and"
            " olmo-core one of their own models by name (default: the plan's shape in the stack's first model); for optax a function"
            " that returns rows (path, role, axes), or nnx, linen or equinox.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of printing.")] = None,
    change: Set = None,
) -> None:
    """Write a plan in another stack's own words: groups, init and route scale; nothing of mue is needed to use the file.

    Every multiplier is folded into the values, so the stack's forward code stays as it is. What the stack cannot say stands
    in the file's head, with what to do about it. Without --model no stack has to be installed: the plan's shape is written
    in the stack's names (torchtitan: qwen3, llama3, both with _unfused; megatron: te, local; olmo-core: moe, moe_dropless,
    moe_fused_v2), for torch in those of the lab's model, for transformers and automodel in those of qwen3, qwen3_moe, lfm2_moe or glm4_moe.
    The file for optax finds a pytree's arrays by rows of paths: yours, or examples in the style of nnx, linen or equinox.

    \b
    [bold]Examples[/]
      mue plan plan.toml --save plan.json
      mue export plan.json --to torchtitan --out recipe.py
      mue export plan.json --to megatron --model local
      mue export plan.json --to transformers --model config.json
      mue export plan.toml --to olmo-core --model train.py:build   # your own model of that stack
      mue export plan.json --to optax --model train.py:rows --out recipe.py
    """
    from mue.cli.user_model import exported
    from mue.export import export as written
    from mue.plan.fold import unfold
    from mue.util.files import write_text

    made = read_plan(plan, change)
    text = written(made, to, None if model is None else exported(model, made))
    if out is None:
        print_file(text)
    else:
        write_text(out, text)
        print(f"{out}: plan {unfold(made).hash} for {to}")
