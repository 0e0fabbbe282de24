"""Tokens in files: what is read, and what cannot be what its description says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mue.lab.data import Corpus, load_corpus

GPT2, LLAMA3 = 50257, 128256


def tokens(vocab: int, count: int = 20_000) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(1, vocab, count)


def load(path: Path, dtype: str | None, vocab: int) -> Corpus:
    return load_corpus(path, cache=path.parent / "cache", dtype=dtype, vocab=vocab)


def all_of(corpus: Corpus) -> np.ndarray[Any, Any]:
    return np.concatenate([corpus.train, corpus.validation])


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", "uint64", ">u2", ">i4", "<u2"])
def test_tokens_of_every_width_and_order(tmp_path: Path, dtype: str) -> None:
    wanted = tokens(GPT2)
    wanted.astype(dtype).tofile(tmp_path / "a.bin")
    found = load(tmp_path / "a.bin", dtype, GPT2)
    assert np.array_equal(all_of(found), wanted)
    assert found.train.dtype.name == ("uint32" if dtype == "uint32" else "uint16")
    np.save(tmp_path / "a.npy", wanted.astype(dtype).reshape(-1, 100))  # in rows, as some keep them
    assert np.array_equal(all_of(load(tmp_path / "a.npy", None, GPT2)), wanted)


STORED, SAID = ("uint8", "uint16", "uint32", "int64", ">u4", ">i8"), ("uint8", "uint16", "uint32", "int32")
READINGS = [
    (vocab, stored, said)
    for vocab in (200, GPT2, LLAMA3)
    for stored, said in itertools.product(STORED, SAID)
    if vocab <= np.iinfo(stored).max and vocab <= np.iinfo(said).max
]


@pytest.mark.parametrize(("vocab", "stored", "said"), READINGS)
def test_tokens_of_another_width_are_refused(tmp_path: Path, vocab: int, stored: str, said: str) -> None:
    """Whatever is read without a word is what was stored."""
    wanted = tokens(vocab)
    wanted.astype(stored).tofile(tmp_path / "a.bin")
    if np.dtype(stored).itemsize == np.dtype(said).itemsize and np.dtype(stored).isnative:
        assert np.array_equal(all_of(load(tmp_path / "a.bin", said, vocab)), wanted)
        return
    with pytest.raises(
        ValueError, match=r"a\.bin: (these are no \w+ tokens: .* say dtype = |token .* is outside the vocab)"
    ) as caught:
        load(tmp_path / "a.bin", said, vocab)
    assert not list(tmp_path.glob("cache/*.bin"))
    if advice := re.search("say dtype = '(.*)'", str(caught.value)):  # it is right
        assert np.array_equal(all_of(load(tmp_path / "a.bin", advice[1], vocab)), wanted)


def test_zeros_among_tokens_are_none_of_that(tmp_path: Path) -> None:
    """A separator at every fourth place, many zeros, nothing else, too few to tell."""
    found = tokens(GPT2)
    for name, step in (("fourth", 4), ("third", 3), ("eighth", 8)):
        found[::step] = 0
        found.astype("uint16").tofile(tmp_path / f"{name}.bin")
        assert np.array_equal(all_of(load(tmp_path / f"{name}.bin", "uint16", GPT2)), found)
    for name, other in (("zeros", np.zeros(20_000)), ("few", np.array([7, 0] * 20)), ("most", np.arange(20_000) == 7)):
        other.astype("uint16").tofile(tmp_path / f"{name}.bin")
        assert load(tmp_path / f"{name}.bin", "uint16", GPT2).tokens == len(other)


def test_what_says_itself_what_it_is(tmp_path: Path) -> None:
    wanted = tokens(GPT2).astype("uint16")
    np.save(tmp_path / "a.npy", wanted)
    (tmp_path / "renamed.bin").write_bytes((tmp_path / "a.npy").read_bytes())
    with pytest.raises(ValueError, match="this is a NumPy file; call it"):
        load(tmp_path / "renamed.bin", "uint16", GPT2)
    with pytest.raises(ValueError, match="holds uint16, not uint32; leave the dtype out"):
        load(tmp_path / "a.npy", "uint32", GPT2)
    with pytest.raises(ValueError, match="vocab of its tokens unknown"):
        load_corpus(tmp_path / "a.npy", cache=tmp_path / "cache")
    for name, header in (("gpt2", [20240520, 1]), ("llama3", [20240801, 7])):
        with (tmp_path / f"{name}.bin").open("wb") as file:
            np.array([*header, len(wanted)] + [0] * 253, "int32").tofile(file)
            wanted.tofile(file)
        with pytest.raises(
            ValueError, match=r"begins with the header of llm.c; write its tokens alone, .*\[(512|256):\]"
        ):
            load(tmp_path / f"{name}.bin", "uint16", 65536)
    (tmp_path / "weights.bin").write_bytes(b"PK\3\4" + bytes(1000))
    with pytest.raises(ValueError, match=r"packed \(zip\), no tokens"):
        load(tmp_path / "weights.bin", "uint16", GPT2)
    for name, array in (("floats", np.ones(9)), ("truth", np.ones(9, bool)), ("objects", np.array([None, {}]))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=rf"{name}\.npy: (dtype .* of tokens is not supported|not a NumPy array)"):
            load(tmp_path / f"{name}.npy", None, GPT2)


def test_tokens_outside_the_vocabulary_name_the_cause(tmp_path: Path) -> None:
    found = tokens(GPT2).astype("int32")
    found[777] = -100  # what losses ignore
    found.tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="token -100 at position 777 is outside the vocab of 50257; check vocab"):
        load(tmp_path / "a.bin", "int32", GPT2)
    tokens(GPT2).astype(">u2").tofile(tmp_path / "b.bin")
    with pytest.raises(ValueError, match="its bytes lie in the other order: say dtype = '>u2'"):
        load(tmp_path / "b.bin", "uint16", GPT2)


def test_the_same_bytes_as_other_tokens_are_another_corpus(tmp_path: Path) -> None:
    np.tile(np.array([3, 9], "uint16"), 5_000).tofile(tmp_path / "a.bin")
    little, big = (load(tmp_path / "a.bin", dtype, 65536) for dtype in ("uint16", ">u2"))
    assert little.hash != big.hash and little.train[0] == 3 and big.train[0] == 3 * 256
