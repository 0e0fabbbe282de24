"""The files that commands read: an experiment file, whose values ``--set`` may replace, and a plan.

A command that reads an experiment file gets ``--set`` from two lines, and its own options that stand for a key from the same call::

    @app.command()
    def mine(file: File, change: Set = None, seed: Annotated[int | None, typer.Option()] = None) -> None:
        data = read_tables(file, change, ("base", "tuned", "data", "run"), options={"run.seed": seed})

A file of another kind (a study's) says what it may hold: ``read_tables(file, change, TOP, known=TOP)``; tables that come with
the package are changed alike, ``change_tables(data, change, TOP, known=TOP)``. What the values mean is checked by whoever reads the tables, as it is for the file's own: an unknown key is refused there.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mue.plan.defaults import differing
from mue.plan.plan import Inputs
from mue.plan.toml import PLAN_TABLES, TABLES, check_keys, plan_inputs, read_toml
from mue.plan.transfer import plan_of

if TYPE_CHECKING:
    from mue.api import Plan

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value than the TOML file's, as the file would say it: target.width=2048, 'rule=\"mup\"'; may be repeated.",
        show_default=False,
    ),
]


def read_tables(
    file: Path,
    change: Sequence[str] | None,
    tables: Collection[str],
    options: Mapping[str, object] | None = None,
    *,
    known: Collection[str] = TABLES,
) -> dict[str, Any]:
    """The tables of an experiment file that a command reads, with what its options put in the place of the file's values.

    Args:
        file: TOML. change: what ``--set`` was given, ``KEY=VALUE`` each: a dotted key (a number counts ``[[blocks]]`` from 0) and
            a TOML value. tables: those that the command reads; others of ``known`` may stand in the file.
        options: dotted key → the value of an option that stands for it; None: the option was not given.
        known: all that a file of this kind may hold.

    Raises:
        ValueError: no such file or table; a setting that is none, is given twice or that the command would not read.
    """
    return change_tables(read_toml(file), change, tables, options, known=known)


def change_tables(
    data: dict[str, Any],
    change: Sequence[str] | None,
    tables: Collection[str],
    options: Mapping[str, object] | None = None,
    *,
    known: Collection[str] = TABLES,
) -> dict[str, Any]:
    """The same of tables that are read already, whoever's they are; ``data`` itself is changed."""
    check_keys(data, known, "the file's top level")
    settings = [(f"--set {text}", *_setting(text)) for text in change or ()]
    settings += [
        (f"--{key.rpartition('.')[2]} {value}", key.split("."), value)
        for key, value in (options or {}).items()
        if value is not None
    ]
    seen: dict[tuple[str, ...], str] = {}
    for said, path, value in settings:
        if path[0] in known and path[0] not in tables:
            raise ValueError(f"{said} would change nothing: this command reads {', '.join(tables)}, and not {path[0]}")
        if (before := seen.setdefault(tuple(path), said)) is not said:
            raise ValueError(f"{said} and {before} set the same value: give one of them")
        _put(data, path, value, said)
    check_keys(data, known, "the file's top level")  # again: a setting may have added one
    return {key: value for key, value in data.items() if key in tables}


def _setting(text: str) -> tuple[list[str], Any]:
    """``target.width=2048`` as its key's parts and its value."""
    key, equals, value = text.partition("=")
    try:
        found: Any = tomllib.loads(f"{key}=0") if equals and "\n" not in key else {}
    except tomllib.TOMLDecodeError:
        found = {}
    path = []
    while isinstance(found, dict) and len(found) == 1:
        [(part, found)] = found.items()
        path.append(part)
    if found != 0 or not path:
        raise ValueError(f"--set {text}: write KEY=VALUE with a key of the file, as in --set target.width=2048")
    try:
        read = tomllib.loads(f"value={value}")
    except tomllib.TOMLDecodeError:
        read = {}
    if list(read) != ["value"]:
        quoted = f"; a text wants its quotes: --set '{key}=\"{value}\"'" if value.strip() else ""
        raise ValueError(f"--set {text}: {value!r} is not a TOML value{quoted}")
    return path, read["value"]


def _put(data: Any, path: Sequence[str], value: Any, said: str) -> None:
    """Put a value into tables, making those that are missing; ``said`` is the setting, for messages."""
    *outer, last = path
    for part in outer:
        data = data[_index(data, part, said)] if isinstance(data, list) else data.setdefault(part, {})
        if not isinstance(data, dict | list):
            raise ValueError(f"{said}: {part} is {data!r} and has no {last}")
    data[_index(data, last, said) if isinstance(data, list) else last] = value


def _index(entries: list[Any], part: str, said: str) -> int:
    if not part.isdecimal() or int(part) >= len(entries):
        raise ValueError(f"{said}: {part!r} is none of the {len(entries)} entries, which count from 0")
    return int(part)


def say_differing(inputs: Inputs) -> None:
    """Warn on stderr of every key that ``[base]`` gives and ``[target]`` leaves out with another value.

    Args:
        inputs: as they were read from a file.
    """
    for line in differing(inputs):
        print(f"warning: {line}", file=sys.stderr)


def read_plan(path: Path, change: Sequence[str] | None = None) -> Plan:
    """A plan from the JSON that ``plan.save`` wrote, or from a plan file in TOML.

    Args:
        path: of the file. change: as for :func:`read_tables`; of a TOML file only.

    Raises:
        ValueError: it is neither, or its numbers are not those that follow from its inputs.
    """
    from mue.api import Plan

    if path.suffix == ".toml":
        inputs = plan_inputs(read_tables(path, change, PLAN_TABLES))
        say_differing(inputs)
        return Plan.of(plan_of(inputs))
    if change:
        raise ValueError(
            f"--set changes a plan file (TOML), and {path} is a plan that was made: make it again from its file"
        )
    return Plan.load(path)
