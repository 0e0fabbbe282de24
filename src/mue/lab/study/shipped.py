"""The studies that come with the package: the house's own, and its small form for whoever wants to see one in minutes."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any


def shipped_study(*, small: bool, cache: Path) -> dict[str, Any]:
    """The tables of ``house.toml`` or ``small.toml``.

    Args:
        cache: where the encoded corpus is kept.
    """
    name = "small.toml" if small else "house.toml"
    data: dict[str, Any] = tomllib.loads(files("mue.lab.study").joinpath(name).read_text(encoding="utf-8"))
    data["data"]["cache"] = str(cache.absolute())
    return data
