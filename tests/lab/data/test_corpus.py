"""Corpora and batches: what is in them, that nothing is lost silently, and that order depends on (seed, step) alone."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.lab.data import Batches, Corpus, corpus, load_corpus, sources, stdlib_corpus


def folder(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def stream(tokens: np.ndarray[Any, Any]) -> Corpus:
    return Corpus(tokens, tokens, 256, "0" * 64, 1, len(tokens), "bytes", 0)


# ------------------------------------------------------------------------------------------------------------ corpora


def test_single_text_is_cut_at_its_tail_and_loses_nothing(tmp_path: Path) -> None:
    text = "grüße\r\n" * 1000
    path = folder(tmp_path, {"a.txt": text}) / "a.txt"
    corpus = load_corpus(path, cache=tmp_path / "cache", validation_fraction=0.2)
    assert bytes(corpus.train) + bytes(corpus.validation) == text.encode()
    assert len(corpus.validation) == pytest.approx(0.2 * corpus.tokens, abs=1)
    assert (corpus.vocab, corpus.files, corpus.bytes, corpus.tokenizer) == (256, 1, len(text.encode()), "bytes")


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
        patch.setattr(corpus, "build", lambda *_: pytest.fail("an unchanged corpus was tokenised again"))
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


def tokenizer_file(path: Path, specials: list[str]) -> Path:
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
        ({"a.txt": b"\xff\xfe\xfa"}, "a.txt", "the file is not UTF-8"),
        ({"a.xyz": "text"}, "a.xyz", "the suffix '.xyz' is unknown"),
        ({"d/a.png": "text"}, "d", "no usable text .1 x other suffix."),
        ({"a.jsonl": '{"text": "a"}\n{"text": \n'}, "a.jsonl", "line 2: bad JSON"),
        ({"a.jsonl": '{"text": "a"}\n{"body": "b"}\n'}, "a.jsonl", r"line 2: no key 'text' \(it has keys \['body'\]\)"),
        ({"a.jsonl": '["text"]\n'}, "a.jsonl", "line 1: no key 'text'"),
        ({"a.jsonl": '{"text": 3}\n'}, "a.jsonl", "line 1: 'text' is int, not text"),
        ({"a.jsonl": '{"text": "a\\u0000"}\n'}, "a.jsonl", "line 1: binary text"),
        ({"a.jsonl": '{"text": ""}\n'}, "a.jsonl", "no text to learn from"),
        ({"a.parquet": "text"}, "a.parquet", "not a Parquet file"),
        ({"a.bin": b"abc", "a.json": '{"dtype": "uint16", "vocab": 9}'}, "a.bin", "no whole number of uint16 tokens"),
        ({"a.bin": b"ab", "a.json": '{"dtype": "float", "vocab": 9}'}, "a.bin", "dtype 'float'"),
        ({"d/a.bin": b"\0\0", "d/a.json": '{"dtype": "uint16", "vocab": 9}', "d/b.txt": "x"}, "d", "text among .bin"),
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


def test_bad_tokenizer_file(tmp_path: Path) -> None:
    folder(tmp_path, {"a.txt": "text", "t.json": "{}"})
    for name, message in (("t.json", "not a `tokenizers` JSON"), ("gone.json", "no such tokenizer file")):
        with pytest.raises(ValueError, match=message):
            load_corpus(tmp_path / "a.txt", cache=tmp_path / "c", tokenizer=tmp_path / name)


def test_standard_library(tmp_path: Path) -> None:
    corpus = stdlib_corpus(tmp_path)
    assert 5e6 < corpus.bytes < 40e6 and corpus.tokens >= corpus.bytes and corpus.vocab == 256
    assert 0.05 < len(corpus.validation) / corpus.tokens < 0.2
    assert json.loads(json.dumps(corpus.describe()))["hash"] == corpus.hash
    assert stdlib_corpus(tmp_path).hash == corpus.hash


# ------------------------------------------------------------------------------------------------------------ batches


@settings(deadline=None, max_examples=60)
@given(length=st.integers(9, 700), sequence=st.integers(1, 8), batch=st.integers(1, 7), seed=st.integers(0, 10**12))
def test_an_epoch_visits_every_window_once(length: int, sequence: int, batch: int, seed: int) -> None:
    batches = Batches(stream(np.arange(length)), "train", sequence, batch, seed)
    n = batches.windows
    starts = torch.cat([batches.at(step)[0][:, 0] for step in range(3 * n // batch + 1)])[: 3 * n].reshape(3, n)
    for epoch in starts:
        epoch = epoch.sort().values
        assert (epoch.diff() == sequence + 1).all()  # non-overlapping, one offset for the whole epoch
        assert epoch[0] >= 0 and epoch[-1] + sequence < length


def test_targets_are_the_inputs_moved_by_one_and_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    corpus = stream(np.arange(100_000) % 251)
    one, two = (Batches(corpus, "train", 16, 8, seed=3) for _ in range(2))
    x, y = one.at(10**9)
    assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal((x + 1) % 251, y) and x.is_contiguous() and y.is_contiguous()
    for step in (0, 5, 3, 10**9):  # any order, any object
        assert all(torch.equal(a, b) for a, b in zip(one.at(step), two.at(step), strict=True))
    assert not torch.equal(one.at(0)[0], Batches(corpus, "train", 16, 8, seed=4).at(0)[0])


def test_the_order_is_pinned_so_that_runs_of_years_ago_can_be_repeated() -> None:
    x, _ = Batches(stream(np.arange(1000)), "train", 9, 5, seed=0).at(7)
    assert x[:, 0].tolist() == [179, 819, 499, 549, 129]


def test_the_order_looks_random() -> None:
    batches = Batches(stream(np.arange(1_000_000)), "train", 9, 1000, seed=0)
    places = torch.cat([batches.at(step)[0][:, 0] for step in range(99)]).numpy() // 10
    neighbours = np.corrcoef(places[:-1], places[1:])[0, 1]
    with_order = np.corrcoef(places, np.arange(len(places)))[0, 1]
    assert abs(neighbours) < 0.015 and abs(with_order) < 0.015  # about 4.5 standard deviations
    # Every decile of the text reaches every decile of the epoch: 100 cells of 990, standard deviation 30.
    cells = np.histogram2d(np.arange(len(places)), places, bins=10)[0]
    assert abs(cells - 990).max() < 150


def test_every_token_is_reached_through_the_offsets() -> None:
    batches = Batches(stream(np.arange(59)), "train", 9, 1, seed=1)
    seen = set(torch.cat([torch.cat(batches.at(step), 1) for step in range(400)]).flatten().tolist())
    assert seen == set(range(59))


def test_fixed_batches_cover_the_stream_evenly() -> None:
    batches = Batches(stream(np.arange(10_000)), "validation", 9, 4, seed=5)
    fixed = batches.fixed(10)
    assert len(fixed) == 10
    starts = torch.stack([x[:, 0] for x, _ in fixed])
    ordered = starts.flatten().sort().values
    assert ordered[0] == 0 and ordered[-1] == 9990 and ordered.diff().min() >= 10
    assert ordered.diff().max() - ordered.diff().min() <= 1
    assert (starts.max(1).values - starts.min(1).values > 7000).all()  # each batch spans the stream
    other = Batches(batches.corpus, "validation", 9, 4, seed=6).fixed(10)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(fixed, other, strict=True))
    assert len(batches.fixed(10**6)) == 250 and len(Batches(stream(np.arange(12)), "train", 9, 4).fixed(3)) == 1


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match="8 tokens, shorter than one sequence of 8"):
        Batches(stream(np.arange(8)), "train", 8, 1)
    for bad in ({"sequence": 0}, {"batch_sequences": 0}, {"split": "test"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Batches(stream(np.arange(80)), **{"split": "train", "sequence": 8, "batch_sequences": 1, **bad})  # type: ignore[arg-type]
    batches = Batches(stream(np.arange(80)), "train", 8, 1)
    with pytest.raises(ValueError, match="no step -1"):
        batches.at(-1)
    with pytest.raises(ValueError, match="at least 1"):
        batches.fixed(0)
