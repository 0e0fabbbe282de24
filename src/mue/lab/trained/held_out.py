"""The text that a trained model is asked about: what its run held out, or text of the user's, as a whole and by folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mue.lab.data import Corpus, load_corpus
from mue.lab.data.batches import spread, windows_at
from mue.lab.data.corpus import by_folder
from mue.lab.data.encode import BYTES, Tokens
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


def own_text(run: Run, sequences: int, *, tokenizer: Path | None = None, folders: bool = True) -> HeldOutText:
    """What a run held out. As a whole these are the very windows of its validation, given as many sequences as that read.

    Args:
        sequences: how many windows of the whole, at most; a folder has a quarter. tokenizer: where its file is now; None: where it was.
        folders: by folder as well.

    Raises:
        ValueError: the data are not there any more, or were not made with that tokenizer.
    """
    source = run.data["source"] if tokenizer is None else {**run.data["source"], "tokenizer": str(tokenizer)}
    corpus = open_corpus(source)
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
    domains, left_out = (
        _domains(corpus_arguments(source), True, run.plan.target.sequence, sequences) if folders else ({}, {})
    )
    return HeldOutText(windows | domains, left_out, "held out by the run", notes)


def text_of(
    data: Path,
    options: Mapping[str, Any],
    *,
    made_with: Collection[str],
    sequence: int,
    vocab: int,
    sequences: int,
    folders: bool = True,
) -> HeldOutText:
    """Text of the user's, all of it, as a whole and by the folders in it.

    Args:
        data: a file or a folder. options: keys of a ``[data]`` table that say how its text becomes tokens.
        made_with: what the model's tokens are called (``Corpus.tokenizer``), every name that is known. sequence: tokens of a window. vocab: the
            model's. sequences, folders: as of :func:`own_text`.

    Raises:
        ValueError: no usable text, other tokens than the model's, or more of them than it has.
    """
    arguments = corpus_arguments(
        {
            "cache": str(cache_folder() / "data"),
            **{k: v for k, v in options.items() if v is not None},
            "source": [str(data)],
        }
    )
    corpus = load_corpus(**arguments)
    notes = _same_tokens(data, corpus, made_with)
    if corpus.vocab > vocab:
        raise ValueError(
            f"{data} has {corpus.vocab} tokens, the model a vocabulary of {vocab}: it needs the model's own tokenizer"
        )
    windows = {WHOLE: windows_of(corpus, sequence, sequences)}
    domains, left_out = _domains(arguments, False, sequence, sequences) if folders else ({}, {})
    return HeldOutText(windows | domains, left_out, str(data), notes)


def _same_tokens(data: Path, corpus: Corpus, made_with: Collection[str]) -> tuple[str, ...]:
    """Refuse tokens that are surely others than the model's: the same numbers would stand for other text.

    Returns:
        What to say where it is not known; a name other than bytes and a tokenizer's hash is only what somebody called it.
    """
    if corpus.tokenizer in made_with:
        return ()
    own = ", ".join(made_with)
    if corpus.tokenizer == BYTES or (_exact(corpus.tokenizer) and any(map(_exact, made_with))):
        raise ValueError(
            f"the model reads tokens of {own}, and those of {data} would be {corpus.tokenizer}: name the model's tokenizer with"
            " --tokenizer, or give a file of its tokens (.bin, .npy)"
        )
    return (
        f"{data} has tokens of {corpus.tokenizer}, the model was trained on those of {own}: nobody knows if they are the same",
    )


def _exact(name: str) -> bool:
    """Whether a name says for certain which tokens there are."""
    return name == BYTES or name.startswith("sha256:")


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


def windows_of(corpus: Corpus, sequence: int, count: int) -> Windows:
    """Windows spread evenly over all of a corpus, both its halves in proportion to their tokens.

    Args:
        sequence: tokens of a window; a half that is shorter has one shorter window.
        count: how many windows, over both halves. There are fewer where the text has fewer that do not overlap, and never more.
    """
    halves: list[Tokens] = [half for half in (corpus.train, corpus.validation) if len(half) > 1]
    if count < len(halves):
        halves = [max(halves, key=len)]
    out: Windows = []
    for i, half in enumerate(halves):
        others = halves[i + 1 :]
        # at least one of each half
        share = round(count * len(half) / sum(map(len, halves[i:])))
        share = min(max(1, share), count - len(others))
        count -= share
        window = min(sequence + 1, len(half))
        start = spread(half, window, min(share, len(half) // window))
        out += [windows_at(half, start[i : i + _BATCH], window) for i in range(0, len(start), _BATCH)]
    return out
