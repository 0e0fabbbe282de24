"""Tokenizers: what a file of one brings, and what it lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mue.lab.data import load_corpus
from support.text_folders import folder, tokenizer_file


def test_tokenizers_json(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "t.json", ["<|endoftext|>"])
    source = folder(tmp_path / "s", {f"{i}.txt": f"some text {i} é\n" for i in range(10)})
    corpus = load_corpus(source, cache=tmp_path / "c", tokenizer=path)
    tokenizers = pytest.importorskip("tokenizers")
    reader = tokenizers.Tokenizer.from_file(str(path))
    text = reader.decode(corpus.train.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    text += reader.decode(corpus.validation.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert sorted(text) == sorted(f"some text {i} é\n" for i in range(10))
    assert corpus.vocab == reader.get_vocab_size() and corpus.train.dtype == np.uint16
    assert corpus.hash != load_corpus(source, cache=tmp_path / "c").hash

    # The cache is a pre-tokenised source, and remembers its tokenizer.
    again = load_corpus(tmp_path / "c" / f"{corpus.hash}.bin", cache=tmp_path / "c2", tokenizer=path)
    assert again.tokens == corpus.tokens and again.tokenizer == corpus.tokenizer
    other = tokenizer_file(tmp_path / "o.json", ["<|endoftext|>", "<x>"])
    with pytest.raises(ValueError, match="pass the tokenizer it was made with"):
        load_corpus(tmp_path / "c" / f"{corpus.hash}.bin", cache=tmp_path / "c2", tokenizer=other)


def test_a_tokenizer_without_an_end_of_text_needs_a_separator(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "t.json", ["<doc>"])
    source = folder(tmp_path / "s", {"a.txt": "some text", "b.txt": "some text"})
    with pytest.raises(ValueError, match="separator="):
        load_corpus(source, cache=tmp_path / "c", tokenizer=path)
    with pytest.raises(ValueError, match="no token '<no>'"):
        load_corpus(source, cache=tmp_path / "c", tokenizer=path, separator="<no>")
    assert load_corpus(source, cache=tmp_path / "c", tokenizer=path, separator="<doc>").separator == 0
    with pytest.raises(ValueError, match="vocab = 10 is smaller"):
        load_corpus(source, cache=tmp_path / "c", tokenizer=path, separator="<doc>", vocab=10)


def test_bad_tokenizer_file(tmp_path: Path) -> None:
    folder(tmp_path, {"a.txt": "text", "t.json": "{}"})
    for name, message in (("t.json", "not a `tokenizers` JSON"), ("gone.json", "no such tokenizer file")):
        with pytest.raises(ValueError, match=message):
            load_corpus(tmp_path / "a.txt", cache=tmp_path / "c", tokenizer=tmp_path / name)
