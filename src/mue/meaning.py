"""A plan's meaning against its wording: what is hashed, compared and stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXTS = frozenset({"source", "status", "marks", "formula", "notes"})


def without_texts(data: Any) -> Any:
    """Nested data with everything left out that explains and does not mean."""
    if isinstance(data, Mapping):
        return {k: without_texts(v) for k, v in data.items() if k not in TEXTS}
    return [without_texts(v) for v in data] if isinstance(data, list | tuple) else data


def flat(data: Any, path: str = "") -> dict[str, Any]:
    """Nested data as ``{"roles.head.lr": ..., "betas[0]": ...}``."""
    if isinstance(data, Mapping):
        return {
            k: v for key, value in data.items() for k, v in flat(value, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(data, list | tuple):
        return {k: v for i, value in enumerate(data) for k, v in flat(value, f"{path}[{i}]").items()}
    return {path: data}
