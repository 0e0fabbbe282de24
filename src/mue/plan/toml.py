"""TOML → shapes, tuned values and options, strictly: a key nobody reads is an error that names the nearest valid one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mue.plan.convention import Convention
from mue.plan.defaults import given_in
from mue.plan.plan import Inputs
from mue.rules.options import OPTIONS
from mue.shapes import (
    Block,
    Dense,
    HParams,
    Image,
    Mixed,
    MoE,
    Training,
    Transformer,
    parse_notation,
)
from mue.shapes.schedule import layer_schedule
from mue.util.errors import nearest, positive
from mue.util.files import read_text

# What [base] and [target] may hold, beside ffn; MOE_KEYS: with experts only. Anything else in them is an error.
COMMON_KEYS = ("width", "layers", "head_dim", "heads", "kv_heads", "vocab", "sequence", "gated", "tied", "image")
MOE_KEYS = ("moe", "expert", "shared", "router", "normalize", "gates", "gate_moments")
# A slip that no spelling is near → a key that is known where it is meant so, and what to write.
MEANT = {
    "training": ("target", "[target.training] or [base.training]"),
    "convention": ("base", "[base.convention]"),
    "notation": ("moe", "'moe'"),
}
SCHEDULE_KEYS = ("name", "spread", "active")
TUNED_KEYS = tuple(f.name for f in fields(HParams))
PLAN_TABLES = ("rule", "base", "tuned", "target", "options")
"""What of an experiment file is the plan's."""
TABLES = (*PLAN_TABLES, "data", "run", "sweep", "roles")
"""All that an experiment file may hold: the plan's tables, and the lab's beside them, so that one file serves every command."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as tables.

    Args:
        path: of the file, in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is missing or not TOML; names the file and the line.
    """
    path, text = Path(path), ""
    try:
        text = read_text(path)
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        line = re.search(r"at line (\d+)", str(error))
        shown = f": {text.splitlines()[int(line[1]) - 1].strip()[:80]}" if line else ""
        if text.lstrip().startswith("{"):
            shown = "; it is JSON: a saved plan is for mue check, export and convert, and this reads the TOML it was made from"
        raise ValueError(f"{path} is not a TOML file: {error}{shown}") from None


