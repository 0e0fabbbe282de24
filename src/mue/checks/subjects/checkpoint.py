"""Does a checkpoint belong to this plan? The plan's hash travels in it; another one, or none, is a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding
from mue.plan.plan import HASH_KEYS
from mue.util.safetensors import read_header

NAME = "plan hash"


@check_of(NAME, place=6)
def checkpoint(ctx: Context) -> Iterator[Finding]:
    """``checkpoint`` is a path (safetensors, torch, JSON, or a folder with one) or a mapping with the key ``plan``."""
    given = ctx.checkpoint
    if given is None:
        yield Finding(NAME, SKIP, measured="no checkpoint was given")
        return
    where = str(given) if isinstance(given, str | Path) else "the checkpoint"
    try:
        found = stored_hash(given)
    except (OSError, ValueError, RuntimeError) as error:
        yield Finding(
            NAME,
            FAIL,
            where,
            f"a checkpoint of plan {ctx.plan.hash}",
            f"cannot be read ({error})",
            ("not a checkpoint",),
            "give the file that holds it",
        )
        return
    if found == ctx.plan.hash:
        yield Finding(NAME, PASS, measured=f"{where}: {found}")
        return
    mend = "go on with the plan it was made with (mue.Plan.load), or start over"
    if found is None:
        mend = f'save it with the plan: torch.save({{"plan": plan.hash, **state}}), or safetensors metadata={{"plan": "{ctx.plan.hash}"}}'
    yield Finding(
        NAME,
        FAIL,
        where,
        f"plan {ctx.plan.hash}",
        f"plan {found}" if found else "no plan hash in it",
        ("written by a run with another plan (a stale checkpoint)",) if found else ("written without it",),
        mend,
    )


def stored_hash(given: Any) -> str | None:
    """The hash in a checkpoint, None where there is none.

    Raises:
        OSError, ValueError, RuntimeError: not a file of a kind that is known here.
    """
    if isinstance(given, Mapping):
        return _search(given)
    path = Path(given)
    if path.is_dir():
        inside = [
            p for p in sorted(path.iterdir()) if p.name == "plan.json" or p.suffix in (".safetensors", ".pt", ".pth")
        ]
        # plan.json first: it is the smallest, and the plan itself
        found = (stored_hash(p) for p in sorted(inside, key=lambda p: p.name != "plan.json"))
        return next((h for h in found if h), None)
    if path.suffix == ".safetensors":
        return _search(read_header(path).metadata)
    if path.suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8"))
        own = data.get("hash") if "inputs" in data else None  # a saved plan
        return own if isinstance(own, str) else _search(data)
    from mue.layouts.torch_file import read_torch

    # no weights are read, and no code of the file runs
    loaded = read_torch(path, "meta")
    return _search(loaded) if isinstance(loaded, Mapping) else None


def _search(data: Mapping[str, Any]) -> str | None:
    """The first of :data:`mue.plan.plan.HASH_KEYS` with text in it, also inside texts of JSON (ours) and mappings one level down."""
    for key in HASH_KEYS:
        if isinstance(data.get(key), str):
            return str(data[key])
    for value in data.values():
        if isinstance(value, str) and value.startswith("{"):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                continue
        if isinstance(value, Mapping) and any(isinstance(value.get(k), str) for k in HASH_KEYS):
            return next(str(value[k]) for k in HASH_KEYS if isinstance(value.get(k), str))
    return None
