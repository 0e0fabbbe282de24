"""What the commands share: the app, the options they have in common, and the words they say alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

from mue.util.errors import extra

try:
    import typer
    from rich.console import Console
    from typer.core import TyperCommand
except ImportError:  # pragma: no cover - the message is the point
    sys.exit(f"the mue command needs the lab extra: {extra('lab')}")


class WithNames(TyperCommand):
    """A command in whose help ``{rules}`` and ``{tasks}`` stand for the names of those there are.

    They are looked up when the help is shown and not before: to list what other packages registered is to import them, and a
    package that is broken would break every command.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown: list[Any] = [self, *self.params]
        for one in shown:
            one.help = _with_names(one.help or "")
        super().format_help(ctx, formatter)


def _with_names(text: str) -> str:
    if "{rules}" in text:
        from mue.rules import RULES

        text = text.replace("{rules}", ", ".join(RULES))
    if "{tasks}" in text:
        from mue.lab.train.task import TASKS

        text = text.replace("{tasks}", " | ".join(f'"{name}"' for name in TASKS))
    return text


app = typer.Typer(
    name="mue",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from mue import __version__

        print(f"mue {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tune one small dense transformer, train any Mixture-of-Experts with the hyperparameters that follow from it."""


Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for runs and results; rerun with the same to go on.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "-w", min=1, help="Training processes at once (default: one for each core).")
]
Tuned = Annotated[Path | None, typer.Option("--tuned", help="Read the tuned values from this finished sweep's folder.")]
File = Annotated[Path, typer.Argument(help="A TOML file; see the example below.", show_default=False)]
Trained = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run's folder; a folder with runs/ in it, of which one keeps its weights, or FOLDER/KEY, the beginning of a run's key or of"
        " its plan's hash; or a checkpoint's file in a run's folder.",
        show_default=False,
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        help="The run's tokenizer, if it was moved or its tokens were made elsewhere.",
        show_default=False,
    ),
]
Ema = Annotated[
    float | None,
    typer.Option(
        "--ema",
        help="Decay of the average of weights to take; 0: the last weights \\[default: the lowest held-out loss].",
        show_default=False,
    ),
]
KeepWeights = Annotated[
    bool, typer.Option("--keep-weights", help="Leave model.safetensors in the folder of every run that is trained.")
]
Log = Annotated[
    list[str] | None, typer.Option("--log", help="Also send metrics to tensorboard or wandb; JSONL is always written.")
]


def with_sweep(data: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], Any]:
    """Put a sweep's tuned values in the place of a file's.

    Args:
        data: the file's tables, of a command that trains with [data]. folder: the sweep's; None: the file has its own values.

    Returns:
        The tables, with the sweep's ``[base.training]`` where only the target has one, and the tuned values (None
        without a sweep).

    Raises:
        ValueError: the sweep tuned another base than the file's, or for other runs; the text names the difference.
    """
    if folder is None:
        return data, None
    from dataclasses import fields, replace

    from mue.lab.sweep.tuned import tuned_of
    from mue.plan.toml import shape_from, table_of, training_from

    if "tuned" in data:
        raise ValueError(
            "the file has a [tuned] table and --tuned is given: the sweep's values include all of it, remove it"
        )
    found = tuned_of(folder)
    base = table_of(data, "base")
    # The sequence may differ: no rule scales by it, and files that only plan leave it out.
    shape = replace(
        shape_from(base, "base", ("training", "convention", "output_multiplier")), sequence=found.base.sequence
    )
    for f in fields(shape):
        mine, theirs = getattr(shape, f.name), getattr(found.base, f.name, None)
        if mine != theirs:
            raise ValueError(f"{folder} tuned another base: {f.name} is {theirs!r} there and {mine!r} in [base]")
    training = training_from(base, "base")
    if training is not None and training != found.training:
        raise ValueError(
            f"{folder} was tuned with batch {found.training.batch} and {found.training.steps} steps,"
            f" [base.training] has {training.batch} and {training.steps}"
        )
    # Both training tables or neither: where the target has one, the base's is what the sweep trained
    # with.
    if training is None and "training" in table_of(data, "target"):
        run = {"batch": found.training.batch, "steps": found.training.steps}
        data = {**data, "base": {**base, "training": run}}
    notes = list(found.notes)
    if "data" in data:
        from mue.lab.train.spec import settings_from

        notes += found.check_settings(settings_from(data, auto=found.settings.precision), str(folder))
    elif unusual := found.unusual():
        notes.append(f"these values were tuned with {unusual}: they are for runs with the same")
    _say_notes(notes)
    return data, found.tuned


def say_data(console: Console, corpus: Any, tuned: Path | None = None) -> None:
    """Print what the data are and what was left out of them: nothing is skipped silently.

    Args:
        corpus: text or images. tuned: the folder of the sweep whose values are trained with on it; that it read other data is noted.
    """
    console.print(f"data: {corpus.summary()}", highlight=False, markup=False, soft_wrap=True)
    if tuned is not None:
        from mue.lab.sweep.tuned import tuned_of

        _say_notes(tuned_of(tuned).other_data(corpus.hash, str(tuned)))


def say_kept(console: Console, source: Mapping[str, Any]) -> None:
    """Where the tokens lie that a dry run made: it reads the data, and what it read is not read again. Images are kept nowhere.

    Args:
        source: as :func:`mue.lab.data.spec.data_source` gives it.
    """
    kept = f"; the tokens are kept for the run itself, in {source['cache']}" if "cache" in source else ""
    say_paths(console, f"nothing is trained{kept}")


def _say_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def say_paths(console: Console, *lines: str) -> None:
    """Lines with names of files in them, as they are: never broken, never read as markup."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr; ``message`` is rich's markup, so what came from outside has to be escaped."""
    Console(stderr=True).print(f"[red]error:[/] {message}", highlight=False, markup=True, soft_wrap=True)
    sys.exit(code)
