"""Keys written into a TOML file that a person wrote: everything else stays as it stands, comments too."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mue.util.files import read_text, write_text


def write_keys(path: Path, header: str, places: Mapping[int, Mapping[str, str]]) -> None:
    """Write keys into tables of a file, in the place of those of the same name.

    Args:
        header: of the tables as the file has it, ``[target]`` or ``[[target.blocks]]``.
        places: the how many-th such table → key → its value as TOML.

    Raises:
        ValueError: the file does not have such tables in that form, or says the keys in another; nothing is written, and the text
            has the lines to write by hand.
    """
    text = read_text(path)
    wanted = {place: {k: tomllib.loads(f"x = {v}")["x"] for k, v in keys.items()} for place, keys in places.items()}
    lines, out, place, inside = text.splitlines(keepends=True), [], -1, False
    for line in lines:
        if line.lstrip().startswith("["):
            bare = line.partition("#")[0].strip()
            place, inside = (place + 1, True) if bare == header else (place, False)
            out.append(line if line.endswith("\n") else line + "\n")
            if inside:
                out += [f"{key} = {value}\n" for key, value in places.get(place, {}).items()]
        elif not (
            inside and re.match(rf"\s*({'|'.join(map(re.escape, places.get(place, {})))})\s*=", line)
        ) or not places.get(place):
            out.append(line)
    edited = "".join(out)
    if not _says(edited, header, wanted, tomllib.loads(text)):
        by_hand = "; ".join(f"{key} = {value}" for keys in places.values() for key, value in keys.items())
        raise ValueError(f"{path} has no table {header} that these can be written into, write them yourself: {by_hand}")
    write_text(path, edited)


def _says(edited: str, header: str, wanted: Mapping[int, Mapping[str, Any]], before: dict[str, Any]) -> bool:
    """Whether a text reads as the tables did, with these keys and no other change."""
    names = header.strip("[]").split(".")
    try:
        after = tomllib.loads(edited)
        for data in (before, after):
            tables: Any = data
            for name in names:
                tables = tables[name]
            for place, keys in wanted.items():
                table = tables[place] if header.startswith("[[") else tables
                if data is before:
                    table |= keys
    except (tomllib.TOMLDecodeError, KeyError, IndexError, TypeError):
        return False
    return after == before
