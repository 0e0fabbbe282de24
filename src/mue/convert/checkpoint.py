"""``mue convert``: a checkpoint on disk from one form to the other, whatever it is made of; the plan's form is marked in it."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mue.convert.forms import Conversion
from mue.convert.optimizer import convert_optimizer, convert_scheduler, is_optimizer, is_scheduler
from mue.convert.rewrite import Through, rewrite
from mue.layouts.torch_file import read_torch
from mue.util.files import write_atomic, write_folder, write_json
from mue.util.safetensors import read_header

TORCH = (".pt", ".pth", ".bin", ".ckpt")
# What files of these names hold is neither weights nor optimizer state, and is copied (training_args.bin is a pickle).
OTHER = ("training_args.bin", "rng_state", "scaler.pt", "random_states")
Names = Callable[[str], tuple[str, ...]]


@dataclass
class ConversionReport:
    """What was done: parameters met by name, how many tensors changed, and files by what became of them."""

    met: set[str] = field(default_factory=set)
    changed: int = 0
    converted: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    groups: tuple[list[Any], list[Any]] | None = None  # of the one optimizer, before and after


def _same(name: str) -> tuple[str, ...]:
    return (name,)


def convert_checkpoint(
    source: Path,
    out: Path,
    how: Conversion,
    names: Names = _same,
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> ConversionReport:
    """Write ``source`` in the other form to ``out``: a file, or a folder with all it holds.

    Safetensors are streamed, so that memory does not grow with the model; files of torch are read with ``weights_only`` and
    mapped into memory where their format allows it.

    Args:
        source: a ``.safetensors`` file (weights, or the lab's checkpoint), a file of ``torch.save`` (weights, an optimizer's
            or scheduler's state dict, or mappings and lists of these), or a folder of such files.
        out: must not exist. names: name in the file → the model's own names (experts are stored one by one, say).
        config: what becomes of ``config.json``.

    Raises:
        ValueError: ``out`` exists; a checkpoint that has the form already, belongs to another plan, lacks parameters or has
            others than the planned model; a file that holds nothing of the kind.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if out.exists():
        raise ValueError(f"{out} exists already: give --out a name that is free")
    report = ConversionReport()
    if source.is_dir():
        _folder(source, out, how, names, config, report)
    else:

        def write(temporary: Path) -> None:
            _file(source, temporary, how, names, report)
            _complete(source, how, report)

        # what is found lacking at the end leaves no file behind
        write_atomic(out, write)
    return report


def _folder(
    source: Path,
    out: Path,
    how: Conversion,
    names: Names,
    config: Callable[[dict[str, Any]], dict[str, Any]] | None,
    report: ConversionReport,
) -> None:
    """Into a folder beside ``out``, which gets the name when all is done."""
    if (source / ".metadata").exists():
        raise ValueError(
            f"{source} is a checkpoint of torch.distributed.checkpoint: make it one file first, with"
            " python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        )

    def fill(work: Path) -> None:
        for path in _in_order(source):
            target = work / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.name == "config.json" and config is not None:
                data = json.loads(path.read_text(encoding="utf-8"))
                how.check_mark(str(path), data)
                write_json(target, how.marked(config(data)))
            elif path.suffix == ".safetensors" or (path.suffix in TORCH and not path.name.startswith(OTHER)):
                _file(path, target, how, names, report)
                report.converted.append(str(path.relative_to(source)))
            else:
                shutil.copy2(path, target)
                report.copied.append(str(path.relative_to(source)))
        _complete(source, how, report)

    write_folder(out, fill)


def _in_order(folder: Path) -> list[Path]:
    """All files, schedulers last: their rates are those of the optimizer's groups."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return sorted(files, key=lambda p: p.name.startswith(("scheduler", "lr_scheduler")))


def _complete(source: Path, how: Conversion, report: ConversionReport) -> None:
    lacking = sorted(set(how.changes) - report.met)
    if report.met and lacking:
        raise ValueError(f"{source} lacks {len(lacking)} parameters of the planned model, {lacking[0]} among them")
    if not report.met and report.groups is None:
        raise ValueError(f"{source} holds neither weights nor optimizer state of the planned model")


def _file(source: Path, target: Path, how: Conversion, names: Names, report: ConversionReport) -> None:
    """One file in the other form, whatever it holds.

    A bare state dict has no place for the mark but its ``_metadata``.
    """
    if source.suffix == ".safetensors":
        _safetensors(source, target, how, names, report)
        return
    data = read_torch(source, "cpu", mmap=True)
    if isinstance(data, Mapping):
        how.check_mark(str(source), {**getattr(data, "_metadata", {}), **data})
    found = _Walk(how, names, report)
    new = found.walk(data)
    if isinstance(new, dict) and not found.bare:
        new = how.marked(new)
    torch.save(new, target)


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _safetensors(source: Path, target: Path, how: Conversion, names: Names, report: ConversionReport) -> None:
    header = read_header(source)
    how.check_mark(str(source), header.metadata)
    functions = {name: _through(name, how, names, report) for name in header.entries}
    metadata = how.marked(dict(header.metadata))
    if isinstance(metadata["mue"], dict):
        metadata["mue"] = json.dumps(metadata["mue"])
    rewrite(source, target, functions.__getitem__, metadata)


def _through(key: str, how: Conversion, names: Names, report: ConversionReport) -> Through | None:
    """What becomes of one stored tensor: a weight, or the lab's ``model/NAME`` and ``optimizer/NAME/KEY``."""
    kind, _, rest = key.partition("/")
    if kind == "optimizer" and rest:
        name, _, entry = rest.rpartition("/")
        own = how.change(name)
        return None if own is None or own.ratio == 1 or entry == "step" else partial(own.state, name, entry)
    stored = rest if kind == "model" and rest else key
    own = _one_change(stored, how, names, report)
    return None if own is None or own.ratio == 1 else partial(own.weight, stored)


def _one_change(stored: str, how: Conversion, names: Names, report: ConversionReport) -> Any:
    """The change of a stored tensor; one that holds several parameters must change all of them alike."""
    own = names(stored)
    changes = [how.change(name) for name in own]
    report.met |= {how.first(n) for n, c in zip(own, changes, strict=True) if c is not None}
    if any(c != changes[0] for c in changes):
        raise ValueError(
            f"{stored} holds {', '.join(own)}, of which each is scaled differently: it cannot be converted"
        )
    report.changed += changes[0] is not None and changes[0].ratio != 1
    return changes[0]


# ---- torch.save ------------------------------------------------------------------------------------------------------


@dataclass
class _Walk:
    """Through what a file of torch holds; ``bare``: it is a model's state dict and nothing else, so it cannot be marked."""

    how: Conversion
    names: Names
    report: ConversionReport
    bare: bool = False

    def walk(self, data: Any, top: bool = True) -> Any:
        """The same nesting with each optimizer, scheduler and set of weights in it converted, the rest as it is."""
        if is_optimizer(data):
            new = convert_optimizer(data, self.how)
            self.report.groups = (data["param_groups"], new["param_groups"])
            return new
        if is_scheduler(data):
            return convert_scheduler(data, *self._groups())
        if isinstance(data, Mapping) and self._are_weights(data):
            self.bare = top
            return self._weights(data)
        if isinstance(data, Mapping):
            # a scheduler's rates are those of the optimizer's groups, which must be known by then
            items = sorted(data.items(), key=lambda item: not _holds_optimizer(item[1]))
            made = {k: self.walk(v, top=False) for k, v in items}
            return {k: made[k] for k in data}
        return [self.walk(v, top=False) for v in data] if isinstance(data, list) else data

    def _are_weights(self, data: Mapping[Any, Any]) -> bool:
        tensors = [k for k, v in data.items() if isinstance(k, str) and isinstance(v, Tensor)]
        return any(self.how.knows(n) for k in tensors for n in self.names(k))

    def _weights(self, data: Mapping[str, Any]) -> Any:
        new: OrderedDict[str, Any] = OrderedDict()  # a plain one has no place for the mark but among the weights
        for key, value in data.items():
            own = _one_change(key, self.how, self.names, self.report) if isinstance(value, Tensor) else None
            new[key] = value if own is None else own.weight(key, value)
        new._metadata = {**getattr(data, "_metadata", {}), "mue": self.how.marked({})["mue"]}  # type: ignore[attr-defined]
        return new

    def _groups(self) -> tuple[Any, Any]:
        if self.report.groups is not None:
            return self.report.groups
        return tuple([{**g.settings} for g in side] for side in (self.how.before, self.how.after))  # type: ignore[return-value]


def _holds_optimizer(data: Any) -> bool:
    return is_optimizer(data) or (isinstance(data, list) and any(map(is_optimizer, data)))
