"""The ``[data]`` table of an experiment file: where a corpus comes from, and what a run records of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mue.lab.data.corpus import Corpus, load_corpus, stdlib_source
from mue.plan.toml import check_keys, table_of

STDLIB = "stdlib"
DATA_KEYS = ("source", "tokenizer", "validation_fraction", "cache", "text_key", "separator", "dtype", "vocab")


def data_source(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``[data]`` as what :func:`open_corpus` takes, with absolute paths: a run is resumed from any folder.

    Args:
        data: the file's tables. folder: the file's, to which its paths are relative.

    Raises:
        ValueError: no ``[data]``, an unknown key or a source that is no path.
    """
    table = table_of(data, "data")
    if not table:
        raise ValueError('the file needs a [data] table, e.g. source = "stdlib" or source = "texts/"')
    check_keys(table, DATA_KEYS, "[data]")
    source = table.get("source")
    if source is None:
        raise ValueError('[data] needs source: a path, a list of paths, or "stdlib"')
    names, folder = [source] if isinstance(source, str) else source, folder.absolute()
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f'[data] source must be a path, a list of paths, or "stdlib", got {source!r}')
    out = {k: v for k, v in table.items() if k != "source"}
    out["source"] = STDLIB if source == STDLIB else [str(folder / name) for name in names]
    out["cache"] = str(folder / table.get("cache", "runs/data"))
    if "tokenizer" in out:
        out["tokenizer"] = str(folder / out["tokenizer"])
    return out


def open_corpus(source: Mapping[str, Any]) -> Corpus:
    """Open the corpus that a :func:`data_source` describes.

    Raises:
        ValueError: as :func:`mue.lab.data.corpus.load_corpus`.
    """
    return load_corpus(**corpus_arguments(source))


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


def describe_data(source: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """What a run records of its data: the content's description, and under ``source`` how to open it again.

    Only its ``hash`` is part of a run's key: the same text under another path is the same run.
    """
    return {**corpus.describe(), "source": source}
