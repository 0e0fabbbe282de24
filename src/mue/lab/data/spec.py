"""The ``[data]`` table of an experiment file: where text or images come from, and what a run records of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mue.lab.data.corpus import Corpus, load_corpus, stdlib_source
from mue.lab.data.images import ImageSet, load_images
from mue.lab.data.images.source import IMAGE_SOURCES
from mue.plan.toml import check_keys, table_of

Data = Corpus | ImageSet
"""What a task reads; which of the two it says (``mue.lab.train.task.Task.reads``), by its ``kind``."""

STDLIB = "stdlib"
DATA_KEYS: Mapping[str, tuple[str, ...]] = {
    Corpus.kind: ("source", "tokenizer", "validation_fraction", "cache", "text_key", "separator", "dtype", "vocab"),
    ImageSet.kind: ("source", "validation_fraction", "size", "channels", "odd", "corrupt"),
}
"""The keys of the table, by the kind of data."""
_EXAMPLES = {Corpus.kind: (STDLIB, "texts/"), ImageSet.kind: ("digits", "photos/")}


def data_source(data: Mapping[str, Any], folder: Path, reads: str = Corpus.kind) -> dict[str, Any]:
    """``[data]`` as what :func:`open_data` takes, with absolute paths: a run is resumed from any folder.

    Args:
        data: the file's tables. folder: the file's, to which its paths are relative. reads: the kind of data that the file's task reads.

    Raises:
        ValueError: no ``[data]``, an unknown key, a source that is no path, or data of another kind than the task's.
    """
    table = table_of(data, "data")
    named, path = _EXAMPLES[reads]
    if not table:
        raise ValueError(f'the file needs a [data] table, e.g. source = "{named}" or source = "{path}"')
    source = table.get("source")
    _check_kind(table, source, reads)
    check_keys(table, DATA_KEYS[reads], "[data]")
    if source is None:
        raise ValueError(f'[data] needs source: a path, a list of paths, or "{named}"')
    names, folder = [source] if isinstance(source, str) else source, folder.absolute()
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f'[data] source must be a path, a list of paths, or "{named}", got {source!r}')
    out = {k: v for k, v in table.items() if k != "source"}
    out["source"] = source if _kind_of_name(source) else [str(folder / name) for name in names]
    if reads == ImageSet.kind:
        return {"kind": reads, **out}
    out["cache"] = str(folder / table.get("cache", "runs/data"))
    if "tokenizer" in out:
        out["tokenizer"] = str(folder / out["tokenizer"])
    return out


def _kind_of_name(source: object) -> str | None:
    """What a source is that has a name and needs no path; None for all others."""
    if source == STDLIB:
        return Corpus.kind
    return ImageSet.kind if isinstance(source, str) and source in IMAGE_SOURCES else None


def _check_kind(table: Mapping[str, Any], source: object, reads: str) -> None:
    """Refuse a source or a key that is of data of another kind."""
    kind = _kind_of_name(source)
    if kind not in (None, reads):
        named, path = _EXAMPLES[reads]
        raise ValueError(
            f'[data] source = "{source}" is {kind}, and the task reads {reads}: take another [run] task, or source = "{named}" or "{path}"'
        )
    for other, keys in DATA_KEYS.items():
        wrong = [key for key in table if key in keys and key not in DATA_KEYS[reads]]
        if wrong:
            raise ValueError(
                f"[data] {wrong[0]} is for {other}, and the task reads {reads}: leave it out, or take another [run] task"
            )


def open_data(source: Mapping[str, Any]) -> Data:
    """Open the text or the images that a :func:`data_source` describes.

    Raises:
        ValueError: as :func:`mue.lab.data.corpus.load_corpus` and :func:`mue.lab.data.images.load_images`.
    """
    if source.get("kind") != ImageSet.kind:
        return load_corpus(**corpus_arguments(source))
    out = {key: value for key, value in source.items() if key != "kind"}
    named = isinstance(out["source"], str)
    return load_images(**{**out, "source": out["source"] if named else [Path(p) for p in out["source"]]})


def open_corpus(source: Mapping[str, Any]) -> Corpus:
    """As :func:`open_data`, for what has a meaning with text alone.

    Raises:
        ValueError: the source has images.
    """
    found = open_data(source)
    if not isinstance(found, Corpus):
        raise ValueError("the data are images, and this reads text: name a file or a run of a task on text")
    return found


def corpus_arguments(source: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`mue.lab.data.corpus.load_corpus` that a :func:`data_source` stands for.

    Raises:
        ValueError: a key that has no meaning with the standard library.
    """
    out = {**source, "cache": Path(source["cache"])}
    if source["source"] == STDLIB:
        unknown = [k for k in source if k not in ("source", "cache", "validation_fraction")]
        if unknown:
            raise ValueError(f'[data] {unknown[0]} has no meaning with source = "stdlib": leave it out')
        return out | stdlib_source()
    if "tokenizer" in out:
        out["tokenizer"] = Path(out["tokenizer"])
    return out | {"source": [Path(p) for p in source["source"]]}


def describe_data(source: dict[str, Any], data: Data) -> dict[str, Any]:
    """What a run records of its data: the content's description, and under ``source`` how to open it again.

    Only its ``hash`` is part of a run's key: the same text or images under another path are the same run.
    """
    return {**data.describe(), "source": source}


def described_words(described: Mapping[str, Any]) -> str:
    """What a :func:`describe_data` says of its content, for people: ``"731 files of text, 12,118,641 bytes"``, or how many images of what size."""
    if described.get("kind") == ImageSet.kind:
        _, height, width = described["shape"]
        held = described["held_out_images"]
        return f"{described['train_images'] + held:,} images of {height} × {width}, {held:,} of them held out"
    return f"{described['files']:,} files of text, {described['bytes']:,} bytes"