def check_keys(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse a key that nothing reads: a misspelt one would otherwise leave a default in force, without a word.

    Args:
        table: as it was read. known: its keys that are read. where: what messages call the table.

    Raises:
        ValueError: the first such key, with the nearest one that is known.
    """
    for key in table:
        if key not in known:
            beside, meant = MEANT.get(key, ("", ""))
            hint = f"; did you mean {meant}?" if beside in known else nearest(key, known)
            raise ValueError(f"unknown key {key!r} in {where}{hint}")


@contextmanager
def naming(where: str, number: int | None = None) -> Iterator[None]:
    """What a shape or a run refuses knows no file: put the table in front, for a file has several with the same keys.

    Args:
        where: the table's name. number: of which entry, where it is a list of tables.
    """
    try:
        yield
    except ValueError as error:
        if f"[{where}" in str(error):
            raise
        raise ValueError(f"[{where}]: {error}" if number is None else f"[[{where}]] {number}: {error}") from error


def need(table: Mapping[str, Any], key: str, where: str) -> Any:
    """``table[key]``, or a ``ValueError`` that names key and table."""
    if key not in table:
        raise ValueError(f"{where} needs {key!r}")
    return table[key]


def table_of(data: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    """A table inside another, empty where it is left out.

    Args:
        data: the outer table. key: the inner one's name. where: of the outer table, ending in a dot, for messages.

    Raises:
        ValueError: the key holds anything but a table.
    """
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"[{where}{key}] must be a table, got {value!r}")
    return value


def plan_inputs(data: Mapping[str, Any], tuned: HParams | None = None) -> Inputs:
    """A plan file's tables as :class:`mue.plan.plan.Inputs`.

    Args:
        data: the file's tables. tuned: in place of its ``[tuned]`` table (``mue plan --tuned SWEEP``).

    Raises:
        ValueError: with the table, the key and the fix.
    """
    check_keys(data, PLAN_TABLES, "the file's top level")
    base, target = table_of(data, "base"), table_of(data, "target")
    for name, table in (("base", base), ("target", target)):
        if not table:
            raise ValueError(f"the file needs a [{name}] table")
    options = dict(table_of(data, "options"))
    check_keys(options, OPTIONS, "[options]")
    if tuned is None:
        if "tuned" not in data:
            raise ValueError("the file needs a [tuned] table (or mue plan --tuned SWEEP)")
        tuned = tuned_from(table_of(data, "tuned"))
    elif "tuned" in data:
        raise ValueError("the file has a [tuned] table and --tuned is given: use one of them")
    convention = table_of(base, "convention", "base.")
    check_keys(convention, tuple(f.name for f in fields(Convention)), "[base.convention]")
    return Inputs(
        base=shape_from(base, "base", ("training", "convention", "output_multiplier")),
        target=shape_from(target, "target", ("training",)),
        tuned=tuned,
        base_training=training_from(base, "base"),
        training=training_from(target, "target"),
        rule=data.get("rule", "complete-mue"),
        convention=Convention(**convention),
        options=options,
        given=given_in(data),
    )


def tuned_from(table: Mapping[str, Any]) -> HParams:
    """Tuned values from a ``[tuned]`` table with its per-role tables.

    Args:
        table: lr, weight_decay and init_std at least; the rest has defaults.

    Raises:
        ValueError: a key that is unknown or missing, or a value out of its bounds.
    """
    check_keys(table, TUNED_KEYS, "[tuned]")
    for key in ("lr", "weight_decay", "init_std"):
        need(table, key, "[tuned]")
    return HParams(**table)


def training_from(table: Mapping[str, Any], where: str) -> Training | None:
    """The run of a ``[base]`` or ``[target]`` table, or None where its ``training`` is left out.

    Args:
        table: the outer one. where: its name, for messages.

    Raises:
        ValueError: ``batch`` (tokens per step) or ``steps`` is missing or no positive whole number; a key other than these and
            ``critical_batch``.
    """
    if "training" not in table:
        return None
    training = table_of(table, "training", f"{where}.")
    check_keys(training, ("batch", "steps", "critical_batch"), f"[{where}.training]")
    batch, steps = (need(training, key, f"[{where}.training]") for key in ("batch", "steps"))
    with naming(f"{where}.training"):
        return Training(batch, steps, training.get("critical_batch"))


def shape_from(table: Mapping[str, Any], where: str, extra: tuple[str, ...] = ()) -> Transformer:
    """A ``[base]`` or ``[target]`` table as a shape: of ``ffn``, of ``moe`` and ``expert``, or of ``[[where.blocks]]``.

    Args:
        table: as it was read. where: its name, for messages. extra: keys in it that others read.

    Raises:
        ValueError: a key that is unknown, missing or beside another that excludes it; numbers that no shape has.
    """
    check_keys(table, (*COMMON_KEYS, "ffn", *MOE_KEYS, "blocks", "schedule", *extra), f"[{where}]")
    common = {k: table[k] for k in (*COMMON_KEYS, "output_multiplier") if k in table}
    if "image" in table:
        common["image"] = _image(table_of(table, "image", f"{where}."), f"[{where}.image]")
    need(table, "width", f"[{where}]")
    if "blocks" not in table:
        need(table, "layers", f"[{where}]")
    with naming(where):
        return _mixed(table, common, where) if "blocks" in table else _uniform(table, common, f"[{where}]")


def _image(table: Mapping[str, Any], where: str) -> Image:
    keys = tuple(f.name for f in fields(Image))
    check_keys(table, keys, where)
    return Image(**{key: need(table, key, where) for key in keys})


def _uniform(table: Mapping[str, Any], common: dict[str, Any], where: str) -> Transformer:
    own = {k: v for k, v in table.items() if k in (*MOE_KEYS, "ffn", "schedule")}
    # dense and MoE side by side: whichever were read, the other would be ignored in silence
    if "ffn" in own and len(own) > 1:
        raise ValueError(
            f"{where} has ffn and {next(k for k in own if k != 'ffn')}: it is dense (ffn) or a MoE (moe, expert), not both"
        )
    if "ffn" in own:
        return Dense(ffn=own["ffn"], **common)
    if "moe" not in own:
        raise ValueError(f"{where} needs ffn (dense) or moe and expert")
    notation = own.pop("moe")
    need(own, "expert", where)
    schedule = own.pop("schedule", None)
    pairs = _pairs_of_layers(own)
    shape = MoE.parse(notation, **_with_router(own, where), **common)
    if schedule is not None:
        return _scheduled(shape, schedule, where)
    if pairs is None:
        return shape
    own_of_blocks = {k: v for k, v in common.items() if k != "layers"}
    return Mixed(blocks=tuple(_with_moments(shape.per_layer, pairs, where)), **own_of_blocks)


def _scheduled(shape: MoE, schedule: Any, where: str) -> Mixed:
    """``schedule`` is a name, or a table with it and what else :func:`mue.shapes.schedule.layer_schedule` takes."""
    table = dict(schedule) if isinstance(schedule, Mapping) else {"name": schedule}
    check_keys(table, SCHEDULE_KEYS, f"the table schedule of {where}")
    name = need(table, "name", f"the table schedule of {where}")
    return layer_schedule(shape, name, **{k: v for k, v in table.items() if k != "name"})


def _with_router(own: dict[str, Any], where: str) -> dict[str, Any]:
    """A table's keys, its router as the name and the settings of a block: ``router`` is a name, or a table with it and settings."""
    router = own.get("router")
    if not isinstance(router, Mapping):
        return own
    settings = {k: v for k, v in router.items() if k != "name"}
    return {**own, "router": need(router, "name", f"the table router of {where}"), "router_settings": settings}


def _pairs_of_layers(own: dict[str, Any]) -> list[Any] | None:
    """``gate_moments`` of every layer, where a table has a list of pairs; the table is left with the first of them."""
    pairs = own.get("gate_moments")
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, list) for pair in pairs):
        return None
    own["gate_moments"] = tuple(pairs[0])
    return pairs


