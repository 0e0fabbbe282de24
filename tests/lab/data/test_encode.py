"""Tokenizers: what a file of one brings, and what it lacks."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mue
from mue.lab.data import load_corpus
from mue.lab.tasks.language import text_windows
from mue.lab.train.run import Run, Settings
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


def changed(path: Path, name: str, change: Any) -> Path:
    """A copy of a tokenizer's file with something else saved in it."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path.parent / name))
    return path.parent / name


def test_what_was_saved_for_single_examples_does_not_touch_the_corpus(tmp_path: Path) -> None:
    """Truncation, padding and tokens put around each example; a tokenizer that was once used with them has another name."""
    processors = pytest.importorskip("tokenizers.processors")
    plain = tokenizer_file(tmp_path / "t.json", ["<|endoftext|>"])
    around = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    changes = {
        "truncation": lambda t: t.enable_truncation(16),
        "padding": lambda t: t.enable_padding(length=4096),
        "both": lambda t: (t.enable_truncation(16), t.enable_padding(length=16)),
        "around": lambda t: setattr(t, "post_processor", around),
    }
    source = folder(tmp_path, {"a.txt": "some text and more text\n" * 200}) / "a.txt"
    right = load_corpus(source, cache=tmp_path / "c", tokenizer=plain)
    hashes = {right.hash}
    for name, change in changes.items():
        found = load_corpus(source, cache=tmp_path / "c", tokenizer=changed(plain, f"{name}.json", change))
        assert np.array_equal(found.train, right.train) and np.array_equal(found.validation, right.validation), name
        hashes.add(found.hash)
    assert len(hashes) == 5
    cut = tmp_path / "truncation.json"  # tokens cut by an older reader may lie in the cache under the file's own hash
    assert (
        load_corpus(source, cache=tmp_path / "c", tokenizer=cut).tokenizer
        != f"sha256:{sha256(cut.read_bytes()).hexdigest()}"
    )
    assert right.tokenizer == f"sha256:{sha256(plain.read_bytes()).hexdigest()}"


@pytest.mark.parametrize(
    ("dropout", "words"),
    [(0.1, "dropout = 0.1"), (1e-9, "dropout = 1e-09"), (1.0, "dropout = 1"), (0.0, ""), (None, "")],
)
def test_a_tokenizer_that_draws_is_refused(tmp_path: Path, dropout: float | None, words: str) -> None:
    plain = tokenizer_file(tmp_path / "t.json", ["<|endoftext|>"])
    path = changed(plain, "dropout.json", lambda t: setattr(t.model, "dropout", dropout))
    source = folder(tmp_path, {"a.txt": "some text"}) / "a.txt"
    if not words:
        assert load_corpus(source, cache=tmp_path / "c", tokenizer=path).tokens
        return
    with pytest.raises(ValueError, match=rf"draws the tokens of a text anew each time \({words}\)"):
        load_corpus(source, cache=tmp_path / "c", tokenizer=path)


def test_one_that_draws_in_ways_unheard_of_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tokenizer_file(tmp_path / "t.json", ["<|endoftext|>"])
    source, turn = folder(tmp_path, {"a.txt": "some text"}) / "a.txt", iter(range(99))

    class Drawing:
        """A tokenizer whose model hides that it draws."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def encode(self, text: str, **how: Any) -> Any:
            return self.inner.encode(text + " more" * next(turn), **how)

    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(path))
    monkeypatch.setattr(tokenizers, "Tokenizer", SimpleNamespace(from_str=lambda text: Drawing(inner)))
    with pytest.raises(ValueError, match="two readings differ"):
        load_corpus(source, cache=tmp_path / "c", tokenizer=path)


@pytest.mark.parametrize("unk", [None, "<unk>"])
def test_characters_without_a_token_are_counted(tmp_path: Path, unk: str | None) -> None:
    """A tokenizer drops them or gives them all one token; with an alphabet of bytes there are none."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unk))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    specials = ["<|endoftext|>", *([unk] if unk else [])]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=specials, show_progress=False)
    made.train_from_iterator(["some text and more text"] * 20, trainer)
    made.save(str(tmp_path / "narrow.json"))
    source = folder(tmp_path, {"a.txt": "some é text é and ü more\n" * 20}) / "a.txt"
    corpus = load_corpus(source, cache=tmp_path / "c", tokenizer=tmp_path / "narrow.json")
    assert corpus.skipped == {"character that the tokenizer does not know": 60}
    wide = load_corpus(source, cache=tmp_path / "c", tokenizer=tokenizer_file(tmp_path / "t.json", ["<|endoftext|>"]))
    assert wide.skipped == {}


def test_a_vocabulary_larger_than_the_models_is_refused_before_training(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "t.json", ["<|endoftext|>"])
    source = folder(tmp_path, {"a.txt": "some text and more text\n" * 400}) / "a.txt"
    corpus = load_corpus(source, cache=tmp_path / "c", tokenizer=path)
    for vocab in (corpus.vocab - 1, corpus.vocab):
        base, training = mue.Dense(32, 32, 1, head_dim=16, sequence=16, vocab=vocab), mue.Training(64, 5)
        plan = mue.transfer(base, base, mue.HParams(0.01, 0.1, 0.1), base_training=training, training=training)
        run = Run(plan, Settings(), corpus.describe())
        if vocab == corpus.vocab:
            assert text_windows(run, corpus).at(0)[0].shape == (4, 16)
            continue
        with pytest.raises(
            ValueError, match=f"the data has {corpus.vocab} tokens, the model a vocabulary of {vocab}: raise"
        ):
            text_windows(run, corpus)
