"""What a safetensors file says of its tensors, read without them.

The format (github.com/huggingface/safetensors): eight bytes with the header's length, the header in JSON, then the tensors'
bytes one after another.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_HEADER = 100_000_000  # the format's own limit; a file that is none gives any number here


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: entries by name, in the order of their bytes, and its metadata."""

    entries: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int  # of the tensors' bytes

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])


def read_header(path: Path) -> Header:
    """Read what a safetensors file says of its tensors, without their bytes.

    Raises:
        ValueError: the file is not safetensors, or its tensors' bytes are not where it says.
    """
    with path.open("rb") as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else LARGEST_HEADER + 1
        if size > LARGEST_HEADER:
            raise ValueError(f"{path} is not a safetensors file")
        try:
            found: dict[str, Any] = json.loads(file.read(size))
            metadata = found.pop("__metadata__", {})
            entries = dict(sorted(found.items(), key=lambda item: item[1]["data_offsets"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file ({error})") from None
    at = 0
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        if begin != at:
            raise ValueError(f"{path} is damaged: {name} does not begin where the tensor before it ends")
        at = end
    if path.stat().st_size != 8 + size + at:
        raise ValueError(
            f"{path} is damaged: its tensors end at byte {8 + size + at}, the file at {path.stat().st_size}"
        )
    return Header(entries, metadata, 8 + size)
