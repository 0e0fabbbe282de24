"""Folders of texts, streams of tokens and tokenizers to load corpora from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mue.lab.data import Corpus


def folder(root: Path, files: dict[str, str | bytes]) -> Path:
    """A folder with these files, by their relative names."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def stream(tokens: np.ndarray[Any, Any]) -> Corpus:
    """A corpus of bytes at hand, the same for training and validation."""
    return Corpus(tokens, tokens, 256, "0" * 64, 1, len(tokens), "bytes", 0)


def tokenizer_file(path: Path, specials: list[str]) -> Path:
    """A byte-level BPE of 300 tokens with these special ones; without ``tokenizers`` the test is skipped."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["some text some text and more text"] * 20, trainer)
    made.save(str(path))
    return path
