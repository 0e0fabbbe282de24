"""``mue init``."""

from __future__ import annotations

import re
import sys
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mue.cli.app import app
from mue.plan.starter import KINDS, Starter, proposed_base
from mue.plan.toml import PLAN_TABLES, plan_inputs, shape_from
from mue.plan.transfer import plan_of
from mue.shapes import HParams, Training, Transformer
from mue.util.errors import nearest
from mue.util.files import write_text

_NUMBERS, _EXPERTS = "width=128,ffn=128,layers=8", "128e8a1s,width=1024,expert=512,layers=8"
_MODEL = "a transformers config.json or family, or train.py:build, with what it does not say behind commas"
_TUNED = ("lr", "weight_decay", "init_std")
_EXAMPLES = {
    "base": _NUMBERS,
    "target": _EXPERTS,
    "lr": "1e-3",
    "weight_decay": "0.1",
    "init_std": "0.02",
    "batch": "524288",
    "steps": "25000",
    "target_batch": "524288",
    "target_steps": "100000",
    "data": "stdlib",
}  # of what may be missing, in the order in which it is asked for


@app.command()
def init(
    kind: Annotated[str, typer.Argument(help=f"What to write: {', '.join(KINDS)}.", show_default=False)],
    file: Annotated[
        Path | None,
        typer.Argument(help="The file to write, in a folder that is there \\[default: KIND.toml].", show_default=False),
    ] = None,
    base: Annotated[str | None, typer.Option(help=f"The model that is tuned: {_NUMBERS}; or {_MODEL}.")] = None,
    target: Annotated[str | None, typer.Option(help=f"The model to train: {_EXPERTS}; or as --base.")] = None,
    config: Annotated[
        str | None, typer.Option(help="The target's transformers config.json, or the folder that holds it.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Tuned peak learning rate; of a sweep the middle.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Tuned weight decay, as torch's AdamW takes it.")] = None,
    init_std: Annotated[float | None, typer.Option(help="Tuned standard deviation of the matrices at init.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of one step of the base's run.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the base's run.")] = None,
    target_batch: Annotated[int | None, typer.Option(help="Tokens of one step of the target's run.")] = None,
    target_steps: Annotated[int | None, typer.Option(help="Steps of the target's run.")] = None,
    data: Annotated[str | None, typer.Option(help="The lab's text, of sweep and train: a path, or stdlib.")] = None,
    swept: Annotated[
        bool, typer.Option("--swept", help="The values come from a sweep (--tuned FOLDER): leave \\[tuned] out.")
    ] = False,
) -> None:
    """Write a plan, sweep or train file with a comment on every line.

    What is missing is asked for in a terminal, and is an error elsewhere. A file that exists is not touched. A sweep file with a target
    is a plan file and a train file as well: mue plan FILE --tuned runs/sweep. Without a base a sweep tunes a dense model an eighth as
    wide as the target, of two heads at least.

    \b
    [bold]Examples[/]
      mue init plan --base width=128,ffn=128,layers=8 --target 128e8a1s,width=1024,expert=512,layers=8
      mue init plan --base small.py:build --target big.py:build,sequence=2048 --lr 1e-3 --weight-decay 0.1 --init-std 0.02
      mue init sweep --config config.json --batch 8192 --steps 2000 --data texts/
    """
    if kind not in KINDS:
        raise ValueError(f"mue init writes a file for {', '.join(KINDS)}, not for {kind!r}{nearest(kind, KINDS)}")
    path = file or Path(f"{kind}.toml")
    if path.exists():
        raise ValueError(f"{path} exists and is not touched: give another FILE, or remove it")
    if target and config:
        raise ValueError("--config is the target's config: give --target or --config, not both")
    given = {
        "base": base,
        "target": target or config,
        "lr": lr,
        "weight_decay": weight_decay,
        "init_std": init_std,
        "batch": batch,
        "steps": steps,
        "target_batch": target_batch,
        "target_steps": target_steps,
        "data": data,
    }
    _refuse(kind, given, swept)
    given |= _asked(_missing(kind, given, swept))
    made = _starter(kind, given, swept)
    text = made.text()
    _check(text, made, path.parent)
    write_text(path, text)
    for table, origin in made.origins.items():
        if origin:
            print(f"note: [{table}] {origin}", file=sys.stderr)
    print(f"wrote {path}: {made.use(str(path))}")


def _refuse(kind: str, given: Mapping[str, Any], swept: bool) -> None:
    """Flags that would change nothing."""
    unread = {"plan": ("data",), "sweep": ("weight_decay", "init_std")}.get(kind, ()) + (_TUNED if swept else ())
    for name in unread:
        if given[name] is not None:
            why = "with --swept" if swept and name in _TUNED else f"in a {kind} file"
            raise ValueError(f"--{name.replace('_', '-')} would change nothing {why}: leave it out")
    if swept and kind == "sweep":
        raise ValueError("--swept is for the plan and train files that use a sweep: leave it out")


