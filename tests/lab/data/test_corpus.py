"""Corpora: what becomes of texts, folders and files of tokens; their cache and their hash; what is refused."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mue.lab.data import corpus, load_corpus, sources, stdlib_corpus
from mue.lab.data.corpus import by_folder
from support.text_folders import folder


def test_single_text_is_cut_at_its_tail_and_loses_nothing(tmp_path: Path) -> None:
    text = "grüße\r\n" * 1000
    path = folder(tmp_path, {"a.txt": text}) / "a.txt"
    corpus = load_corpus(path, cache=tmp_path / "cache", validation_fraction=0.2)
    assert bytes(corpus.train) + bytes(corpus.validation) == text.encode()
    assert len(corpus.validation) == pytest.approx(0.2 * corpus.tokens, abs=1)
    assert (corpus.vocab, corpus.files, corpus.bytes, corpus.tokenizer) == (256, 1, len(text.encode()), "bytes")


def test_files_by_the_folder_that_they_lie_in(tmp_path: Path) -> None:
    """Those held out are those that a corpus of the same fraction validates on; a fraction that is none is refused by both."""
    source = folder(
        tmp_path / "src", {f"{name}/{i}.txt": f"{name} {i}\n" * 9 for name in ("a", "b/c") for i in range(20)}
    )
    folder(source, {"own.txt": "own\n" * 9})
    cache = tmp_path / "cache"
    every, held = (by_folder(source, cache=cache, held_out=h, validation_fraction=0.3) for h in (False, True))
    assert {name: len(paths) for name, paths in every.items()} == {".": 1, "a": 20, "b": 20}
    read = load_corpus(source, cache=cache, validation_fraction=0.3)
    texts = sorted(bytes(read.validation).split(b"\0"))
    assert texts == sorted(path.read_bytes() for paths in held.values() for path in paths) and 0 < len(texts) < 41
    assert by_folder(source / "own.txt", cache=cache, held_out=True) == {}
    for fraction in (0.0, 1.0, -1.0, "0.1"):
        for what in (
            lambda f: load_corpus(source, cache=cache, validation_fraction=f),
            lambda f: by_folder(source, cache=cache, held_out=True, validation_fraction=f),
        ):
            with pytest.raises(ValueError, match=r"validation_fraction must be (greater than 0 and below 1|.*'0.1')"):
                what(fraction)


def test_folder_is_split_by_file_and_reports_what_it_left_out(tmp_path: Path) -> None:
    good = {f"pkg/{i}.py": f"# file {i}\n" for i in range(60)}
    bad: dict[str, str | bytes] = {
        "nul.py": b"a\0b", "latin.py": "é".encode("latin-1"), "empty.py": "", "cut.py": "é".encode()[:1],
        "picture.png": b"x", ".git/x.py": "no", "pkg/__pycache__/y.py": "no", "blob.bin": b"\1\2",
    }  # fmt: skip
    folder(tmp_path / "src", {**good, **bad})
    corpus = load_corpus(tmp_path / "src", cache=tmp_path / "cache")
    documents = [bytes(s).split(b"\0") for s in (corpus.train, corpus.validation)]
    assert Counter(documents[0] + documents[1]) == Counter(v.encode() for v in good.values())
    assert 1 <= len(documents[1]) <= 20
    assert corpus.skipped == {
        "binary": 1, "not UTF-8": 2, "empty": 1, "other suffix": 1, "excluded folder": 2, ".bin without its sidecar": 1,
    }  # fmt: skip


def test_adding_a_file_moves_no_other_between_the_splits(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"{i}.txt": f"document {i}" for i in range(40)}
    before = load_corpus(folder(tmp_path / "s", files), cache=tmp_path / "c")
    after = load_corpus(folder(tmp_path / "s", {"more.txt": "more"}), cache=tmp_path / "c")
    assert set(bytes(before.train).split(b"\0")) <= set(bytes(after.train).split(b"\0"))
    assert set(bytes(before.validation).split(b"\0")) <= set(bytes(after.validation).split(b"\0"))


@pytest.mark.parametrize("count", [2, 3])
def test_both_halves_of_a_small_folder_have_text(tmp_path: Path, count: int) -> None:
    for fraction in (0.01, 0.99):
        source = folder(tmp_path / "s", {f"{i}.txt": "some text" for i in range(count)})
        corpus = load_corpus(source, cache=tmp_path / "c", validation_fraction=fraction)
        assert len(corpus.train) and len(corpus.validation)


def test_hash_follows_content_names_tokenizer_and_split_but_not_the_place(tmp_path: Path) -> None:
    def load(place: str, **options: Any) -> str:
        return load_corpus(tmp_path / place, cache=tmp_path / f"cache {place}", **options).hash

    files: dict[str, str | bytes] = {f"{i}.txt": f"text {i}" for i in range(20)}
    folder(tmp_path / "a", files), folder(tmp_path / "deep/b", files)
    folder(tmp_path / "c", {**files, "3.txt": "text X"})
    assert load("a") == load("deep/b")
    others = {load("a"), load("c"), load("a", validation_fraction=0.5), load("a", vocab=320)}
    assert len(others) == 4
    folder(tmp_path, {"x/one.txt": "the same", "y/two.txt": "the same"})
    assert load("x/one.txt") == load("y/two.txt")


def test_second_load_reads_no_text_and_a_changed_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "s", {f"{i}.txt": f"text {i}" for i in range(20)})
    old = time.time() - 100
    for path in source.iterdir():
        os.utime(path, (old, old))
    first = load_corpus(source, cache=tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_digest", lambda *_: pytest.fail("an unchanged file was read again"))
        patch.setattr(corpus, "_tokenise", lambda *_: pytest.fail("an unchanged corpus was tokenised again"))
        assert load_corpus(source, cache=tmp_path / "c").hash == first.hash
    (source / "3.txt").write_text("text X")  # the same size
    second = load_corpus(source, cache=tmp_path / "c")
    (source / "3.txt").write_text("text Y")  # the same size, perhaps within the clock's grain
    third = load_corpus(source, cache=tmp_path / "c")
    assert len({first.hash, second.hash, third.hash}) == 3
    assert b"text Y" in bytes(third.train) + bytes(third.validation)


def test_a_torn_cache_is_built_again(tmp_path: Path) -> None:
    source = folder(tmp_path, {"a.txt": "text " * 100}) / "a.txt"
    corpus = load_corpus(source, cache=tmp_path / "c")
    wanted, path = bytes(corpus.train), tmp_path / "c" / f"{corpus.hash}.bin"
    path.write_bytes(path.read_bytes()[:10])
    assert bytes(load_corpus(source, cache=tmp_path / "c").train) == wanted


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    source = folder(tmp_path, {"a.txt": "text " * 100}) / "a.txt"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        load_corpus(source, cache=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_cache_may_lie_inside_the_source(tmp_path: Path) -> None:
    folder(tmp_path, {f"{i}.txt": f"text {i}" for i in range(5)})
    first = load_corpus(tmp_path, cache=tmp_path / "cache")
    assert load_corpus(tmp_path, cache=tmp_path / "cache").hash == first.hash


def test_jsonl_and_parquet_hold_one_document_per_row(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i}" for i in range(100)]
    lines = "\n".join(json.dumps({"body": t, "n": 1}) for t in texts) + '\n\n{"body": ""}\n'
    folder(tmp_path, {"a.jsonl": lines})
    parquet.write_table(arrow.table({"body": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        corpus = load_corpus(tmp_path / name, cache=tmp_path / "c", text_key="body")
        # The tail is cut between two documents: the separator there stays at the end of train.
        assert (bytes(corpus.train) + bytes(corpus.validation)).split(b"\0") == [t.encode() for t in texts]
        assert bytes(corpus.validation).startswith(b"document")
        assert corpus.skipped == ({"blank line": 1, "empty document": 1} if name == "a.jsonl" else {})


def test_rows_without_text_are_counted_and_end_nothing(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["first", None, "second", "", None, "third"]
    lines = [json.dumps({"text": t}) for t in texts] + ['{"text": NaN}']
    folder(tmp_path, {"a.jsonl": "\r\n".join(lines)})
    parquet.write_table(arrow.table({"text": [*texts, None]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        corpus = load_corpus(tmp_path / name, cache=tmp_path / "c")
        assert (bytes(corpus.train) + bytes(corpus.validation)).split(b"\0") == [b"first", b"second", b"third"]
        assert corpus.skipped == {"null document": 3, "empty document": 1}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """With it or without, a file is the same corpus; one within the text stays."""
    text, lines = "grüße \ufeff\n" * 50, '{"text": "one"}\n{"text": "two"}\n'
    for name, content in (("a.txt", text), ("b.jsonl", lines)):
        folder(tmp_path, {name: content, f"marked {name}": codecs.BOM_UTF8 + content.encode()})
        plain, marked = (load_corpus(tmp_path / n, cache=tmp_path / f"c {n}") for n in (name, f"marked {name}"))
        assert plain.hash == marked.hash
        assert bytes(plain.train) == bytes(marked.train) and bytes(plain.validation) == bytes(marked.validation)
    assert "\ufeff" in text and plain.tokens == len(b"one\0two")


def test_linked_folders_are_read_once_however_they_lead_back(tmp_path: Path) -> None:
    folder(tmp_path, {f"own/{i}.txt": f"own {i}" for i in range(3)})
    folder(tmp_path, {"big/a.txt": "big a", "big/deep/b.txt": "big b"})
    links = {"own/web": "big", "own/aa": "big/deep", "big/back": "own", "big/self": "big", "own/gone": "nowhere"}
    for place, target in links.items():
        (tmp_path / place).symlink_to(tmp_path / target)
    corpus = load_corpus(tmp_path / "own", cache=tmp_path / "c")
    documents = (bytes(corpus.train) + b"\0" + bytes(corpus.validation)).split(b"\0")
    assert sorted(documents) == [b"big a", b"big b", b"own 0", b"own 1", b"own 2"]
    # deep, by another link; back to own; big itself. The link to nowhere is a file of no known kind.
    assert corpus.skipped == {"folder linked again": 3, "other suffix": 1}
    (tmp_path / "own" / "web").unlink()
    less = load_corpus(tmp_path / "own", cache=tmp_path / "c")
    assert less.files == 4 and less.hash != corpus.hash
    (tmp_path / "own" / "aa").rename(tmp_path / "own" / ".aa")  # hidden, as any folder
    assert load_corpus(tmp_path / "own", cache=tmp_path / "c").files == 3


@pytest.mark.parametrize("growing", [True, False])
def test_a_file_that_is_written_to_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growing: bool
) -> None:
    """Else the tokens of the new text would be kept under the hash of the old one."""
    path = folder(tmp_path, {"log.txt": "a line\n" * 100}) / "log.txt"
    written = corpus._write_tokens

    def write(*arguments: Any) -> None:
        if growing:
            with path.open("a") as handle:
                handle.write("another line\n")
        written(*arguments)

    monkeypatch.setattr(corpus, "_write_tokens", write)
    if growing:
        with pytest.raises(ValueError, match=r"log.txt: the file changed while it was read; load it again"):
            load_corpus(path, cache=tmp_path / "c")
        assert not list(tmp_path.glob("c/*.bin"))
    else:
        assert load_corpus(path, cache=tmp_path / "c").tokens == 700


def test_tokens_with_a_sidecar_and_nanogpt_style(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    for name in ("train", "val"):
        tokens.tofile(tmp_path / f"{name}.bin")
    raw = load_corpus(tmp_path / "train.bin", cache=tmp_path / "c", dtype="uint16", vocab=1000)
    assert np.array_equal(np.concatenate([raw.train, raw.validation]), tokens)
    with pytest.raises(ValueError, match="dtype and vocab of its tokens unknown; pass them, or write"):
        load_corpus(tmp_path / "train.bin", cache=tmp_path / "c")
    with pytest.raises(ValueError, match="token 500 at position 500 is outside the vocab of 500"):
        load_corpus(tmp_path / "train.bin", cache=tmp_path / "c", dtype="uint16", vocab=500)

    pair = load_corpus(tmp_path, cache=tmp_path / "c", dtype="uint16", vocab=1000)  # train and val at their word
    assert np.array_equal(pair.train, tokens) and np.array_equal(pair.validation, tokens)

    folder(tmp_path, {"train.json": '{"dtype": "uint32", "vocab": 70000000, "tokenizer": "mine"}'})
    wide = load_corpus(tmp_path / "train.bin", cache=tmp_path / "c")
    assert (wide.tokens, wide.train.dtype.name, wide.tokenizer) == (500, "uint32", "mine")
    with pytest.raises(ValueError, match="says vocab = 70000000, the caller 1000"):
        load_corpus(tmp_path / "train.bin", cache=tmp_path / "c", vocab=1000)


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "gone.txt", "gone.txt: no such file or folder"),
        ({"a.txt": ""}, "a.txt", "the file is empty"),
        ({"a.txt": b"abc\0def"}, "a.txt", "the file is binary"),
        ({"a.txt": b"\xfe\xfd\xfa"}, "a.txt", "the file is not UTF-8"),
        ({"a.txt": "text".encode("utf-16")}, "a.txt", "the file is UTF-16; convert it to UTF-8 text"),
        ({"a.jsonl": '{"text": "a"}'.encode("utf-32")}, "a.jsonl", "the file is UTF-32; convert it to UTF-8 text"),
        ({"a.txt": codecs.BOM_UTF8}, "a.txt", "the file is empty"),
        ({"a.jsonl": gzip.compress(b'{"text": "a"}')}, "a.jsonl", r"the file is packed \(gzip\); unpack it first"),
        ({"a.txt.gz": gzip.compress(b"text")}, "a.txt.gz", "the file is packed; unpack it first: gunzip a.txt.gz"),
        ({"a.jsonl.zst": b"x"}, "a.jsonl.zst", "unpack it first: unzstd a.jsonl.zst"),
        ({"d/a.txt.bz2": b"x"}, "d", "no usable text .1 x packed file."),
        ({"a.xyz": "text"}, "a.xyz", "the suffix '.xyz' is unknown"),
        ({"d/a.png": "text"}, "d", "no usable text .1 x other suffix."),
        ({"a.jsonl": '{"text": "a"}\n{"text": \n'}, "a.jsonl", "line 2: bad JSON"),
        (
            {"a.jsonl": '{"text": "a"}\n{"body": "b"}\n'},
            "a.jsonl",
            r"line 2: no key 'text' \(it has keys \['body'\]\); line 1 had it",
        ),
        ({"a.jsonl": '["text"]\n'}, "a.jsonl", "line 1: no key 'text'"),
        ({"a.jsonl": '{"text": 3}\n'}, "a.jsonl", "line 1: 'text' is int, not text; name the text's key"),
        ({"a.jsonl": '{"text": "a"}\n{"text": 3}\n'}, "a.jsonl", "line 2: 'text' is int, not text; mend that document"),
        ({"a.jsonl": '{"text": null}\n' * 3}, "a.jsonl", "3 x null document.*or its key: text_key= .'text' is null"),
        ({"a.jsonl": '{"text": "a\\u0000"}\n'}, "a.jsonl", "line 1: binary text"),
        ({"a.jsonl": '{"text": ""}\n'}, "a.jsonl", "no text to learn from"),
        ({"a.parquet": "text"}, "a.parquet", "not a Parquet file"),
        ({"a.bin": b"abc", "a.json": '{"dtype": "uint16", "vocab": 9}'}, "a.bin", "no whole number of uint16 tokens"),
        ({"a.bin": b"ab", "a.json": '{"dtype": "float", "vocab": 9}'}, "a.bin", "dtype 'float'"),
        (
            {"d/a.bin": b"\0\0", "d/a.json": '{"dtype": "uint16", "vocab": 9}', "d/b.txt": "x"},
            "d",
            "text among files of tokens",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    tmp_path: Path, files: dict[str, str | bytes], name: str, message: str
) -> None:
    folder(tmp_path / "s", files)
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(tmp_path / "s" / name, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*")) and not list((tmp_path / "cache").glob(".*"))


def test_standard_library(tmp_path: Path) -> None:
    corpus = stdlib_corpus(tmp_path)
    assert 5e6 < corpus.bytes < 40e6 and corpus.tokens >= corpus.bytes and corpus.vocab == 256
    assert 0.05 < len(corpus.validation) / corpus.tokens < 0.2
    assert json.loads(json.dumps(corpus.describe()))["hash"] == corpus.hash
    assert stdlib_corpus(tmp_path).hash == corpus.hash