def _with_moments(layers: Sequence[Block], pairs: Sequence[Any], where: str) -> list[Block]:
    """Layers with measured moments of their own, as blocks of neighbours that are alike."""
    if len(pairs) != len(layers):
        raise ValueError(
            f"gate_moments of {where} has {len(pairs)} pairs for {len(layers)} layers: give one pair, or one for each"
        )
    if layers[0].pools:
        raise ValueError(
            f"layers that read one pool of experts have one pair of gate_moments, {where} has {len(pairs)}"
        )
    made: list[Block] = []
    for layer, pair in zip(layers, pairs, strict=True):
        block = replace(layer, layers=1, gate_moments=tuple(pair))
        if made and replace(made[-1], layers=1) == block:
            made[-1] = replace(made[-1], layers=made[-1].layers + 1)
        else:
            made.append(block)
    return made


def _mixed(table: Mapping[str, Any], common: dict[str, Any], where: str) -> Mixed:
    """Blocks that differ; layers, where it is given as well, is only a check."""
    for key in (*MOE_KEYS, "ffn", "schedule"):
        if key in table:
            raise ValueError(f"[{where}] has {key} and [[{where}.blocks]]: say it in the blocks only")
    blocks = table["blocks"]
    if not isinstance(blocks, list) or not all(isinstance(b, dict) for b in blocks):
        raise ValueError(f"blocks of [{where}] must be tables: write [[{where}.blocks]]")
    made = []
    for n, block in enumerate(blocks, 1):
        check_keys(block, ("layers", "ffn", *MOE_KEYS), f"[[{where}.blocks]]")
        need(block, "layers", f"[[{where}.blocks]]")
        own = dict(block)
        pairs = _pairs_of_layers(own)
        numbers: dict[str, Any] = dict(parse_notation(own.pop("moe"))) if "moe" in own else {}
        # TOML has lists only; Block compares and hashes a tuple
        if isinstance(own.get("gate_moments"), list):
            own["gate_moments"] = tuple(own["gate_moments"])
        with naming(f"{where}.blocks", n):
            one = Block(**numbers, **_with_router(own, f"[[{where}.blocks]]"))
        made += [one] if pairs is None else _with_moments((one,) * one.layers, pairs, f"[[{where}.blocks]]")
    layers = common.pop("layers", None)
    shape = Mixed(blocks=tuple(made), **common)
    if layers is not None and layers != shape.layers:
        raise ValueError(f"[{where}] layers = {layers}, but its blocks have {shape.layers} together")
    return shape


def lr_grid(values: Any, where: str) -> list[float]:
    """A grid's values, sorted, each once.

    Args:
        values: as read. where: their name, for messages; one that ends in ``weight_decay`` may hold 0.

    Raises:
        ValueError: no list, an empty one, or a value that is no positive number.
    """
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where} must be a list of numbers, got {values!r}")
    return sorted({positive(where, v, zero=where.endswith("weight_decay")) for v in values})
