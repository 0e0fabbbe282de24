"""The text that a trained model is asked about: what its run held out, or text of the user's, as a whole and by folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mue.lab.data import Corpus, load_corpus
from mue.lab.data.batches import spread, windows_at
from mue.lab.data.corpus import by_folder
from mue.lab.data.encode import Tokens
from mue.lab.data.spec import corpus_arguments, open_corpus
from mue.lab.tasks.language import text_windows
from mue.lab.train.run import Run
from mue.util.files import cache_folder

Windows = list[tuple[torch.Tensor, torch.Tensor]]
"""Batches of (tokens (B, T), those that follow (B, T)); T may differ between batches."""
WHOLE = "all"
_BATCH = 16  # sequences computed at once
_DOMAIN_SHARE = 4  # a folder reads a quarter as many sequences as the whole
_DESCRIBING = ("source", "suffixes", "exclude", "dtype", "validation_fraction")


@dataclass(frozen=True)
class HeldOutText:
    """Windows to predict.

    Attributes:
        windows: by name: :data:`WHOLE`, then each folder, where there are several. left_out: folders with too little text, by name, with why.
        source: what the text is, for people. notes: what speaks against the comparison with the training.
    """

    windows: Mapping[str, Windows]
    left_out: Mapping[str, str]
    source: str
    notes: tuple[str, ...] = ()


def own_text(run: Run, sequences: int) -> HeldOutText:
    """What a run held out. As a whole these are the very windows of its validation, given as many sequences as that read.

    Args:
        sequences: how many windows of the whole, at most; a folder reads a quarter.

    Raises:
        ValueError: the data are not there any more.
    """
    corpus = open_corpus(run.data["source"])
    notes = (
        ()
        if corpus.hash == run.data["hash"]
        else (
            f"the data have changed since the training (sha256 {run.data['hash'][:16]} then, {corpus.hash[:16]} now): what was trained on may"
            " be among what is held out",
        )
    )
    asked = replace(run, settings=replace(run.settings, eval_sequences=sequences))
    windows: dict[str, Windows] = {WHOLE: [(x, y) for x, y in text_windows(asked, corpus).validation()]}
    arguments = corpus_arguments(run.data["source"])
    domains, left_out = _domains(arguments, True, run.plan.target.sequence, sequences)
    return HeldOutText(windows | domains, left_out, "held out by the run", notes)


def text_of(data: Path, options: Mapping[str, Any], *, sequence: int, vocab: int, sequences: int) -> HeldOutText:
    """Text of the user's, all of it, as a whole and by the folders in it.

    Args:
        data: a file or a folder. options: keys of a ``[data]`` table that say how its text becomes tokens.
        sequence: tokens of a window. vocab: the model's. sequences: as of :func:`own_text`.

    Raises:
        ValueError: no usable text, or more tokens than the model has.
    """
    arguments = corpus_arguments(
        {
            "cache": str(cache_folder() / "data"),
            **{k: v for k, v in options.items() if v is not None},
            "source": [str(data)],
        }
    )
    corpus = load_corpus(**arguments)
    if corpus.vocab > vocab:
        raise ValueError(
            f"{data} has {corpus.vocab} tokens, the model a vocabulary of {vocab}: it needs the model's own tokenizer"
        )
    windows = {WHOLE: windows_of(corpus, sequence, sequences)}
    domains, left_out = _domains(arguments, False, sequence, sequences)
    return HeldOutText(windows | domains, left_out, str(data))


def _domains(
    arguments: Mapping[str, Any], held_out: bool, sequence: int, sequences: int
) -> tuple[dict[str, Windows], dict[str, str]]:
    """The windows of each folder, where there are several, and what is left out."""
    described = {k: v for k, v in arguments.items() if k in _DESCRIBING}
    folders = by_folder(**described, cache=arguments["cache"], held_out=held_out)
    if len(folders) < 2:
        return {}, {}
    windows, left_out = {}, {}
    for name, paths in sorted(folders.items()):
        try:
            corpus = load_corpus(**{**arguments, "source": paths})
            windows[name] = windows_of(corpus, sequence, max(1, sequences // _DOMAIN_SHARE))
        except ValueError as error:  # these files were read a moment ago: there is too little in them
            left_out[name] = str(error)
    return windows, left_out


def windows_of(corpus: Corpus, sequence: int, most: int) -> Windows:
    """Windows spread evenly over all of a corpus, both its halves; one shorter window of a half that is shorter than one.

    Args:
        sequence: tokens of a window. most: how many there are at most; they do not overlap, so there may be fewer.
    """
    halves: Sequence[Tokens] = [half for half in (corpus.train, corpus.validation) if len(half) > 1]
    total = sum(map(len, halves))
    out: Windows = []
    for half in halves:
        window = min(sequence + 1, len(half))
        count = min(max(1, round(most * len(half) / total)), max(1, len(half) // window))
        start = spread(half, window, count)
        out += [windows_at(half, start[i : i + _BATCH], window) for i in range(0, count, _BATCH)]
    return out
