"""``mue convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mue.cli.app import app
from mue.cli.files import Set, read_plan


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A file (safetensors, torch.save) or a folder of them.", show_default=False)
    ],
    plan: Annotated[Path, typer.Option("--plan", help="The plan it was trained under.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="folded, or multipliers.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.", show_default=False)],
    model: Annotated[
        str,
        typer.Option("--model", help="file.py:function or module:function that builds the model, if it is your own."),
    ] = "",
    route: Annotated[
        str, typer.Option("--route", help="Who carries R when folded: weights, or model (its own route scale).")
    ] = "weights",
    change: Set = None,
) -> None:
    """Carry a checkpoint, weights and optimizer state, from the form with forward multipliers to the folded one, or back.

    Training goes on in the other form as if nothing had happened: with stock forward code and the groups of
    mue.fold.fold(plan), or with the plan's multipliers and its own groups. Safetensors are streamed, so a model that does
    not fit into memory converts too; other files of a folder are copied, its config gets the route and attention scale of
    the new form. The form is marked in what is written: converting twice, or under another plan, is an error.

    A folder with a config.json is a transformers model. Otherwise the model is the lab's, or --model's.

    \b
    [bold]Examples[/]
      mue convert out/checkpoint-1000 --plan plan.json --to folded --out stock       # Hugging Face Trainer's folder
      mue convert runs/a/checkpoint.safetensors --plan plan.json --to folded -o a.safetensors
      mue convert state.pt --plan plan.json --to multipliers -o back.pt --model train.py:build
    """
    import torch

    from mue.cli.user_model import arguments
    from mue.convert.checkpoint import convert_checkpoint
    from mue.convert.forms import conversion

    made = read_plan(plan, change)
    if checkpoint.is_dir() and (checkpoint / "config.json").exists() and not model:
        from mue.convert.transformers import stock_conversion

        how, names, config = stock_conversion(checkpoint, made, to, route)
        report = convert_checkpoint(checkpoint, out, how, names, config)
    else:
        from mue.fold import unfold
        from mue.lab.models.language import LanguageModel

        with torch.device("meta"):  # only its names and shapes are asked for
            own = arguments(model, made)["model"] if model else LanguageModel(made.target, unfold(made).multipliers)
        how = conversion(made, to, own, route)
        report = convert_checkpoint(checkpoint, out, how)
    print(f"{out}: plan {how.source.hash} → {how.target.hash}, {how.form}; {report.changed} stored weights scaled")
    for kind, files in (("converted", report.converted), ("copied as they are", report.copied)):
        if files:
            more = f" and {len(files) - 4} more" if len(files) > 5 else ""
            print(f"  {kind}: {', '.join(files[: 4 if more else 5])}{more}")
