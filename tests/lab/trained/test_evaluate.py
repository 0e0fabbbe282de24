"""mue.lab.trained.evaluate and held_out: losses per token and byte against a loop in float64, the run's own validation, folders."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mue.lab.data.corpus import by_folder
from mue.lab.data.spec import corpus_arguments, open_corpus
from mue.lab.train.run import read_run
from mue.lab.trained.evaluate import TextScores, score
from mue.lab.trained.find import find
from mue.lab.trained.held_out import WHOLE, own_text, text_of
from mue.lab.trained.subject import subject_of
from mue.lab.trained.tokens import tokens_of
from mue.util.statistics import mean_of, student_quantile

CPU = torch.device("cpu")


def test_scores_against_a_loop() -> None:
    torch.manual_seed(0)
    table = torch.randn(7, 7)
    windows = [
        (torch.randint(7, (3, 5)), torch.randint(7, (3, 5))),
        (torch.randint(7, (1, 2)), torch.randint(7, (1, 2))),
    ]
    bytes_of = [0, 1, 2, 3, 1, 1, 4]
    found = score(lambda tokens_BT: table[tokens_BT], windows, bytes_of)
    nats, sizes, right = [], [], []
    for tokens_BT, following_BT in windows:
        for tokens_T, following_T in zip(tokens_BT.tolist(), following_BT.tolist(), strict=True):
            rows = [table[t].double() for t in tokens_T]
            nats.append(sum(float(r.logsumexp(0) - r[y]) for r, y in zip(rows, following_T, strict=True)))
            sizes.append(sum(bytes_of[y] for y in following_T))
            right.append(sum(int(r.argmax()) == y for r, y in zip(rows, following_T, strict=True)))
    assert found.nats == pytest.approx(nats, rel=1e-6) and found.bytes == tuple(sizes)
    assert found.per_token.value == pytest.approx(sum(nats) / 17) and found.accuracy.value == sum(right) / 17
    assert found.per_byte is not None and found.per_byte.value == pytest.approx(sum(nats) / sum(sizes))
    assert score(lambda tokens_BT: table[tokens_BT], windows, None).per_byte is None
    json.dumps(found.to_dict())
    with pytest.raises(ValueError, match="its run diverged"):
        score(lambda tokens_BT: table[tokens_BT] * float("nan"), windows, None)


def test_intervals_are_those_of_means() -> None:
    samples = [1.0, 2.0, 4.0, 3.0]
    plain = mean_of(samples)
    assert plain.value == 2.5 and plain.half == pytest.approx(student_quantile(0.975, 3) * math.sqrt((5 / 3) / 4))
    same = mean_of([2 * s for s in samples], [2.0] * 4)
    assert (same.value, same.half) == pytest.approx((plain.value, plain.half))
    assert math.isinf(mean_of([1.0]).half) and mean_of([1.0]).to_list() == [1.0, None, None]
    # a paired difference is far narrower than the two losses, since their texts are the same (and wide where they are not: the control)
    hard = TextScores((10.0, 20.0, 30.0), (10.0,) * 3, (1.0,) * 3, None)
    easier = TextScores((9.0, 19.1, 28.9), (10.0,) * 3, (1.0,) * 3, None)
    turned = TextScores(easier.nats[::-1], easier.tokens, easier.correct, None)
    assert easier.above(hard).value == pytest.approx(-0.1)
    assert easier.above(hard).half < 0.05 < 1 < min(hard.per_token.half, turned.above(hard).half)


def test_intervals_hold_what_they_promise() -> None:
    """Of 400 samples of 30 loss-and-bytes pairs at least 91 % hold the true ratio (95 % ± 4 standard errors)."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        sizes = torch.randint(20, 60, (30,), generator=generator).double()
        nats = sizes * (1.5 + 0.3 * torch.randn(30, generator=generator).double())
        found = mean_of(nats.tolist(), sizes.tolist())
        held += abs(found.value - 1.5) <= found.half
    assert 0.907 <= held / 400 <= 0.993


