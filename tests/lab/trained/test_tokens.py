"""mue.lab.trained.tokens: bytes of every token, and text that comes piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest

from mue.lab.trained.find import read_run
from mue.lab.trained.tokens import TextTokens, tokens_of
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


def test_a_tokenizer_that_writes_blanks_as_marks(tmp_path: Path) -> None:
    """SentencePiece's kind: the first token of a text has no blank, the same one inside has; bytes of their own are one byte each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "<s>": 1, "▁def": 2, "▁fib": 3, "ne": 4, "▁": 5, "<0xC3>": 6, "<0xBC>": 7, "a": 8, "</s>": 9}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    tokens = tokens_of({"tokenizer": "made elsewhere"}, path)
    assert tokens is not None
    assert [tokens.bytes_of[i] for i in (2, 3, 4, 6, 7, 8, 9)] == [4, 4, 2, 1, 1, 1, 0]
    decode = tokens.decoder()
    assert [decode(i) for i in (2, 3, 6, 7, 4)] == ["def", " fib", "", "ü", "ne"]


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
