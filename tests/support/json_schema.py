"""As much of JSON Schema as ours use, read strictly: a word that is not here fails."""

from __future__ import annotations

import re
from typing import Any

KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}
READ = {"type", "properties", "additionalProperties", "required", "items", "anyOf", "enum", "pattern"}
SAID = {"$schema", "title", "description"}


def faults(data: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """What of ``data`` is not as the schema has it, each with its place."""
    assert set(schema) <= READ | SAID, set(schema) - READ - SAID
    if "anyOf" in schema and all(faults(data, part, where) for part in schema["anyOf"]):
        return [f"{where}: none of the choices, {data!r}"]
    if "enum" in schema and data not in schema["enum"]:
        return [f"{where}: {data!r} is not among {schema['enum']}"]
    kind = schema.get("type")
    if kind and (not isinstance(data, KINDS[kind]) or (isinstance(data, bool) and kind != "boolean")):
        return [f"{where}: {data!r} is no {kind}"]
    if "pattern" in schema and not re.search(schema["pattern"], data):
        return [f"{where}: {data!r} does not match"]
    found = []
    if isinstance(data, dict):
        own, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{where}: lacks {key}" for key in schema.get("required", ()) if key not in data]
        for key, value in data.items():
            if key in own:
                found += faults(value, own[key], f"{where}.{key}")
            elif more is False:
                found.append(f"{where}: unknown key {key}")
            elif isinstance(more, dict):
                found += faults(value, more, f"{where}.{key}")
    if isinstance(data, list) and "items" in schema:
        found += [fault for i, item in enumerate(data) for fault in faults(item, schema["items"], f"{where}[{i}]")]
    return found
