"""mue.lab.trained.tokens: bytes of every token, and text that comes piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mue.lab.train.run import read_run
from mue.lab.trained.to_transformers import END
from mue.lab.trained.tokens import TextTokens, byte_characters, tokens_of
from support.trained import byte_level_tokenizer

TEXT = "def fib(n):\n    return 'Grüße, 世界 🙂'  # ends\n"


def both(moe_run: Path, dense_run: Path) -> list[TextTokens]:
    found = [tokens_of(read_run(folder).data) for folder in (moe_run, dense_run)]
    assert None not in found
    return found  # type: ignore[return-value]


def test_tokens_count_the_bytes_of_their_text(moe_run: Path, dense_run: Path) -> None:
    for tokens in both(moe_run, dense_run):
        ids = tokens.encode(TEXT)
        assert sum(tokens.bytes_of[i] for i in ids) == len(TEXT.encode())
        decode = tokens.decoder()
        pieces = [decode(i) for i in ids]
        assert "".join(pieces) == TEXT
        assert "" in pieces  # a character of several tokens comes whole
        assert tokens.encode("") == [tokens.separator]
    words = both(moe_run, dense_run)[1]
    assert len(words.encode(TEXT)) < len(TEXT) and words.bytes_of[words.separator or 0] == 0


def tokenizer_of(kind: str, path: Path) -> TextTokens:
    """The kinds of tokenizers that there are, with a token for few of the characters of :data:`WRITTEN`.

    Args:
        kind: "metaspace" and "replace" write a blank as a mark before a word, and bytes of characters that they lack (SentencePiece, as two
            families' files have it); "suffix" marks the ends of words (GPT-1); "wordpiece" what goes on in one; "byte-level" knows bytes alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [
        "</s>",
        "<unk>",
        *"abéd",
        "ab",
        "▁",
        "▁a",
        "▁ab",
        "##b",
        "##d",
        "a</w>",
        "b</w>",
        "éd</w>",
        "d</w>",
        "é</w>",
    ]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if kind == "byte-level":
        vocab = {END: 0} | {c: b for b, c in byte_characters().items() if b}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind in ("metaspace", "replace"):
        merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁a", "b")]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace()]
            if kind == "metaspace"
            else [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "suffix":
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.BPEDecoder("</w>")
    else:
        tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece("##", cleanup=False)
    tokenizer.add_special_tokens(["</s>"] if kind != "byte-level" else [END])
    tokenizer.save(str(path))
    tokens = tokens_of({"tokenizer": "made elsewhere"}, path)
    assert tokens is not None
    return tokens


KINDS = {
    "metaspace": "ab édü世🙂\n",
    "replace": "ab édü世🙂\n",
    "suffix": "abéd ",
    "wordpiece": "abd ",
    "byte-level": "ab édü世🙂\n",
}
"""Each with the characters that it has tokens for."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokens]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: tokenizer_of(kind, folder / f"{kind}.json") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_are_the_text_of_all_tokens(kind: str, tokenizers: dict[str, TextTokens], data: st.DataObject) -> None:
    """Of a text that goes on from another: what the tokenizer itself writes of all its tokens at once."""
    tokens = tokenizers[kind]
    # a word at least on each side, for a tokenizer may write no blank that ends a text
    words = st.text(KINDS[kind], max_size=8).map(lambda text: text + "a")
    before, after = (tokens.encode(data.draw(words)) for _ in range(2))
    decode = tokens.decoder(before)
    pieces = "".join(decode(i) for i in after)
    whole, known = (tokens._text(ids) for ids in (before + after, before))
    assert whole == known + pieces and "\ufffd" not in pieces
    # a blank that only some writer of the first or last token leaves out is its byte as well
    assert 0 <= sum(tokens.bytes_of[i] for i in before + after) - len(whole.encode()) <= 1


def test_characters_of_several_tokens_come_whole_one_after_another(tokenizers: dict[str, TextTokens]) -> None:
    for kind in ("metaspace", "replace", "byte-level"):
        tokens = tokenizers[kind]
        assert [piece for piece in map(tokens.decoder(), tokens.encode("aüü世")) if piece] == ["a", "ü", "ü", "世"]
        # what a model draws may be no character: each that is begun and not ended is one mark, and the next is whole again
        first, second = tokens.encode("ü")[-2:]
        drawn = [first, first, second, second, *tokens.encode("a")]
        text = "".join(map(tokens.decoder(tokens.encode("a")), drawn))
        assert text == "\ufffdü\ufffd" + ("a" if kind == "byte-level" else " a")


def test_a_text_goes_on_with_its_blank_and_a_document_begins_without(tokenizers: dict[str, TextTokens]) -> None:
    for kind in ("metaspace", "replace"):
        tokens = tokenizers[kind]
        [word] = tokens.encode("ab")
        end = tokens.separator
        assert end is not None
        assert [tokens.decoder(after)(word) for after in ((), [end], [word])] == ["ab", "ab", " ab"]
        decode = tokens.decoder([word])
        assert [decode(i) for i in (word, end, word, word)] == [" ab", "</s>", "ab", " ab"]
        assert (tokens.bytes_of[word], tokens.bytes_of[end]) == (3, 0)


def test_a_separator_that_was_added_counts_no_bytes_special_or_not(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    for kind in ("metaspace", "byte-level"):
        path = tmp_path / f"{kind}.json"
        tokenizer_of(kind, path)
        made = Tokenizer.from_file(str(path))
        made.add_tokens([AddedToken("<doc>", special=False), AddedToken("<more>", special=False)])
        made.save(str(path))
        tokens = tokens_of({"tokenizer": "made elsewhere", "source": {"separator": "<doc>"}}, path)
        assert tokens is not None and tokens.separator == made.token_to_id("<doc>")
        # the control: what was added and separates nothing is text
        assert [tokens.bytes_of[made.token_to_id(name)] for name in ("<doc>", "<more>")] == [0, 6]


def test_another_tokenizer_is_refused(dense_run: Path, moe_run: Path, domains: Path, tmp_path: Path) -> None:
    data = read_run(dense_run).data
    own = Path(data["source"]["tokenizer"])
    moved = tmp_path / "moved.json"
    moved.write_bytes(own.read_bytes())
    assert tokens_of(data, moved) is not None
    other = byte_level_tokenizer(domains, tmp_path / "other.json", vocab=300)
    with pytest.raises(ValueError, match="another tokenizer than the run's"):
        tokens_of(data, other)
    gone = {**data, "source": {**data["source"], "tokenizer": str(tmp_path / "gone.json")}}
    with pytest.raises(ValueError, match=r"gone\.json is not there: say where it is with --tokenizer"):
        tokens_of(gone)
    with pytest.raises(ValueError, match="tokens are bytes"):
        tokens_of(read_run(moe_run).data, own)
    assert tokens_of({"tokenizer": "gpt2", "source": {}}) is None