@pytest.mark.parametrize("which", ["moe_run", "dense_run"])
def test_without_options_it_is_the_runs_own_validation(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    subject = subject_of(folder, None, None, None, CPU)
    found = score(subject.logits, subject.text.windows[WHOLE], subject.bytes_of)
    result = json.loads((folder / "result.json").read_text())
    assert found.per_token.value == pytest.approx(result["val_loss"], rel=1e-6)
    assert found.per_byte is not None
    if which == "moe_run":  # tokens are bytes
        assert found.per_byte == found.per_token
    else:
        assert found.per_byte.value < found.per_token.value
    assert subject.text.notes == () and subject.folder == folder


def test_every_folder_is_asked_about_its_own_text(
    moe_run: Path, dense_run: Path, domains: Path, tmp_path: Path
) -> None:
    """All of a user's text is held out, whichever half a corpus would train on; the windows are of that folder's files alone."""
    for folder in (moe_run, dense_run):
        run = read_run(folder)
        tokens = tokens_of(run.data)
        assert tokens is not None
        options = {k: v for k, v in run.data["source"].items() if k == "tokenizer"} | {"cache": str(tmp_path / "cache")}
        vocab, known = run.plan.target.vocab, [run.data["tokenizer"]]
        text = text_of(domains, options, made_with=known, sequence=32, vocab=vocab, sequences=64)
        assert list(text.windows) == [WHOLE, ".", "one", "two"] and text.left_out == {}
        for name, windows in text.windows.items():
            assert 1 <= sum(len(x) for x, _ in windows) <= (64 if name == WHOLE else 16)
            if name != WHOLE:
                here = domains if name == "." else domains / name
                known = "\0".join(p.read_text() for p in here.glob("*.py"))
                decode = tokens.decoder()
                x, y = windows[0]
                words = "".join(decode(int(t)) for t in y[0])
                assert words[2:-2] in known
                assert torch.equal(x[:, 1:], y[:, :-1])


def test_what_a_run_held_out_is_asked_by_folder(moe_run: Path, tmp_path: Path) -> None:
    """Files that it was trained on are in no window (they are in those of all text: the control)."""
    run = read_run(moe_run)
    halved = {**run.data["source"], "validation_fraction": 0.6, "cache": str(tmp_path)}
    half = replace(run, data={**run.data, "hash": open_corpus(halved).hash, "source": halved})
    arguments = {k: v for k, v in corpus_arguments(halved).items() if k in ("source", "cache", "validation_fraction")}
    held = by_folder(**arguments, held_out=True)
    every = by_folder(**arguments, held_out=False)
    assert len(held) > 1 and sum(map(len, held.values())) < sum(map(len, every.values())) == 10
    own = own_text(half, 64)
    assert set(own.windows) == {WHOLE, *held} and own.notes == ()
    for name, paths in held.items():
        text = b"\0".join(p.read_bytes() for p in sorted(paths))
        for x, _ in own.windows[name]:
            assert all(bytes(row.tolist()) in text for row in x)
    trained = b"\0".join(p.read_bytes() for name, paths in every.items() for p in paths if p not in held.get(name, ()))
    rows = [bytes(row.tolist()) for windows in own.windows.values() for x, _ in windows for row in x]
    assert sum(row in trained for row in rows) < len(rows) / 10  # but for what stands in two files, a heading or blanks
    assert not any(bytes(row.tolist()) in trained for row in own.windows[WHOLE][0][0][:4])


def test_what_has_changed_or_is_too_little_is_said(moe_run: Path, tmp_path: Path) -> None:
    run, data = read_run(moe_run), tmp_path / "data"
    for name, text in {"a/1.txt": "a text to predict " * 9, "b/2.txt": "x", "c/3.txt": "short"}.items():
        (data / name).parent.mkdir(parents=True)
        (data / name).write_text(text)
    options = {"cache": str(tmp_path / "cache")}
    text = text_of(data, options, made_with=["bytes"], sequence=32, vocab=256, sequences=8)
    assert list(text.windows) == [WHOLE, "a", "c"] and "no text to learn from" in text.left_out["b"]
    assert [x.shape for x, _ in text.windows["c"]] == [(1, 3)]  # a window as long as there is text
    with pytest.raises(ValueError, match="256 tokens, the model a vocabulary of 100"):
        text_of(data, options, made_with=["bytes"], sequence=32, vocab=100, sequences=8)
    for path in data.glob("*/*.txt"):
        path.write_text("another text " * 90)
    moved = {**run.data, "source": {**run.data["source"], "source": [str(data)], "cache": str(tmp_path / "cache")}}
    changed = own_text(replace(run, data=moved), 8)
    assert "have changed since the training" in changed.notes[0]


def test_a_better_model_scores_better(moe_run: Path) -> None:
    """The trained model against the same with its blocks left out of a row: the loss sees it."""
    found = find(moe_run)
    subject = subject_of(moe_run, None, None, None, CPU)
    model = found.model()
    with torch.no_grad():
        model.blocks[0].moe.experts_down.zero_()  # type: ignore[index,union-attr]
    trained, crippled = (
        score(logits, subject.text.windows[WHOLE], subject.bytes_of)
        for logits in (subject.logits, lambda tokens_BT: model(tokens_BT).logits)
    )
    assert crippled.above(trained).value > 3 * crippled.above(trained).half / 2 > 0
