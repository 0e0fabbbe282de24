"""JSON schemas of the TOML files, for editors: made from the tables of keys that the readers check, so the two cannot part.

A schema knows keys, kinds and choices. Whether numbers go together is for the readers to say. Names that packages of others may
register (rules, routers, samplers, tasks, laws) are offered and not enforced.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mue.lab.data import load_corpus, load_images
from mue.lab.data.images.load import CHANNELS, CORRUPT, ODD
from mue.lab.data.spec import DATA_KEYS
from mue.lab.per_role.search import Search
from mue.lab.runners.runner import KINDS as RUNNERS
from mue.lab.study.spec import APPROACH_KEYS, AXIS_KEYS, STUDY_KEYS, TARGET_KEYS
from mue.lab.study.spec import TOP as STUDY_TABLES
from mue.lab.sweep.sampler import SAMPLERS
from mue.lab.sweep.spec import SWEEP_KEYS
from mue.lab.train.run import BALANCES, PRECISIONS, Settings
from mue.lab.train.schedule import SCHEDULES
from mue.lab.train.spec import AUTO, RUN_KEYS
from mue.lab.train.task import TASKS
from mue.plan.convention import Convention
from mue.plan.key_words import KEY_WORDS, TABLE_WORDS
from mue.plan.toml import COMMON_KEYS, MOE_KEYS, SCHEDULE_KEYS, TABLES, TUNED_KEYS
from mue.rules import RULES
from mue.rules.options import OPTIONS
from mue.shapes import OPTIMIZERS, ROUTERS, Block, HParams, Image, MoE, Training
from mue.util.errors import nearest

Schema = dict[str, Any]
KINDS = ("plan", "sweep", "train", "study")
_KINDS: Mapping[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}


def schema(kind: str) -> Schema:
    """The schema of one kind of file.

    Args:
        kind: one of :data:`KINDS`. A plan, a sweep and a train file are one: each command reads its own tables of it.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there are schemas for {', '.join(KINDS)}, not for {kind!r}{nearest(kind, KINDS)}")
    study = kind == "study"
    needed = {"plan": ("base", "target"), "sweep": ("base", "data", "sweep"), "train": ("base", "data")}
    tables = _tables()
    if study:
        tables["study"] = _table(
            STUDY_KEYS, "study", {"seeds": _list("integer"), "multipliers": _NUMBERS, "reach": {"type": "number"}}
        )
        tables["approaches"] = {"type": "object", "additionalProperties": _approach()}
        tables["axes"] = {"type": "object", "additionalProperties": _axis()}
    top = STUDY_TABLES if study else TABLES
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"a {kind} file of mue",
        **_object({name: {**tables[name], "description": TABLE_WORDS[name]} for name in top}),
        "required": list(needed.get(kind, ("base", "tuned", "approaches", "axes"))),
    }


def _tables() -> dict[str, Schema]:
    """The tables of an experiment's file."""
    return {
        "rule": _names(RULES),
        "base": _shape(("training", "convention", "output_multiplier")),
        "target": _shape(("training",)),
        "tuned": _table(
            TUNED_KEYS,
            "tuned",
            {**_hints(HParams), "roles": {"type": "object"}, "optimizer": {"enum": list(OPTIMIZERS)}},
        ),
        "options": _object({name: {"description": option.meaning} for name, option in OPTIONS.items()}),
        "data": _data(),
        "run": _table(
            RUN_KEYS,
            "run",
            {
                **_hints(Settings),
                "schedule": {"enum": list(SCHEDULES)},
                "precision": {"enum": [*PRECISIONS, AUTO]},
                "balance": {"enum": list(BALANCES)},
                "task": _names(TASKS),
            },
        ),
        "sweep": _table(
            [*SWEEP_KEYS, *dict.fromkeys(key for sampler in SAMPLERS.values() for key in sampler.keys)],
            "sweep",
            {
                **dict.fromkeys(("lr", "weight_decay", "init_std", "adamw_lr"), _NUMBERS),
                "betas": {"type": "array", "items": _NUMBERS},
                "seeds": _list("integer"),
                "sampler": _names(SAMPLERS),
                "trials": {"type": "integer"},
                "stop_early": {"type": "boolean"},
                "runner": {"enum": list(RUNNERS)},
            },
        ),
        "roles": _table(get_type_hints(Search), "roles", _hints(Search)),
    }


