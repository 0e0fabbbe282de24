"""What ``torch.save`` wrote, read without running anybody's code; a file that is none is said to be none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch


def read_torch(path: Path, device: str, *, mmap: bool = False) -> Any:
    """Read a file of ``torch.save``.

    Args:
        path: of the file. device: where its tensors go; "meta" reads their shapes only. mmap: map the file into memory where its
            format allows it.

    Raises:
        ValueError: another file, a damaged one, or one with pickled objects in it (a whole module, say), whatever torch's reader
            stumbles over.
        OSError: it cannot be read.
    """
    try:
        try:
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        except RuntimeError:  # the format of before torch 1.6 cannot be mapped
            if not mmap:
                raise
            return torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds a pickled {found[1]}, which only running its code would read: save the weights by name,"
                " torch.save(model.state_dict(), ...)"
            ) from error
        what = "no checkpoint, or a damaged one" if path.stat().st_size else "empty"
        raise ValueError(f"{path} is {what}: a .safetensors file, or one of torch.save, is wanted") from error
