"""``mue sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mue.cli.app import Ema, Trained, app, say_paths
from mue.lab.models.sampling import Sampling


@app.command()
def sample(
    run: Trained,
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path("samples.png"),
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="A class to draw; may be repeated \\[default: all].", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Images of each class, of seeds 0, 1, 2 …")] = 8,
    guidance: Annotated[
        float,
        typer.Option(help="1 is the model's own; more is surer of the class and less various; 0 asks for no class."),
    ] = Sampling.guidance,
    steps: Annotated[int, typer.Option(min=1, help="From noise to image.")] = Sampling.steps,
    sampler: Annotated[str, typer.Option(help="heun, or euler with half the passes a step.")] = Sampling.sampler,
    ema: Ema = None,
) -> None:
    """Draw images from a trained diffusion model, as a PNG: a column a class, a row a seed.

    Images of a row begin as the same noise. An image depends on its class, its seed and how it is drawn, and not on what is drawn beside it.

    \b
    [bold]Examples[/]
      mue sample runs/diffusion
      mue sample runs/train/runs/190d621c6abf3a31 --class 3 --class 5 --seeds 16 --guidance 2
      mue sample weights/ --sampler euler --steps 100     # of mue export-weights --to mue
    """
    from mue.lab.models.draw import draw
    from mue.lab.report.grids import grid, write_png
    from mue.lab.trained.find import find
    from mue.lab.trained.images.sample import classes_named, model_of
    from mue.lab.trained.weights import with_average

    way = Sampling(guidance, steps, sampler)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: images are written as PNG, so give --out a name that ends in .png")
    found, weights = with_average(find(run), ema)
    model = model_of(found)
    wanted = classes_named(found, classes or [])
    images = draw(model, list(wanted.values()) * seeds, [seed for seed in range(seeds) for _ in wanted], way)
    write_png(out, grid(images, len(wanted)))
    console = Console()
    say_paths(
        console, f"{found.name}, {weights}", f"columns: {', '.join(wanted)}; rows: seeds 0 to {seeds - 1}", f"{out}"
    )