def _data() -> Schema:
    """Keys of text and of images, for a schema need not say which go together."""
    of_images: dict[str, Schema] = {
        "odd": {"enum": list(ODD)},
        "corrupt": {"enum": list(CORRUPT)},
        "channels": {"enum": list(CHANNELS)},
    }
    kinds = {**_hints(load_images), **_hints(load_corpus), **of_images}
    keys = dict.fromkeys(key for keys in DATA_KEYS.values() for key in keys)
    return _table(keys, "data", {**kinds, "source": _either(_kind(str), _list("string"))})


def _shape(extra: Iterable[str]) -> Schema:
    """[base] or [target]: keys of every kind of shape, for a schema need not say which exclude each other."""
    own = _of_blocks()
    blocks = _table(("layers", "ffn", *MOE_KEYS), "shape", own)
    more = {
        "blocks": {"type": "array", "items": blocks},
        "schedule": _either(_kind(str), _table(SCHEDULE_KEYS, "schedule", {"name": _kind(str)})),
        "training": _table(get_type_hints(Training), "training", _hints(Training)),
        "image": _table(get_type_hints(Image), "image", _hints(Image)),
        "convention": _table(
            get_type_hints(Convention),
            "convention",
            {**_hints(Convention), "weight_decay": {"enum": ["decoupled", "independent"]}},
        ),
    }
    keys = (*COMMON_KEYS, "ffn", *MOE_KEYS, "blocks", "schedule", *extra)
    return {**_table(keys, "shape", {**_hints(MoE), **own, **more}), "required": ["width"]}


def _of_blocks() -> dict[str, Schema]:
    router = {"type": "object", "properties": {"name": _names(ROUTERS)}, "required": ["name"]}
    pairs = _either(_NUMBERS, {"type": "array", "items": _NUMBERS})
    return {
        **_hints(Block),
        "moe": {"type": "string", "pattern": r"^(\d+[a-z])+$"},
        "router": _either(_names(ROUTERS), router),
        "gates": {"enum": ["unit-sum", "measured"]},
        "gate_moments": pairs,
    }


def _approach() -> Schema:
    tables = _tables()
    own = {
        "rule": tables["rule"],
        "options": tables["options"],
        "tuned": tables["tuned"],
        "law": _kind(str),
        "multipliers": _NUMBERS,
    }
    return _table(APPROACH_KEYS, "study", own)


def _axis() -> Schema:
    of_both = {
        "seeds": _list("integer"),
        "multipliers": _NUMBERS,
        "reach": {"type": "number"},
        "approaches": _list("string"),
    }
    shape = _shape(())
    of_target = _table(TARGET_KEYS, "study", {**of_both, "name": _kind(str), "batch": _kind(int), "steps": _kind(int)})
    target = _object(shape["properties"] | of_target["properties"])
    return {
        **_table(AXIS_KEYS, "study", {**of_both, "targets": {"type": "array", "items": target}}),
        "required": ["targets"],
    }


def _table(keys: Collection[str], words: str, kinds: Mapping[str, Schema]) -> Schema:
    """A table whose reader knows these keys and no other."""
    said = KEY_WORDS[words]
    return _object({key: {**kinds.get(key, {}), **({"description": said[key]} if key in said else {})} for key in keys})


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _hints(thing: Any) -> dict[str, Schema]:
    """What the annotations of a dataclass, or of a function's arguments, say of its values."""
    return {name: _kind(hint) for name, hint in get_type_hints(thing).items() if name != "return"}


def _kind(hint: Any) -> Schema:
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_kind(part) for part in get_args(hint) if part is not type(None)]
        return parts[0] if len(parts) == 1 else _either(*parts)
    if get_origin(hint) in (tuple, list, frozenset):
        return {"type": "array", "items": _kind(get_args(hint)[0])}
    return {"type": _KINDS[hint]} if hint in _KINDS else {}


def _either(*parts: Schema) -> Schema:
    return {"anyOf": list(parts)}


def _list(kind: str) -> Schema:
    return {"type": "array", "items": {"type": kind}}


def _names(names: Iterable[str]) -> Schema:
    """A name that is offered, or another that a package registers."""
    return {"anyOf": [{"enum": list(names)}, {"type": "string"}]}
