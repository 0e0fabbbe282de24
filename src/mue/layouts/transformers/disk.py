"""A transformers checkpoint folder: which parameter each stored tensor is (part of), and settings of its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mue.layouts.torch_file import read_torch
from mue.util.safetensors import read_header

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


class StoredNames:
    """Stored name → the model's own names. transformers 5 stores experts one by one and holds them in one tensor.

    Renames as ``from_pretrained`` does, by the library's own table, so what it would load is what is meant here.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        stock: Any = model
        every = get_model_conversion_mapping(stock)
        self._own = dict(model.state_dict(keep_vars=True))
        self._renamings = [t for t in every if isinstance(t, WeightRenaming)]
        self._converters = [t for t in every if isinstance(t, WeightConverter)]
        self._prefix: str = stock.base_model_prefix

    def __call__(self, stored: str) -> tuple[str, ...]:
        """The parameters that a stored tensor is, is part of, or holds."""
        from transformers.core_model_loading import rename_source_key

        own: Any = self._own
        name, pattern = rename_source_key(stored, self._renamings, self._converters, self._prefix, own)
        for converter in self._converters if pattern is not None else ():
            if pattern in converter.source_patterns:
                first, *others = converter.target_patterns
                return (name, *(name.replace(first, other) for other in others))
        return (name,)

    def converts(self, stored: str) -> bool:
        """Whether the tensor is joined, parted or turned on its way into the model."""
        from transformers.core_model_loading import apply_converters, apply_renamings

        return apply_converters(apply_renamings(stored, self._renamings), self._converters)[1] is not None


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor of a transformers checkpoint folder; no weights are read.

    Raises:
        ValueError: no weights, or shards that the index names and the folder lacks.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        shapes.update(_shapes(path))
    return shapes


@dataclass(frozen=True)
class StoredTensors:
    """A checkpoint's tensors against the model of its config.

    Attributes:
        tensors: how many are stored. missing: the model's own that no stored tensor is (part of). unexpected: stored, and
            nothing of the model. other_shapes: what fits by name and not by size, with both.
    """

    tensors: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shapes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.other_shapes)

    def lines(self) -> list[str]:
        """For people."""
        out = [f"stored: {self.tensors} tensors" + (", all of the model and nothing else" if self.fits else "")]
        for what in ("missing", "unexpected", "other_shapes"):
            out += [f"{what.replace('_', ' ')}: {name}" for name in getattr(self, what)]
        return out


def compare_stored(folder: Path, model: nn.Module) -> StoredTensors:
    """Compare names and sizes on disk with the model's; tied names, and buffers that are not saved, need not be there."""
    stored = stored_shapes(folder)
    names = StoredNames(model)
    own = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    first = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    parts: dict[str, list[str]] = {}
    for name in stored:
        for target in names(name):
            parts.setdefault(target, []).append(name)
    held = {first[n] for n in parts if n in first}
    wrong = []
    for n, sources in parts.items():
        # joined or turned on the way in: only the number of elements can be compared
        if n in own and (len(sources) > 1 or names.converts(sources[0])):
            sizes = sum(prod(stored[s]) for s in sources)
            whole = sum(prod(own[m]) for m in names(sources[0]) if m in own)
            if sizes != whole:
                wrong.append(f"{n} {own[n]} is stored in {len(sources)} tensors of {sizes:,} numbers, not {whole:,}")
        elif n in own and stored[sources[0]] != own[n]:
            wrong.append(f"{n} {own[n]} is stored as {stored[sources[0]]}")
    return StoredTensors(
        len(stored),
        tuple(n for n in own if n not in parts and first.get(n) not in held),
        tuple(s for n, sources in parts.items() if n not in own for s in sources),
        tuple(wrong),
    )


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights as transformers saves them."""
    return any((folder / name).exists() for name in (*INDEXES, *SINGLE))


def _files(folder: Path) -> Iterator[Path]:
    """The files with weights: the shards that an index names, or the single file."""
    index = next((folder / name for name in INDEXES if (folder / name).exists()), None)
    if index is None:
        single = next((folder / name for name in SINGLE if (folder / name).exists()), None)
        if single is None:
            raise ValueError(f"{folder} holds no weights: none of {', '.join((*INDEXES, *SINGLE))}")
        yield single
        return
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    lacking = [name for name in shards if not (folder / name).exists()]
    if lacking:
        raise ValueError(
            f"{folder} lacks {lacking[0]}, which {index.name} names ({len(lacking)} of {len(shards)} shards)"
        )
    for name in shards:
        yield folder / name


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        header = read_header(path)
        return {name: header.shape(name) for name in header.entries}
    # names and sizes without the numbers
    data = read_torch(path, "meta")
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds a {type(data).__name__}, and no weights by name")
    return {name: tuple(value.shape) for name, value in data.items() if isinstance(value, Tensor)}


def with_setting(config: Mapping[str, Any], key: str, value: float) -> dict[str, Any]:
    """A ``config.json`` with one setting changed, wherever it stands, nested configs included.

    Args:
        config: the parsed file; it is not changed. key: the setting. value: its new one.

    Raises:
        ValueError: it stands nowhere.
    """
    new, found = _replaced(config, key, value)
    if not found:
        raise ValueError(f"the config has no {key} to set to {value:g}")
    return new


def _replaced(config: Mapping[str, Any], key: str, value: float) -> tuple[dict[str, Any], bool]:
    new, found = dict(config), key in config
    if found:
        new[key] = value
    for name, inner in config.items():
        if isinstance(inner, Mapping):
            new[name], below = _replaced(inner, key, value)
            found |= below
    return new, found
