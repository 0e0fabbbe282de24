"""A safetensors file through a function of its tensors, a chunk at a time: a terabyte needs no more memory than a chunk.

Shapes and types stay, so each tensor's place in the file does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mue.util.safetensors import read_header

CHUNK = 1 << 22  # bytes of a tensor held at once; a multiple of every type's size, so that no number is cut in two
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Through = Callable[[Tensor], Tensor]


def rewrite(source: Path, target: Path, through: Callable[[str], Through | None], metadata: Mapping[str, str]) -> None:
    """Write ``source`` to ``target`` with other metadata, each tensor through its function (None: as it is).

    A function sees a tensor's elements in flat pieces, so it must be elementwise.

    Raises:
        ValueError: not a safetensors file; a function for a type that is no floating-point number of 16 bits or more.
    """
    header = read_header(source)
    text = json.dumps({"__metadata__": dict(metadata), **header.entries}, separators=(",", ":")).encode()
    # the format pads its header with spaces, so that the tensors' bytes begin at a multiple of eight
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
        # writable, as torch.frombuffer wants it: the numbers are changed in place
        piece = bytearray(read.read(min(length, CHUNK)))
        length -= len(piece)
        if function is not None:
            values = torch.frombuffer(piece, dtype=dtype)
            values.copy_(function(values))
        write.write(piece)
