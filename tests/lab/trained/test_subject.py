"""mue.lab.trained.subject: text becomes the tokens that the model was trained on, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mue
from mue.lab.train.run import read_run
from mue.lab.trained.evaluate import score
from mue.lab.trained.held_out import WHOLE
from mue.lab.trained.subject import subject_of
from mue.lab.trained.tokens import tokens_of
from support.trained import byte_level_tokenizer, dense_run_of_words, trained

CPU = torch.device("cpu")
WORDS = mue.Dense(32, 32, 1, head_dim=16, sequence=32, vocab=400)


def stored(tokens: list[int], path: Path, tokenizer: str | None) -> Path:
    """A file of tokens, as another program leaves them."""
    np.save(path, np.array(tokens, np.uint16))
    path.with_suffix(".json").write_text(json.dumps({"vocab": 400} | ({"tokenizer": tokenizer} if tokenizer else {})))
    return path


@pytest.fixture(scope="module")
def tokenizer(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(domains, tmp_path_factory.mktemp("words") / "tokenizer.json")


def ids(tokenizer: Path, folder: Path) -> list[int]:
    """The tokens of a file in a folder."""
    tokens = tokens_of({"tokenizer": "elsewhere"}, tokenizer)
    assert tokens is not None
    return tokens.encode(min(folder.glob("*.py")).read_text())


@pytest.fixture(scope="module")
def stored_run(domains: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on tokens that somebody else had made, and called "words"."""
    out = tmp_path_factory.mktemp("stored")
    file = stored(ids(tokenizer, domains / "one"), out / "tokens.npy", "words")
    return trained(file, out, WORDS, steps=2)


def test_text_is_not_read_as_bytes_by_a_model_of_other_tokens(
    stored_run: Path, tokenizer: Path, domains: Path, tmp_path: Path
) -> None:
    text = domains / "two"
    with pytest.raises(
        ValueError, match=r"tokens of words, and those of .*two would be bytes: .*--tokenizer, or give a file"
    ):
        subject_of(stored_run, text, 8, None, CPU)
    named = subject_of(stored_run, text, 8, tokenizer, CPU)
    windows = named.text.windows[WHOLE]
    assert named.text.notes == () and named.bytes_of is not None and max(int(y.max()) for _, y in windows) > 255
    assert 1.5 < (scores := score(named.logits, windows, named.bytes_of)).per_token.value < 8
    assert scores.per_byte is not None and scores.per_byte.value < scores.per_token.value
    tokens = ids(tokenizer, text)
    for name, note in (("words", None), ("other-words", "tokens of other-words"), (None, "tokens of unknown")):
        given = subject_of(stored_run, stored(tokens, tmp_path / "tokens.npy", name), 8, None, CPU)
        assert given.bytes_of is None and (
            [note in n for n in given.text.notes] == [True] if note else not given.text.notes
        )


def test_tokens_of_another_tokenizer_are_refused(
    dense_run: Path, moe_run: Path, tokenizer: Path, domains: Path, tmp_path: Path
) -> None:
    """Where both are known for certain: bytes, or a tokenizer by its hash."""
    own = read_run(dense_run).data["tokenizer"]
    tokens = ids(tokenizer, domains / "one")
    assert subject_of(dense_run, stored(tokens, tmp_path / "own.npy", own), 8, None, CPU).text.notes == ()
    with pytest.raises(ValueError, match="not with"):
        subject_of(dense_run, stored(tokens, tmp_path / "other.npy", "sha256:0"), 8, None, CPU)
    small = stored([t % 256 for t in tokens], tmp_path / "small.npy", "sha256:0")
    small.with_suffix(".json").write_text('{"vocab": 256, "tokenizer": "sha256:0"}')
    with pytest.raises(ValueError, match=r"tokens of bytes, and those of .*small\.npy would be sha256:0"):
        subject_of(moe_run, small, 8, None, CPU)


def test_a_tokenizer_that_was_moved_is_read_where_it_is_said_to_be(domains: Path, tmp_path: Path) -> None:
    folder = dense_run_of_words(domains, tmp_path, steps=2)
    moved = (tmp_path / "tokenizer.json").rename(tmp_path / "moved.json")
    for data in (None, domains):
        with pytest.raises(ValueError, match=r"tokenizer\.json is not there: say where it is with --tokenizer"):
            subject_of(folder, data, 8, None, CPU)
        assert subject_of(folder, data, 8, moved, CPU).text.notes == ()
    found = subject_of(folder, None, None, moved, CPU)
    expected = json.loads((folder / "result.json").read_text())["val_loss"]
    assert score(found.logits, found.text.windows[WHOLE], None).per_token.value == pytest.approx(expected, rel=1e-6)


def test_a_tokenizer_that_is_not_the_tokens_is_refused(stored_run: Path, domains: Path, tmp_path: Path) -> None:
    """Of tokens that somebody only gave a name nothing but their number is known."""
    larger = byte_level_tokenizer(domains, tmp_path / "larger.json", vocab=420)
    with pytest.raises(ValueError, match="420 tokens, and the run's text has 400"):
        subject_of(stored_run, None, 8, larger, CPU)
    smaller = byte_level_tokenizer(domains, tmp_path / "smaller.json", vocab=300)
    found = subject_of(stored_run, None, 8, smaller, CPU)
    with pytest.raises(ValueError, match=r"token \d+ in the text, and the tokenizer has 300"):
        score(found.logits, found.text.windows[WHOLE], found.bytes_of)


def test_folders_that_nobody_asked_about_are_not_tokenised(
    moe_run: Path, domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for folders in (False, True):
        monkeypatch.setenv("MUE_CACHE", str(tmp_path / str(folders)))
        text = subject_of(moe_run, domains, 8, None, CPU, folders=folders).text
        made[folders] = len(list(tmp_path.joinpath(str(folders)).rglob("*.bin")))
        assert list(text.windows) == [WHOLE, *([".", "one", "two"] if folders else [])]
    assert made == {False: 1, True: 4}
