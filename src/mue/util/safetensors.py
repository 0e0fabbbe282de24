"""A safetensors file through a function of its tensors, a chunk at a time: a terabyte needs no more memory than a chunk.

The format (github.com/huggingface/safetensors): eight bytes with the header's length, the header in JSON, then the tensors'
bytes one after another. Shapes and types stay, so each tensor's place does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

CHUNK = 1 << 22  # bytes of a tensor held at once
LARGEST_HEADER = 100_000_000
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Through = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: entries by name, in the order of their bytes, and its metadata."""

    entries: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int  # of the tensors' bytes

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])


def read_header(path: Path) -> Header:
    """The header; ``ValueError`` for a file that is not safetensors or shorter than it says."""
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


def rewrite(source: Path, target: Path, through: Callable[[str], Through | None], metadata: Mapping[str, str]) -> None:
    """Write ``source`` to ``target`` with other metadata, each tensor through its function (None: as it is).

    A function sees a tensor's elements in flat pieces, so it must be elementwise.

    Raises:
        ValueError: not a safetensors file; a function for a type that is no floating-point number of 16 bits or more.
    """
    header = read_header(source)
    text = json.dumps({"__metadata__": dict(metadata), **header.entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as read, target.open("wb") as write:
        write.write(struct.pack("<Q", len(text)) + text)
        read.seek(header.start)
        for name, entry in header.entries.items():
            begin, end = entry["data_offsets"]
            function = through(name)
            if function is not None and entry["dtype"] not in _TYPES:
                raise ValueError(f"{name} is stored as {entry['dtype']}, and cannot be scaled: dequantise it first")
            _copy(read, write, end - begin, function, _TYPES.get(entry["dtype"], torch.uint8))


def _copy(read: BinaryIO, write: BinaryIO, length: int, function: Through | None, dtype: torch.dtype) -> None:
    while length:
        piece = bytearray(read.read(min(length, CHUNK)))
        length -= len(piece)
        if function is not None:
            values = torch.frombuffer(piece, dtype=dtype)
            values.copy_(function(values))
        write.write(piece)