def _missing(kind: str, given: Mapping[str, Any], swept: bool) -> list[str]:
    """What the file needs and nobody gave."""
    runs = ["batch", "steps", *(["target_batch", "target_steps"] if kind == "plan" or given["target"] else [])]
    needed = ["base"] if kind != "sweep" or not given["target"] else []
    needed += ["target"] if kind == "plan" else []
    needed += [] if kind == "sweep" or swept else _TUNED
    # a plan has both runs or neither; a target in a sweep's file trains as long as the base unless it is said
    if kind == "train" or (kind == "plan" and any(given[name] is not None for name in runs)):
        needed += runs
    if kind == "sweep":
        needed += runs[:2] + (runs[2:] if any(given[name] is not None for name in runs[2:]) else [])
    needed += [] if kind == "plan" else ["data"]
    return [name for name in _EXAMPLES if name in needed and given[name] is None]


def _asked(names: list[str]) -> dict[str, Any]:
    """Answers from the terminal.

    Raises:
        ValueError: there is none; the text has every flag that is missing, with an example.
    """
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    if names and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError(
            "there is no terminal to ask in, so give " + ", ".join(f"{flags[name]} {_EXAMPLES[name]}" for name in names)
        )
    kinds = {**dict.fromkeys(_TUNED, float), **dict.fromkeys(("batch", "steps", "target_batch", "target_steps"), int)}
    answers = {}
    for name in names:
        answers[name] = typer.prompt(f"{flags[name][2:]} (such as {_EXAMPLES[name]})", type=kinds.get(name, str))
    return answers


def _starter(kind: str, given: Mapping[str, Any], swept: bool) -> Starter:
    """The file's values; shapes are read off models where they are named."""
    shapes, origins = {}, {}
    for table in ("base", "target"):
        if given[table]:
            shapes[table], origins[table] = _shape(given[table], table)
    if "base" not in shapes:
        shapes["base"], origins["base"] = proposed_base(shapes["target"]), "proposed from the target: change it"
    run = _run(given["batch"], given["steps"])
    own = _run(given["target_batch"], given["target_steps"])
    return Starter(
        kind,
        shapes["base"],
        shapes.get("target"),
        run,
        own or (run if kind == "sweep" else None),
        {} if swept or kind == "sweep" else {name: given[name] for name in _TUNED},
        0.004 if given["lr"] is None else given["lr"],
        given["data"] or "",
        origins,
    )


def _run(batch: int | None, steps: int | None) -> Training | None:
    return None if batch is None or steps is None else Training(batch, steps)


def _shape(text: str, table: str) -> tuple[Transformer, str]:
    """A shape from numbers, or from a model with numbers beside it; and where it is from, with what was taken for granted."""
    first, *rest = re.split(r",(?![^\[{]*[\]}])", text)
    if "=" in first or re.fullmatch(r"(\d+[a-z])+", first):
        numbers = {} if "=" in first else {"moe": first}
        return shape_from({**numbers, **_numbers([first, *rest] if "=" in first else rest, table)}, table), ""
    from mue.layouts.read_shape import read_shape

    with warnings.catch_warnings(record=True) as taken:
        warnings.simplefilter("always")
        shape = read_shape(first, **_numbers(rest, table))
    # what to pass is a number behind a comma here, KEY=VALUE
    notes = dict.fromkeys(str(w.message) for w in taken)
    return shape, "; ".join([f"read from {first}", *notes])


def _numbers(pairs: list[str], table: str) -> dict[str, Any]:
    """``["heads=8", "router=softmax"]`` as a table: values as TOML has them, or bare words."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key.strip() in found:
            raise ValueError(f"--{table}: write each number once and as KEY=VALUE, as in {_NUMBERS}, got {pair!r}")
        try:
            found[key.strip()] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = value.strip()
    return found


def _check(text: str, made: Starter, folder: Path) -> None:
    """Have the file read by whatever reads it, before it is there: a number that no rule takes is said now.

    Raises:
        ValueError: what its reader says.
    """
    data = tomllib.loads(text)
    # a sweep gives them: whether there is a plan does not hang on their size
    swept = None if made.tuned else HParams(lr=1e-3, weight_decay=0.1, init_std=0.02)
    if made.target is not None:
        plan_of(plan_inputs({name: table for name, table in data.items() if name in PLAN_TABLES}, swept))
    if made.kind == "plan":
        return
    from mue.lab.sweep.spec import sweep_from
    from mue.lab.train.run import Run
    from mue.lab.train.spec import settings_from, train_plan

    if made.kind == "sweep":
        spec = sweep_from(data, folder)
        spec.run_at({"lr": spec.grid.lr[0], "weight_decay": 0.1, "init_std": 0.1, "seed": 0}, {})
    if made.kind == "train" or made.target is not None:
        Run(train_plan(data, swept), settings_from(data), {})
